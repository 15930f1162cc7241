"""Text to token ids and back: `tokenizer.json` or sentencepiece's `tokenizer.model`, and text streamed exactly."""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from .chat import render_chat

# NormalizerSpec.add_dummy_prefix = false as protobuf bytes; appended to a model they are merged into it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = re.compile(r"\s*")
_CLEANUPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: a printable Latin-1 byte stands for itself, the others, in order, are
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class _Decoding(NamedTuple):
    """How pieces become text, as far as LLaMA's tokenizers go; see `StreamDecoder`."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    separator: str = ""


class Tokenizer:
    """A model's tokenizer, with the ids that transformers 5.23 gives for the same folder (PreTrainedTokenizerFast for
    a tokenizer.json; for a tokenizer.model, sentencepiece itself and the slow LlamaTokenizer's rules around it).

    Attributes:
        vocab_size: number of ids, added tokens included.
        bos_token, eos_token, pad_token, unk_token, and their ids `bos_token_id` ...: None where the folder names none.
        special_ids: what `decode` leaves out with `skip_special_tokens`.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: "_JsonBackend | _SentencePieceBackend",
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        self.vocab_size: int = backend.vocab_size
        self.special_ids: frozenset[int] = backend.special_ids
        self.chat_template: str | None = self._chat_templates.get("default")
        self.bos_token, self.bos_token_id = self._named("bos_token")
        self.eos_token, self.eos_token_id = self._named("eos_token")
        self.pad_token, self.pad_token_id = self._named("pad_token")
        self.unk_token, self.unk_token_id = self._named("unk_token")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Reads a local folder: tokenizer.json, else tokenizer.model, with the JSON files that go with them.

        Raises:
            ValueError: naming the file that is missing or cannot be read as what it should be.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; pass the folder that holds tokenizer.json or tokenizer.model")
        config = _read_json(folder / "tokenizer_config.json") or {}
        if "added_tokens_decoder" not in config:  # older folders spread this over two more files
            config |= _read_json(folder / "special_tokens_map.json") or {}
        special_tokens = _special_tokens(config)
        added = _added_tokens(folder, config, special_tokens)
        backend: _JsonBackend | _SentencePieceBackend
        if (folder / "tokenizer.json").is_file():
            if str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
                for key, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items():
                    if key not in config:
                        special_tokens[key] = token
            backend = _JsonBackend(folder / "tokenizer.json", config, added, special_tokens)
        elif (folder / "tokenizer.model").is_file():
            backend = _SentencePieceBackend(folder / "tokenizer.model", config, added, special_tokens)
        else:
            raise ValueError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch one of them into it")
        return cls(backend, special_tokens, _chat_templates(folder, config))

    def _named(self, key: str) -> tuple[str | None, int | None]:
        token = self._special_tokens.get(key)
        return token, None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in the text count as such. `add_special_tokens`: also what the
        tokenizer puts around a text, usually BOS before it; not wanted after a chat template, which writes its own.

        Raises:
            ValueError: the text has a lone surrogate, which no encoding can hold.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate {text[error.start]!r} at {error.start}; decode it with "
                "errors='replace', or drop it"
            ) from error
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of ids. Raises ValueError for an id that is not in the vocabulary."""
        for id in ids:
            self.token(id)
        return self._backend.decode(ids, skip_special_tokens)

    def token(self, id: int) -> str:
        """The piece that the vocabulary lists, such as "▁Hello", "Ġworld" or "<0xE4>"; ValueError if there is none."""
        piece = self._backend.id_to_token(id) if 0 <= id < 2**32 else None
        if piece is None:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return piece

    def stream(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one, as the continuation of `prompt_ids`, whose text it leaves out.

        Raises:
            ValueError: a tokenizer.json decoded in a way whose text cannot be known piece by piece.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(self.token, self._backend.decoding(), skipped, prompt_ids)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with `add_special_tokens=False`.

        Args:
            add_generation_prompt: end where the assistant's answer begins.
            chat_template: Jinja source, or the name of one of the folder's templates, instead of the folder's own.
            variables: further variables of the template; they go before the special tokens of the same name.
            tools, documents, errors: see `chat.render_chat`.
        """
        name = chat_template
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._chat_templates else "default"
        template = self._chat_templates.get(name, chat_template)
        if template is None:
            named = f" (named ones it has: {', '.join(self._chat_templates)})" if self._chat_templates else ""
            raise ValueError(
                f"this tokenizer's folder has no chat template{named}; pass chat_template=..., or put a "
                "chat_template.jinja there"
            )
        return render_chat(
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **variables},
        )


class _JsonBackend:
    """tokenizer.json through `tokenizers`. The file alone says how text is split and which ids are put around it; as
    in transformers 5, tokenizer_config.json's add_bos_token, add_eos_token and add_prefix_space change nothing."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        added: Mapping[int, tokenizers.AddedToken],
        special_tokens: dict[str, str],
    ) -> None:
        serialized = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(serialized)
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer ({error}); fetch the file again") from error
        if self._tokenizer.padding is not None:
            special_tokens.setdefault("pad_token", self._tokenizer.padding["pad_token"])
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        known = self._tokenizer.get_added_tokens_decoder().values()
        known_exactly = {repr(token) for token in known}  # contents and flags
        new = [token for _, token in sorted(added.items()) if repr(token) not in known_exactly]
        contents = {token.content for token in (*known, *new)}
        for key, content in special_tokens.items():
            if content not in contents:
                new.append(_as_added_token(config.get(key, content), special=True))
        new += [token for token in _extra_special_tokens(config) if token.content not in contents]
        self._tokenizer.add_tokens(new)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.special_ids = frozenset(
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.token_to_id = self._tokenizer.token_to_id
        self.id_to_token = self._tokenizer.id_to_token
        # The cleanup is made for WordPiece and spoils BPE text: transformers, too, ignores it there unless told twice.
        self._clean_up = config.get("clean_up_tokenization_spaces", False) and (
            not isinstance(self._tokenizer.model, tokenizers.models.BPE)
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if self._clean_up:
            for spaced in _CLEANUPS:
                text = text.replace(spaced, spaced.strip(" "))
        return text

    def decoding(self) -> _Decoding:
        if self._clean_up:
            raise ValueError("clean_up_tokenization_spaces=true does not stream; use decode on the whole sequence")
        decoder = self._tokenizer.decoder
        if decoder is None:
            return _Decoding(separator=" ")
        spec = json.loads(decoder.__getstate__())
        steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return _Decoding(byte_level=True)
        decoding, order = _Decoding(), []
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    decoding = decoding._replace(replacements=(*decoding.replacements, (old, new)))
                case {"type": "ByteFallback"}:
                    decoding = decoding._replace(byte_fallback=True)
                case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                    decoding = decoding._replace(strip_left=start)
                case {"type": "Fuse"}:
                    pass
                case _:
                    order.append("unknown")
            order.append(step["type"])
        # Replacing is done piece by piece, then bytes become characters, then the whole text is stripped; in another
        # order the steps mean something else.
        if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{name} " for name in order)):
            raise ValueError(f"text of the decoder {decoder} does not stream; use decode on the whole sequence")
        return decoding


class _SentencePieceBackend:
    """tokenizer.model through sentencepiece, with added tokens cut out of the text before it. As in the slow
    LlamaTokenizer, text after an added token gets a leading space where `legacy` is true, which is its default;
    otherwise only text at the start does."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        added: Mapping[int, tokenizers.AddedToken],
        special_tokens: dict[str, str],
    ) -> None:
        model = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._unprefixed = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(_not_sentencepiece(path)) from error
        size = self._model.get_piece_size() if model else 0
        if size == 0:
            raise ValueError(_not_sentencepiece(path))
        self._legacy = config.get("legacy") in (True, None)
        self._prefix = config.get("add_prefix_space") in (True, None)
        self._pieces: list[str | None] = [self._model.id_to_piece(id) for id in range(size)]

        ids_of_roles = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        ids_of_roles |= {"unk_token": self._model.unk_id(), "pad_token": self._model.pad_id()}
        for key, id in ids_of_roles.items():
            if key not in config and id >= 0:
                special_tokens[key] = self._model.id_to_piece(id)
        self._ids: dict[str, int] = {self._model.id_to_piece(id): id for id in range(size)}
        self._added: dict[str, tokenizers.AddedToken] = {}
        for id, token in sorted(added.items()):
            self._add(token, id)
        controls = [self._model.id_to_piece(id) for id in range(size) if self._model.is_control(id)]
        named = [_as_added_token(config.get(key, token), special=True) for key, token in special_tokens.items()]
        for token in (*named, *_extra_special_tokens(config), *(_as_added_token(c, special=True) for c in controls)):
            if token.content not in self._added:
                self._add(token, self._ids.get(token.content, len(self._pieces)))
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(self._ids[token.content] for token in self._added.values() if token.special)
        longest_first = sorted(self._added, key=len, reverse=True)
        words = {content: rf"(?<!\w){re.escape(content)}(?!\w)" for content in self._added}
        self._pattern = re.compile(
            "|".join(words[text] if self._added[text].single_word else re.escape(text) for text in longest_first)
            or "(?!)"
        )
        self.token_to_id = self._ids.get
        bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
        self._before = [self._ids[bos]] if bos is not None and config.get("add_bos_token", True) else []
        self._after = [self._ids[eos]] if eos is not None and config.get("add_eos_token", False) else []

    def _add(self, token: tokenizers.AddedToken, id: int) -> None:
        self._pieces += [None] * (id + 1 - len(self._pieces))
        self._pieces[id] = token.content
        self._ids[token.content] = id
        self._added[token.content] = token

    def id_to_token(self, id: int) -> str | None:
        return self._pieces[id] if id < len(self._pieces) else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._encode(text))
        if add_special_tokens:
            ids = [*self._before, *ids, *self._after]
        return ids

    def _encode(self, text: str) -> Iterator[int]:
        start = 0
        for match in self._pattern.finditer(text):
            token = self._added[match.group()]
            yield from self._encode_segment(text[start : match.start()], start, strip=token.lstrip)
            yield self._ids[token.content]
            start = _SPACES.match(text, match.end()).end() if token.rstrip else match.end()  # type: ignore[union-attr]
        yield from self._encode_segment(text[start:], start)

    def _encode_segment(self, segment: str, start: int, strip: bool = False) -> list[int]:
        model = self._model if self._prefix and (self._legacy or start == 0) else self._unprefixed
        ids: list[int] = model.encode(segment.rstrip() if strip else segment)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        decoder = StreamDecoder(self._pieces.__getitem__, self.decoding(), skipped)
        return "".join(map(decoder.put, ids)) + decoder.flush()

    def decoding(self) -> _Decoding:
        return _Decoding(replacements=(("▁", " "),), byte_fallback=True, strip_left=int(self._prefix))


def _not_sentencepiece(path: Path) -> str:
    return (
        f"{path} is no sentencepiece model: cut short, a git-lfs pointer, or a tiktoken file as Llama 3's; "
        "fetch it again, or put the model's tokenizer.json beside it"
    )


class StreamDecoder:
    """Text of ids that arrive one by one: what `put` and `flush` return, joined, is exactly what `decode` returns.

    Text comes out as soon as no later id can change it. For byte-level vocabularies only an unfinished character waits
    (three bytes at most). In sentencepiece ones a run of byte pieces such as <0xE4> waits for its end, since one bad
    byte turns the whole run into U+FFFD. The work per id does not grow with the text.
    """

    def __init__(
        self,
        piece_of: Callable[[int], str | None],
        decoding: _Decoding,
        skipped: frozenset[int],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._piece_of = piece_of
        self._decoding = decoding
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._strip_left = decoding.strip_left
        self._separator = ""
        # Decoding the prompt alone shows an unfinished tail in some way: that is printed already, and not due again.
        self._printed = self._waiting = ""
        for id in prompt_ids:
            self._feed(id)
        self._printed = self._utf8.getstate()[0].decode("utf-8", "replace") + _text_of_run(self._run)

    def put(self, token_id: int) -> str:
        """The text that is certain with this id; "" while there is none."""
        return self._without_printed(self._feed(token_id))

    def flush(self) -> str:
        """The rest of the text, once no more ids come."""
        text = self._without_printed(self._utf8.decode(b"", final=True) + self._end_run())
        rest, self._waiting = self._waiting, ""
        return text + rest

    def _feed(self, token_id: int) -> str:
        piece = self._piece_of(token_id)
        assert piece is not None
        if token_id in self._skipped:
            return ""
        if self._decoding.byte_level:
            return self._utf8.decode(_bytes_of(piece))
        for old, new in self._decoding.replacements:
            piece = piece.replace(old, new)
        if self._decoding.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            self._run.append(int(match[1], 16))
            return ""
        text = self._end_run() + self._separator + piece
        self._separator = self._decoding.separator
        return self._stripped(text)

    def _end_run(self) -> str:
        text = _text_of_run(self._run)
        self._run.clear()
        return text

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
            else:
                self._strip_left -= 1
                text = text[1:]
        return text

    def _without_printed(self, text: str) -> str:
        if not self._printed:
            return text
        self._waiting += text
        if self._printed.startswith(self._waiting) and self._printed != self._waiting:
            return ""
        # A character that the prompt's end cut in two: what stood there for it is not a prefix of the text any more.
        text = self._waiting.removeprefix(self._printed)
        self._printed = self._waiting = ""
        return text


def _bytes_of(piece: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[character] for character in piece])
    except KeyError:  # an added token, written as it is
        return piece.encode("utf-8")


def _text_of_run(run: bytearray) -> str:
    """As `tokenizers` decodes byte pieces: a run that is not UTF-8 throughout becomes one U+FFFD per byte."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


class StopStrings:
    """Finds stop strings in streamed text, however it is cut. Of several, the one that is complete first counts.

    Args:
        stops: non-empty strings; none at all is fine.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise ValueError(f"stop strings come as a list: [{stops!r}]")
        if "" in stops:
            raise ValueError("a stop string may not be empty: it would stop before the first token")
        self._stops = tuple(stops)
        self._held = ""
        self._found = False

    def put(self, text: str) -> tuple[str, bool]:
        """The text that is safe to print, and whether a stop string was found: the text ends before it, then and for
        good. What may be the beginning of a stop string is held back."""
        if self._found:
            return "", True
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._found, self._held = True, ""
            return text[: min(ends)[1]], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of the text that begin the stop string, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}; fetch the file again")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: what the configuration names `..._token`, the standard names first."""
    named = {**dict.fromkeys(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), **config}
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    contents = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in named.items()
        if key.endswith("_token")
    }
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _extra_special_tokens(config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [] if isinstance(extra, dict) else [_as_added_token(token, special=True) for token in extra]


def _as_added_token(value: str | Mapping[str, Any], *, special: bool) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=special, normalized=not special)
    flags = {key: value[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
    return tokenizers.AddedToken(value["content"], special=special or value.get("special", False), **flags)


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> dict[int, tokenizers.AddedToken]:
    """By id: from tokenizer_config.json, or from added_tokens.json, which older folders have in its place."""
    if "added_tokens_decoder" in config:
        return {int(id): _as_added_token(t, special=False) for id, t in config["added_tokens_decoder"].items()}
    special = {*special_tokens.values(), *(token.content for token in _extra_special_tokens(config))}
    contents = _read_json(folder / "added_tokens.json") or {}
    return {id: _as_added_token(content, special=content in special) for content, id in contents.items()}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name. Files go before tokenizer_config.json, and that before chat_template.json, which processors write."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        return {name: path.read_text("utf-8") for name, path in paths.items()}
    template = config.get("chat_template")
    if template is None:
        template = (_read_json(folder / "chat_template.json") or {}).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template if isinstance(template, dict) else {} if template is None else {"default": template}
