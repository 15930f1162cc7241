"""The two tokenizer backends: `tokenizer.json` through tokenizers, `tokenizer.model` through sentencepiece."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from ..checkpoint.files import FolderError, names_in, read, what_it_is
from . import tokenizer_files, tokenizer_json
from .detokenizer import Decoding, StreamDecoder
from .tokenizer_files import (
    MAX_SENTENCEPIECE_BYTES,
    MAX_TOKENIZER_BYTES,
    TokenizerError,
    as_added_token,
    extra_special_tokens,
    why,
)
from .tokenizer_json import MALFORMED, MAX_PIECES

MAX_ADDED_CHARACTERS = 2**18  # of the tokens added to a tokenizer.model; one regular expression finds them

# NormalizerSpec.add_dummy_prefix = false as protobuf bytes; appended to a model they are merged into it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_SPACES = re.compile(r"\s*")
_AGAIN = "; if it is damaged, fetch it again"
_CLEANUPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def load_backend(folder: Path) -> tuple[JsonBackend | SentencePieceBackend, dict[str, str], dict[str, str]]:
    """Load the tokenizer of a folder; return its backend, and its special tokens and chat templates by name.

    Raises FolderError naming the file that is missing or malformed.
    """
    config = tokenizer_files.read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older folders spread this over two more files
        config |= tokenizer_files.read_if_there(folder / "special_tokens_map.json")
    backend: JsonBackend | SentencePieceBackend
    try:
        special_tokens = tokenizer_files.special_tokens(config)
        added = tokenizer_files.added_tokens(folder, config, special_tokens)
        templates = tokenizer_files.chat_templates(folder, config)
        if os.path.lexists(folder / "tokenizer.json"):
            if str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
                for key, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items():
                    if key not in config:
                        special_tokens[key] = token
            backend = JsonBackend(folder / "tokenizer.json", config, added, special_tokens)
        elif os.path.lexists(folder / "tokenizer.model"):
            backend = SentencePieceBackend(folder / "tokenizer.model", config, added, special_tokens)
        else:
            way = what_it_is(names_in(folder)) or "; fetch one of them into it"
            raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model{way}")
    except FolderError:
        raise
    except MALFORMED as error:  # JSON, but not of the expected form
        raise TokenizerError(f"{folder}: malformed tokenizer_config.json or its companions ({why(error)})") from error
    return backend, special_tokens, templates


class JsonBackend:
    """A tokenizer.json through `tokenizers`. The file alone determines how text is split and which ids go around it; as
    in transformers 5, tokenizer_config.json's add_bos_token, add_eos_token and add_prefix_space have no effect."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        added: Mapping[int, tokenizers.AddedToken],
        special_tokens: dict[str, str],
    ) -> None:
        self._path = path
        serialized = read(path, MAX_TOKENIZER_BYTES)
        extra = extra_special_tokens(config)
        try:
            tokenizer_json.check(
                serialized, [*special_tokens.values(), *(t.content for t in (*added.values(), *extra))]
            )
        except MALFORMED as error:
            raise TokenizerError(f"{path} cannot be read as a tokenizer ({why(error)}){_AGAIN}") from error
        with self._native():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(serialized)
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
                new.append(as_added_token(config.get(key, content), special=True))
        new += [token for token in extra if token.content not in contents]
        with self._native():
            self._tokenizer.add_tokens(new)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.special_ids = frozenset(
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        if unknown := [id for id in self.encode("", True) if self._tokenizer.id_to_token(id) is None]:
            raise TokenizerError(f"{path} adds token id {unknown[0]}, which is not in its vocabulary, around texts")
        self.token_to_id = self._tokenizer.token_to_id
        self.id_to_token = self._tokenizer.id_to_token
        # The cleanup is meant for WordPiece and spoils BPE text: transformers, too, skips it there unless told twice.
        self._clean_up = config.get("clean_up_tokenization_spaces", False) and (
            not isinstance(self._tokenizer.model, tokenizers.models.BPE)
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        )

    @contextmanager
    def _native(self) -> Iterator[None]:
        """Turn errors of `tokenizers`, panics included, into a TokenizerError that names the file."""
        try:
            yield
        except BaseException as error:  # tokenizers raises nothing more precise, and a panic is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"{self._path} cannot be read as a tokenizer ({error}){_AGAIN}") from error

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._native():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if all(skip_special_tokens and id in self.special_ids for id in ids):
            return ""  # some decoders panic if there are no pieces
        with self._native():
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if self._clean_up:
            for spaced in _CLEANUPS:
                text = text.replace(spaced, spaced.strip(" "))
        return text

    def decoding(self) -> Decoding | None:
        """Return the steps from pieces to text, None if text cannot be decoded piece by piece."""
        if self._clean_up:
            return None
        decoder = self._tokenizer.decoder
        if decoder is None:
            return Decoding(separator=" ")
        spec = json.loads(decoder.__getstate__())
        steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return Decoding(byte_level=True)
        decoding, order = Decoding(), []
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
        # Replacements are made piece by piece, then bytes become characters, then the whole text is stripped; in
        # another order, the steps would mean something else.
        if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{name} " for name in order)):
            return None
        return decoding


class SentencePieceBackend:
    """A tokenizer.model through sentencepiece, with added tokens cut out of the text first. As in the slow
    LlamaTokenizer, text after an added token gets a leading space if `legacy` is true, the default; otherwise only text
    at the start does."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        added: Mapping[int, tokenizers.AddedToken],
        special_tokens: dict[str, str],
    ) -> None:
        model = read(path, MAX_SENTENCEPIECE_BYTES)
        if model.count(b"\n") > 2 * MAX_PIECES:  # each piece begins with two of them
            raise TokenizerError(f"{path} has more than {MAX_PIECES:,} pieces")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._unprefixed = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
            size = self._model.get_piece_size() if model else 0
            self._pieces: list[str | None] = [self._model.id_to_piece(id) for id in range(size)]
        except (RuntimeError, UnicodeError) as error:
            raise TokenizerError(_not_sentencepiece(path)) from error
        if size == 0:
            raise TokenizerError(_not_sentencepiece(path))
        self._legacy = config.get("legacy") in (True, None)
        self._prefix = config.get("add_prefix_space") in (True, None)

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
        named = [as_added_token(config.get(key, token), special=True) for key, token in special_tokens.items()]
        for token in (*named, *extra_special_tokens(config), *(as_added_token(c, special=True) for c in controls)):
            if token.content not in self._added:
                self._add(token, self._ids.get(token.content, len(self._pieces)))
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(self._ids[token.content] for token in self._added.values() if token.special)
        if sum(map(len, self._added)) > MAX_ADDED_CHARACTERS:
            raise TokenizerError(f"{path.parent}: more than {MAX_ADDED_CHARACTERS:,} characters of added tokens")
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

    def decoding(self) -> Decoding:
        return Decoding(replacements=(("▁", " "),), byte_fallback=True, strip_left=int(self._prefix))


def _not_sentencepiece(path: Path) -> str:
    return (
        f"{path} is not a sentencepiece model: cut short, a Git LFS pointer, or a tiktoken file such as Llama 3's; "
        "fetch it again, or put the model's tokenizer.json beside it"
    )
