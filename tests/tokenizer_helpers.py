"""Tokenizers to test with: small ones that are trained here, and real ones; transformers' reading of their folders."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from helpers import DEMO, TEST_INPUTS
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama_flex.tokenizer import Tokenizer

transformers.utils.logging.set_verbosity_error()

REAL = {
    "smollm2": DEMO,
    "llama2": TEST_INPUTS / "llama2",
    "llama3": TEST_INPUTS / "llama3",
    "mistral": TEST_INPUTS / "mistral",
}
JSON_NAMES = ("byte_level", "converted", "smollm2", "llama2", "llama3")
MODEL_NAMES = ("tiny_model", "mistral")
LARGE = ("llama2", "llama3", "mistral")  # slow to load, and each like a small one that is trained here
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
# Texts of many scripts, with what is easily lost: white space, control characters, marks, special tokens.
CORPUS = [
    "",
    "Hello, world!",
    " leading space",
    "  two spaces",
    "\u2581underscore\u2581piece",
    "trailing spaces   ",
    "a" + " " * 300 + "b",
    " " * 97,
    "tab\tand\t\ttabs, newline\nnew\n\nlines\r\nCRLF\r",
    "\n",
    "\n\n  \t\n",
    "Cafe\u0301 de\u0301ja\u0300 vu, na\u00efve co\u00f6perate Z\u0335\u0327a\u0320\u0353l\u0322g\u031bo\u0338\u0321",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "نصٌّ حكيمٌ لهُ سِرٌّ قاطِعٌ",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "天地玄黃，宇宙洪荒。我能吞下玻璃而不傷身體",
    "いろはにほへと ちりぬるを カタカナ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻ",
    "ჩვენ ქართველები ვართ ႠႡႢ",
    "மெய்யெழுத்து বাংলা ລາວ မြန်မာ ខ្មែរ",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🧑🏿‍🚀",
    "\x00\x01\x02\x1b[31m\x7f\x85\u2028\u2029",
    "zero\u200bwidth\u200c\u200d\ufeffjoiner\u2060 soft\u00adhyphen no\u00a0break\u3000wide",
    "0123456789 1,234,567.89 ١٢٣ ४५६ ⅷ ½ 10⁻³",
    "def f(x: int) -> int:\n    return x ** 2  # ▁ code\n\tif (a&&b) {}",
    "https://user:pass@example.org:8080/path?q=1&r=%20#frag",
    "<s>bos at the start",
    "in <s> the</s>middle</s> and</s>\n</s></s>",
    " <s> spaces <s>around ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "added é日 and é日本 before [INST] and [INST]</s>",
    "<unk><0x41><pad>[INST] x [/INST]<|endoftext|>",
    "I'm you're WE'LL it's don't 'quoted' \"double\" . , ? !",
    "\ufffd replacement \U0010ffff \ue000",
    "ﬁ ﬀ ① ㎏ Å ſ ﷺ",
]


def reference(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Return transformers' tokenizer for a folder with a tokenizer.json."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def write_folder(folder: Path, config: dict | None, **files: bytes | str) -> Path:
    """Write a tokenizer_config.json, if given, and files into a folder; `__` in a keyword stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def byte_level_json() -> str:
    """Train a tokenizer.json as Llama 3 has it: byte-level BPE, BOS from its own template, special tokens last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["[INST]", tokenizers.AddedToken("é日", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    return tokenizer.to_str()


def sentencepiece_model(**options) -> bytes:
    """Train a tokenizer.model as Llama 2 has it: BPE with byte fallback, no normalisation, white space kept."""
    out = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "minloglevel": 3,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS[1:]), model_writer=out, **settings)
    return out.getvalue()


def vocabulary(model: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges of a tokenizer.model, merges ordered by score, as transformers'
    `SentencePieceExtractor` does. (The converter that from_pretrained uses where protobuf is installed orders them by
    id; with Mistral's file it then splits "    return" differently from sentencepiece.)"""
    from transformers.tokenization_utils_base import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(id): id for id in range(processor.get_piece_size())}
    return vocab, generate_merges(vocab, {piece: processor.get_score(id) for piece, id in vocab.items()})


def sentencepiece_json(model: bytes) -> str:
    """Convert a tokenizer.model to a tokenizer.json as transformers 4 did for Llama 2."""
    vocab, merges = vocabulary(model)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", vocab["<s>"])])
    return tokenizer.to_str()


def make_tokenizer_folders(root: Path) -> dict[str, Path]:
    """Write the small tokenizers into folders; return these folders and those of the real ones, by name."""
    names, model = {"bos_token": "<s>", "eos_token": "</s>"}, sentencepiece_model()
    return {
        "byte_level": write_folder(root / "byte_level", names, tokenizer__json=byte_level_json()),
        "converted": write_folder(root / "converted", names, tokenizer__json=sentencepiece_json(model)),
        "tiny_model": write_folder(root / "tiny_model", None, tokenizer__model=model),
        **REAL,
    }


def cases(*names: str, exhaustive: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test by the names of tokenizers, some of them in exhaustive runs only; real ones are skipped where
    they are absent."""

    def marks(name: str) -> Iterator[pytest.MarkDecorator]:
        if name in REAL:
            yield pytest.mark.weights
            yield pytest.mark.skipif(not REAL[name].is_dir(), reason=f"no {REAL[name]}: see weights/README.md")
        if name in exhaustive:
            yield pytest.mark.exhaustive

    return pytest.mark.parametrize("name", [pytest.param(name, marks=[*marks(name)]) for name in names])


def assert_comes_at_the_end(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Check that no text comes before the end, and then all of it, as where it cannot be known piece by piece."""
    for cut in (0, 1, len(ids) - 1):
        stream = tokenizer.stream(ids[:cut])
        assert {stream.put(id) for id in ids[cut:]} == {""}
        rest = stream.flush()
        assert rest in (tokenizer.decode(ids).removeprefix(tokenizer.decode(ids[:cut])), tokenizer.decode(ids[cut:]))
