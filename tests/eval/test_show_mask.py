"""The tool that draws masks: its text letter by letter, its pictures by their pixels, its weights as transformers'."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import few
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llama_flex import Llama, LlamaConfig, Mask, Tokenizer, Tokens, fuse, masks
from llama_flex.eval import show_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two layers and four heads, with a byte-level tokenizer that has no merges."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Llama(LlamaConfig(vocab_size=300, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {letter: id for id, letter in enumerate(sorted(byte_level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def shown(capsys, *arguments: str) -> str:
    """Run the command, which must succeed, and return what it prints."""
    show_mask.main(list(arguments))
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_causal_in_the_terminal(capsys):
    assert shown(capsys, "--length", "4") == (
        "causal()\n"
        "# 0 1 2 3\n"
        "0 ■ · · ·\n"
        "1 ■ ■ · ·\n"
        "2 ■ ■ ■ ·\n"
        "3 ■ ■ ■ ■\n"
        "■ visible   · masked\n"
        "0 full, 1 partial, 0 empty blocks: 100.0% computed\n"
    )


def test_fused_prompts_of_a_model_in_the_terminal(capsys, folder):
    arguments = ("--model", str(folder), "--fuse", "--fuse-prefix", "P", "--text", "ab", "--text", " c")
    assert shown(capsys, *arguments, "--fuse-suffix", "\n") == (
        "fused()\n"
        "# seg token 0 1 2 3 4 5\n"
        "0   0 P     ■ · · · · ·\n"
        "1   1 a     ■ ■ · · · ·\n"
        "2   1 b     ■ ■ ■ · · ·\n"
        "3   2 ␣     ■ · · ■ · ·\n"
        "4   2 c     ■ · · ■ ■ ·\n"
        "5  -1 ↵     ■ ■ ■ ■ ■ ■\n"
        "■ visible   · masked\n"
        "0 full, 1 partial, 0 empty blocks: 100.0% computed\n"
    )


def test_blocks_of_a_long_sequence_in_the_terminal(capsys):
    assert shown(capsys, "--segments", "0*256,1*44", "--mask", "causal() & document()") == (
        "(causal() & document())\n"
        "  0 ▒··\n"
        "128 █▒·\n"
        "256 ··▒\n"
        "blocks of 128 x 128: █ full   ▒ partial   · empty\n"
        "1 full, 3 partial, 5 empty blocks: 44.4% computed\n"
    )


def test_long_sequences_have_numbers_of_two_digits_that_line_up(capsys):
    lines = shown(capsys, "--length", "11").splitlines()
    assert lines[1] == " " * 22 + " 1"
    assert lines[2] == " # 0 1 2 3 4 5 6 7 8 9 0"
    assert lines[-3] == "10" + " ■" * 11


def test_texts_of_a_model_are_segments(capsys, folder):
    lines = shown(capsys, "--model", str(folder), "--text", "ab", "--text", "c", "--mask", "document()").splitlines()
    assert lines[2:5] == ["0   0 a     ■ ■ ·", "1   0 b     ■ ■ ·", "2   1 c     · · ■"]


def test_a_text_begins_with_bos_and_what_follows_a_prefix_does_not(capsys, folder, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fused = ("--model", str(tmp_path), "--text", "a", "--text", "b", "--fuse", "--fuse-suffix", "c")
    for options, expected in (((), "<s> a <s> b c"), (("--fuse-prefix", "p"), "<s> p a b c")):
        lines = shown(capsys, *fused, *options).splitlines()[2:-2]
        assert [line.split()[2] for line in lines] == expected.split()


def test_parallel_positions_reach_the_mask(capsys, folder):
    arguments = ("--model", str(folder), "--fuse", "--text", "ab", "--text", "c", "--mask")
    for kind, expected in (("continue", ["■ · ·", "· ■ ·", "· · ■"]), ("parallel", ["■ · ■", "· ■ ·", "■ · ■"])):
        lines = shown(capsys, *arguments, "lambda q, kv: q.position == kv.position", "--fuse-positions", kind)
        assert [line[-5:] for line in lines.splitlines()[2:5]] == expected


def test_colours_are_for_terminals_that_want_them(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(capsys, "--segments", "0,1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(capsys, "--segments", "0,1")
    assert all(show_mask._ink(segment).format("■") in coloured for segment in (0, 1))


def test_labels_neither_move_the_cells_nor_reach_the_terminal_raw():
    lines = show_mask.text(masks.causal(), Tokens.arriving(3), ["日本", "\x1b[2J", "x" * 40]).splitlines()
    assert lines[2:5] == [
        "0 日本             ■ · ·",
        "1 \\x1b[2J          ■ ■ ·",
        "2 xxxxxxxxxxxxxxx… ■ ■ ■",
    ]


def test_a_head_is_shown_as_that_head_sees(capsys):
    widths, tokens = torch.tensor([1, 3, 200]), Tokens.arriving(300)
    for head, width in enumerate(widths.tolist()):
        mask = Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < widths[q.head]), "by_head")
        cells, kinds, sparsity = show_mask.look(mask, tokens, head)
        assert cells.equal(masks.sliding_window(width).dense(tokens, tokens, 1)[0, 0])
        counts = [int((kinds == kind).sum()) for kind in (show_mask.FULL, show_mask.PARTIAL, show_mask.EMPTY)]
        assert counts == list(sparsity) == list(masks.sliding_window(width).sparsity(tokens))
    last = shown(capsys, "--length", "2", "--head", "1", "--mask", "lambda q, kv: kv.head + kv.index == q.head")
    assert last.splitlines()[2:4] == ["0 ■ ·", "1 ■ ·"]
    assert last.startswith("lambda q, kv: kv.head + kv.index == q.head: head 1\n")


def test_masks_from_a_file(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llama_flex import Mask\n"
        "ready = Mask(lambda q, kv: kv.index == 0, 'first')\n"
        "def predicate(q, kv):\n    return kv.index > q.index\n"
        "def mod(b, h, q_idx, kv_idx):\n    return q_idx == kv_idx\n"
    )
    for name, options, rows in (
        ("first", ["--mask", f"{file}:ready"], ["0 ■ ·", "1 ■ ·"]),
        ("predicate", ["--mask", f"{file}:predicate"], ["0 · ■", "1 · ·"]),
        ("mod", ["--mask", f"{file}:mod", "--mask-mod"], ["0 ■ ·", "1 · ■"]),
    ):
        lines = shown(capsys, "--length", "2", *options).splitlines()
        assert [lines[0], *lines[2:4]] == [name, *rows]


def rendered(figure) -> Callable[[float, float], str]:
    """Draw a figure; return a function that finds the colour at (query, key)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]

    def at(query: float, key: float) -> str:
        x, y = figure.axes[0].transData.transform((key, query))
        return bytes(pixels[len(pixels) - 1 - int(y), int(x)]).hex()

    return at


def near(found: str, expected: str) -> bool:
    """Tell whether two colours are the same up to rounding."""
    return all(abs(a - b) <= 2 for a, b in zip(bytes.fromhex(found), bytes.fromhex(expected), strict=True))


def test_a_picture_tells_full_partial_and_empty_blocks_and_segments_apart():
    tokens = Tokens.arriving(300, segments=(torch.arange(300) >= 200).int())
    at = rendered(show_mask.draw(masks.causal(), tokens))
    zero, one = show_mask.COLOURS[:2]
    darker = bytes(round(show_mask.DARK * c) for c in bytes.fromhex(zero)).hex()
    assert near(at(190, 60), darker)  # a full block
    assert near(at(100, 30), zero)  # visible in a partial block
    assert near(at(30, 100), show_mask.MASKED_COLOUR)  # masked in a partial block
    assert near(at(60, 190), show_mask.EMPTY_COLOUR)
    assert near(at(290, 270), one)  # the colour is the key's
    assert [near(at(*strip), one) for strip in ((250, -7), (-7, 250))] == [True, True]


def test_a_picture_of_few_tokens_names_them_and_the_mask():
    tokens = Tokens.arriving(5, segments=torch.tensor([0, 1, 1, 2, -1]))
    labels = ["$a$", "b", "c", "d", "\t"]
    figure = show_mask.draw(masks.fused(), tokens, labels)
    at, axes = rendered(figure), figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["$a$", "b", "c", "d", "\\t"]
        assert not any(label.get_parse_math() for label in axis.get_ticklabels())  # "$a$" is no formula
    assert figure.get_suptitle() == "fused()"
    names = [entry.get_text() for entry in axes.get_legend().get_texts()]
    assert names == ["visible", "masked", "segment 0", "segment 1", "segment 2", "generated (segment -1)"]
    colours = {0: show_mask.COLOURS[0], 1: show_mask.COLOURS[1], 4: show_mask.GENERATED_COLOUR}
    assert [near(at(4, key), colour) for key, colour in colours.items()] == [True] * 3
    assert near(at(3, 1), show_mask.MASKED_COLOUR)


def test_a_picture_of_weights_is_darker_where_they_are_larger():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    at = rendered(show_mask.draw(masks.causal(), Tokens.arriving(2), weights=weights))
    light, middle, dark = (sum(bytes.fromhex(at(*cell))) for cell in ((1, 0), (1, 1), (0, 0)))
    assert light > middle + 50 > dark + 100
    assert near(at(0, 1), show_mask.MASKED_COLOUR)


def test_the_command_writes_a_picture(capsys, tmp_path):
    file = tmp_path / "mask.png"
    out = shown(capsys, "--length", "300", "--output", str(file))
    assert out == f"3 full, 3 partial, 3 empty blocks: 66.7% computed\n{file} is written\n"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", few(["gqa"], ["head_dim", "biases"]))
def test_weights_are_those_of_transformers(tiny_pair, name):
    reference, model = tiny_pair(name)
    ids = torch.randint(3, 500, (1, 23), generator=torch.Generator().manual_seed(1))
    plain = Tokens.arriving(23)
    parallel = fuse([[0] * 6, [0] * 8], prefix=[0] * 5, suffix=[0] * 4, positions="parallel")
    fused = Tokens(plain.index, torch.tensor([parallel.positions]), torch.tensor([parallel.segments]))
    for mask, tokens in ((masks.sliding_window(5) | masks.sink(2), plain), (masks.fused(), fused)):
        hidden = ~mask.dense(tokens, tokens, 1)
        given = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.no_grad():
            known = {"position_ids": tokens.position.long(), "output_attentions": True}
            expected = reference(ids, attention_mask=given, **known).attentions
            exact = copy.deepcopy(reference).double()(ids, attention_mask=given.double(), **known)
        # Twice what the reference itself differs from float64 by, over all layers and heads, is allowed.
        spread = max(float((a - b).abs().max()) for a, b in zip(expected, exact.attentions, strict=True))
        for layer in range(2):
            for head in range(model.config.num_attention_heads):
                found = show_mask.attention_weights(model, ids[0].tolist(), tokens, mask, layer, head)
                torch.testing.assert_close(found, expected[layer][0, head], rtol=0, atol=2 * spread)


def test_weights_in_the_terminal(capsys, folder):
    arguments = ("--model", str(folder), "--text", "abcdef", "--mask", "sliding_window(4)", "--weights", "1:2")
    lines = shown(capsys, *arguments).splitlines()
    model, ids = Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder).encode("abcdef")
    weights = show_mask.attention_weights(model, ids, Tokens.arriving(6), masks.sliding_window(4), 1, 2)
    sign = [" ░▒▓█"[int((w >= torch.tensor(show_mask.SHADES)).sum())] for w in weights.flatten()]
    expected = ["".join(sign[6 * q + k] if q - 3 <= k <= q else "·" for k in range(6)) for q in range(6)]
    assert lines[0] == "sliding_window(4): weights of layer 1, head 2"
    assert [line[8:].ljust(11)[::2] for line in lines[2:8]] == expected
    assert len(set("".join(expected))) > 3
    assert lines[8] == "weights: █ from 50%   ▓ from 20%   ▒ from 5%   ░ from 1%   · masked"


def test_a_weight_at_the_edge_of_two_shades_has_the_darker():
    assert "0 █ ·\n1 █ ▓\n" in show_mask.text(
        masks.causal(), Tokens.arriving(2), weights=torch.tensor([[1, 0], [0.5, 0.2]])
    )


def refused(capsys, *arguments: str) -> str:
    """Run a command that must fail with one line of error, and return that line."""
    with pytest.raises(SystemExit, match=r"^2$"):
        show_mask.main(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "one of the arguments --length --segments --model is required"),
        ("--length 0", "at least one token"),
        ("--segments 0,x", "'0,x'"),
        ("--length 3 --mask causal(", "was never closed"),
        ("--length 3 --mask sliding_window(0)", "needs a number of at least 1"),
        ("--length 3 --mask sliding_window", "takes 1 positional argument"),
        ("--length 3 --mask causal() --mask-mod", "is not callable"),
        ("--length 3 --mask Mask(lambda q,kv:q.index)", "returned torch.int32; a predicate returns booleans"),
        ("--length 3 --mask lambda q,kv:q.nothing", "the mask fails: it raises AttributeError"),
        ("--length 3 --mask lambda q,kv:torch.ones(2)[q.head]>0 --head 2", "index 2 into a tensor of 2"),
        ("--length 3 --mask nowhere.py:mask", "no such Python file"),
        ("--length 3 --head -1", "head 0 or more"),
        ("--length 3 --output nowhere/mask.png", "No such file or directory"),
        ("--length 3 --output /tmp/mask.txt", "Format 'txt' is not supported"),
        ("--length 2049 --output /tmp/mask.png", "2049 tokens are too many"),
        ("--length 3 --text a", "--text, --fuse and --weights need --model"),
        ("--model MODEL --text a --fuse-prefix a", "need --fuse"),
        ("--model MODEL", "--model needs --text"),
        ("--model MODEL --text= --fuse", "no empty one"),
        ("--model MODEL --text a --length 3", "not allowed with argument --model"),
        ("--model MODEL --text a --weights 0", "--weights: invalid"),
        ("--model MODEL --text a --weights 0:0 --head 1", "not allowed with argument"),
        ("--model MODEL --text a --weights 2:0", "the model has layers 0 to 1, not [2]"),
        ("--model MODEL --text a --weights 0:4", "the model has heads 0 to 3, not [4]"),
        ("--model MODEL --text a --weights 0:0 --mask lambda q,kv:q.nothing", "AttributeError"),
        (
            "--model MODEL --text a --weights 0:0 --mask lambda q,kv:torch.ones(2)[q.head]>0",
            "index 2 into a tensor of 2",
        ),
        ("--model ./nowhere --text a", "no such folder"),
    ],
)
def test_errors_are_one_line(capsys, folder, arguments, message):
    words = [str(folder) if word == "MODEL" else word for word in arguments.replace("lambda q", "lambda_q").split()]
    assert message in refused(capsys, *(word.replace("lambda_", "lambda ") for word in words))


def test_without_matplotlib_a_picture_is_refused_and_text_is_not(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'llama_flex[tools]'" in refused(capsys, "--length", "3", "--output", "mask.png")
    assert shown(capsys, "--length", "3").startswith("causal()")


def test_impossible_drawings_are_refused():
    for function in (show_mask.text, show_mask.draw):
        with pytest.raises(ValueError, match="at least one token"):
            function(masks.causal(), Tokens.arriving(3, batch=2))
        with pytest.raises(ValueError, match="1 labels for 3 tokens"):
            function(masks.causal(), Tokens.arriving(3), ["a"])
        with pytest.raises(ValueError, match=r"weights must be \[3, 3\], found \[2, 3\]"):
            function(masks.causal(), Tokens.arriving(3), weights=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="65 tokens are too many"):
        show_mask.text(masks.causal(), Tokens.arriving(65), weights=torch.zeros(65, 65))
