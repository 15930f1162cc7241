"""Text to token ids and back, whole or streamed, with a `tokenizer.json` or sentencepiece's `tokenizer.model`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import hub
from .text.backends import JsonBackend, SentencePieceBackend, load_backend
from .text.chat import render_chat
from .text.detokenizer import StreamDecoder, WholeDecoder, bytes_of_piece
from .text.tokenizer_files import copy_files, find_files


class Tokenizer:
    """A model's tokenizer, with the ids that transformers 5.23 gives for the same folder (PreTrainedTokenizerFast for
    a tokenizer.json; sentencepiece itself and the slow LlamaTokenizer's rules around it for a tokenizer.model).

    Attributes:
        vocab_size: number of ids, added tokens included.
        bos_token, eos_token, pad_token, unk_token, and their ids `bos_token_id` ...: None if the folder names none.
        special_ids: the ids that `decode` leaves out with `skip_special_tokens`.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: JsonBackend | SentencePieceBackend,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        folder: Path,
        files: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Wrap a backend. folder: the folder it was loaded from; files: the tokenizer's files there, each with its
        stamp, see `find_files`."""
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
    ) -> Tokenizer:
        """Load a local folder or hub repository: tokenizer.json, else tokenizer.model, and the JSON files beside it.

        Raises ValueError naming the file that is missing or malformed.
        """
        folder = hub.resolve(path_or_repo, hub.TOKENIZER_FILES, revision=revision, token=token)
        files = find_files(folder)
        backend, special_tokens, templates = load_backend(folder)
        return cls(backend, special_tokens, templates, folder.absolute(), files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files that this tokenizer was loaded from, unchanged, and remove those of another tokenizer there.

        The folder then loads as this tokenizer, here and in transformers; `Llama.save_pretrained` adds the model.
        Raises FolderError, and writes nothing, if a file is gone or cannot be read; OSError if a folder has its name.
        """
        copy_files(self._files, self._folder, Path(folder))

    def _named(self, key: str) -> tuple[str | None, int | None]:
        token = self._special_tokens.get(key)
        return token, None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text; special tokens written in the text are recognised.

        add_special_tokens: add the ids that the tokenizer puts around a text, usually BOS before it; turn it off after
        a chat template, which writes its own. Raises ValueError for a lone surrogate, which no encoding can hold.
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
        """Return the text of a whole sequence of ids. Raises ValueError for an id that is not in the vocabulary."""
        for id in ids:
            self.token(id)
        return self._backend.decode(ids, skip_special_tokens)

    def token(self, id: int) -> str:
        """Return the vocabulary's piece for an id, such as "▁Hello", "Ġworld" or "<0xE4>". Raises ValueError if there
        is none."""
        piece = self._backend.id_to_token(id) if id in self else None
        if piece is None:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
        return piece

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each id adds to a text, none for ids without a piece. Raises ValueError if this
        tokenizer does not decode piece by piece."""
        if (decoding := self._backend.decoding()) is None or decoding.separator:
            raise ValueError("grammars need a tokenizer whose text is the bytes of its tokens, one after another")
        pieces = [self._backend.id_to_token(id) or "" for id in range(self.vocab_size)]
        return [p.encode() if id in self.special_ids else bytes_of_piece(p, decoding) for id, p in enumerate(pieces)]

    def __contains__(self, id: int) -> bool:
        """Return whether the vocabulary has a piece for an id."""
        return 0 <= id < 2**32 and self._backend.id_to_token(id) is not None

    def stream(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder | WholeDecoder:
        """Return a decoder for ids that arrive one by one and continue `prompt_ids`, whose text it leaves out.

        If a tokenizer.json does not allow decoding piece by piece, all of the text comes at the end.
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
        """Render the text of a conversation, to be encoded with `add_special_tokens=False`.

        Args:
            add_generation_prompt: end where the assistant's answer begins.
            continue_final_message: end within the last message, which is to be continued; see `chat.render_chat`.
            chat_template: Jinja source, or the name of one of the folder's templates, instead of the folder's own.
            variables: further variables of the template; they override special tokens of the same name.
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
