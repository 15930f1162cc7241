"""Text to token ids and back: `tokenizer.json` or sentencepiece's `tokenizer.model`, and text streamed exactly."""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from . import hub, tokenizer_json
from .chat import render_chat
from .config import MAX_JSON_BYTES, read_json
from .files import FolderError, make_folder, names_in, read, replace, what_it_is
from .streaming import Decoding, StreamDecoder, WholeDecoder
from .tokenizer_json import MALFORMED, MAX_PIECES

# Bounds of memory and time while reading; those of what is in a tokenizer.json are beside its inspection.
MAX_TOKENIZER_BYTES = 48 * 2**20
MAX_SENTENCEPIECE_BYTES = 8 * 2**20
_LARGEST = {"tokenizer.json": MAX_TOKENIZER_BYTES, "tokenizer.model": MAX_SENTENCEPIECE_BYTES}
MAX_ADDED_CHARACTERS = 2**18  # of the added tokens around a tokenizer.model; one regular expression finds them
MAX_IDS = 2**22

# NormalizerSpec.add_dummy_prefix = false as protobuf bytes; appended to a model they are merged into it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_SPACES = re.compile(r"\s*")
_AGAIN = "; if it is damaged, fetch it again"
_CLEANUPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TokenizerError(FolderError):
    """A folder whose tokenizer is absent, damaged, or not of the form that such files have."""


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
        folder: Path,
        files: Mapping[str, tuple[int, ...]],
    ) -> None:
        """folder: where it was loaded from; files: the tokenizer's files there, each with its `_stamp`."""
        self._backend = backend
        self._folder, self._files = folder, dict(files)
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
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "Tokenizer":
        """Reads a local folder or hub repository: tokenizer.json, else tokenizer.model, and the JSON files with them.

        Raises:
            ValueError: naming the file that is missing or cannot be read as what it should be.
        """
        folder = hub.resolve(path_or_repo, hub.TOKENIZER_FILES, revision=revision, token=token)
        files = {str(path.relative_to(folder)): _stamp(path) for path in _files_in(folder)}
        config = _read_if_there(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # older folders spread this over two more files
            config |= _read_if_there(folder / "special_tokens_map.json")
        backend: _JsonBackend | _SentencePieceBackend
        try:
            special_tokens = _special_tokens(config)
            added = _added_tokens(folder, config, special_tokens)
            templates = _chat_templates(folder, config)
            if os.path.lexists(folder / "tokenizer.json"):
                if str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
                    for key, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items():
                        if key not in config:
                            special_tokens[key] = token
                backend = _JsonBackend(folder / "tokenizer.json", config, added, special_tokens)
            elif os.path.lexists(folder / "tokenizer.model"):
                backend = _SentencePieceBackend(folder / "tokenizer.model", config, added, special_tokens)
            else:
                way = what_it_is(names_in(folder)) or "; fetch one of them into it"
                raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model{way}")
        except FolderError:
            raise
        except MALFORMED as error:  # JSON, but not of the form these files have
            raise TokenizerError(
                f"{folder}: malformed tokenizer_config.json or its companions ({_why(error)})"
            ) from error
        return cls(backend, special_tokens, templates, folder.absolute(), files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files that this tokenizer was loaded from, unchanged, so that the folder loads as it here and in
        transformers; those of another tokenizer there are removed. Beside `Llama.save_pretrained` it makes a folder
        complete. Raises FolderError, and writes nothing, where one of the files is gone or cannot be read; OSError,
        where a folder has the name of one."""
        folder = Path(folder)
        for name, stamp in self._files.items():
            if (now := _stamp(self._folder / name)) != stamp:
                what = "changed since this tokenizer was loaded; load it again"
                gone = "gone since this tokenizer was loaded; put it back, or load the tokenizer from elsewhere"
                raise TokenizerError(f"{self._folder / name}: {what if now else gone}")
        if folder.is_dir() and folder.samefile(self._folder):
            return
        contents = {
            name: read(self._folder / name, _LARGEST.get(name, MAX_JSON_BYTES), self._folder) for name in self._files
        }
        make_folder(folder, (*hub.TOKENIZER_FILES, *contents))
        for path in {(folder / name).parent for name in hub.TOKENIZER_FILES} - {folder}:
            if path.is_symlink():  # nothing out of the folder is written or removed
                path.unlink()
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            replace(folder / name, content)
        for path in _files_in(folder):
            if str(path.relative_to(folder)) not in contents:
                path.unlink()

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
        piece = self._backend.id_to_token(id) if id in self else None
        if piece is None:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return piece

    def __contains__(self, id: int) -> bool:
        """Whether the vocabulary has a piece for an id."""
        return 0 <= id < 2**32 and self._backend.id_to_token(id) is not None

    def stream(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder | WholeDecoder:
        """A decoder for ids that arrive one by one, as the continuation of `prompt_ids`, whose text it leaves out.

        Where a tokenizer.json decodes in a way whose text cannot be known piece by piece, all of it comes at the end.
        """
        if (decoding := self._backend.decoding()) is None:
            return WholeDecoder(functools.partial(self.decode, skip_special_tokens=skip_special_tokens), prompt_ids)
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(self.token, decoding, skipped, prompt_ids)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with `add_special_tokens=False`.

        Args:
            add_generation_prompt: end where the assistant's answer begins.
            continue_final_message: end within the last message, which is to be continued; see `chat.render_chat`.
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
            continue_final_message=continue_final_message,
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
        self._path = path
        serialized = read(path, MAX_TOKENIZER_BYTES)
        extra = _extra_special_tokens(config)
        try:
            tokenizer_json.check(
                serialized, [*special_tokens.values(), *(t.content for t in (*added.values(), *extra))]
            )
        except MALFORMED as error:
            raise TokenizerError(f"{path} cannot be read as a tokenizer ({_why(error)}){_AGAIN}") from error
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
                new.append(_as_added_token(config.get(key, content), special=True))
        new += [token for token in extra if token.content not in contents]
        with self._native():
            self._tokenizer.add_tokens(new)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.special_ids = frozenset(
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        if unknown := [id for id in self.encode("", True) if self._tokenizer.id_to_token(id) is None]:
            raise TokenizerError(f"{path} puts token id {unknown[0]} around texts, which is not in its vocabulary")
        self.token_to_id = self._tokenizer.token_to_id
        self.id_to_token = self._tokenizer.id_to_token
        # The cleanup is made for WordPiece and spoils BPE text: transformers, too, ignores it there unless told twice.
        self._clean_up = config.get("clean_up_tokenization_spaces", False) and (
            not isinstance(self._tokenizer.model, tokenizers.models.BPE)
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        )

    @contextmanager
    def _native(self) -> Iterator[None]:
        """What `tokenizers` raises within, panics included, becomes a TokenizerError that names the file."""
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
            return ""  # of no pieces some decoders make a panic
        with self._native():
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if self._clean_up:
            for spaced in _CLEANUPS:
                text = text.replace(spaced, spaced.strip(" "))
        return text

    def decoding(self) -> Decoding | None:
        """How pieces become text; None if that is not known piece by piece."""
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
        # Replacing is done piece by piece, then bytes become characters, then the whole text is stripped; in another
        # order the steps mean something else.
        if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{name} " for name in order)):
            return None
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
        named = [_as_added_token(config.get(key, token), special=True) for key, token in special_tokens.items()]
        for token in (*named, *_extra_special_tokens(config), *(_as_added_token(c, special=True) for c in controls)):
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


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _not_sentencepiece(path: Path) -> str:
    return (
        f"{path} is no sentencepiece model: cut short, a git-lfs pointer, or a tiktoken file as Llama 3's; "
        "fetch it again, or put the model's tokenizer.json beside it"
    )


def _files_in(folder: Path) -> list[Path]:
    """The files of a tokenizer that are in a folder, links among them."""
    paths = {path for name in hub.TOKENIZER_FILES for path in (folder / name, *folder.glob(name))}
    return sorted(path for path in paths if path.is_symlink() or (path.exists() and not path.is_dir()))


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew; () if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


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
        return {_id(int(id)): _as_added_token(t, special=False) for id, t in config["added_tokens_decoder"].items()}
    special = {*special_tokens.values(), *(token.content for token in _extra_special_tokens(config))}
    contents = _read_if_there(folder / "added_tokens.json")
    return {_id(id): _as_added_token(content, special=content in special) for content, id in contents.items()}


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_IDS:
        raise ValueError(f"token id {value!r:.40} of an added token")
    return value


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name. Files go before tokenizer_config.json, and that before chat_template.json, which processors write."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if os.path.lexists(folder / "chat_template.jinja"):
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        return {name: _text(path, folder) for name, path in paths.items()}
    template = config.get("chat_template")
    if template is None:
        template = _read_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    named = template if isinstance(template, dict) else {} if template is None else {"default": template}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TypeError("a chat template, or its name, is no text")
    return named


def _text(path: Path, folder: Path) -> str:
    try:
        return read(path, MAX_JSON_BYTES, folder).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text ({error})") from None
