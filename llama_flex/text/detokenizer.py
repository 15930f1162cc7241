"""Streaming detokenization: exact text piece by piece, and stop strings found however the text is cut."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character in GPT-2's alphabet: a printable Latin-1 character stands for itself, those
    from U+0100 on for the other bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class Decoding(NamedTuple):
    """The steps from pieces to text that LLaMA's tokenizers use; see `StreamDecoder`."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    separator: str = ""


class StreamDecoder:
    """A decoder for ids that arrive one by one: the texts of `put` and `flush`, joined, are exactly that of `decode`.

    Text comes out as soon as no later id can change it. With a byte-level vocabulary, only an unfinished character is
    held back (three bytes at most); with a sentencepiece one, a run of byte pieces such as <0xE4> until it ends, since
    one bad byte turns the whole run into U+FFFD. The work per id does not grow with the text.
    """

    def __init__(
        self,
        piece_of: Callable[[int], str | None],
        decoding: Decoding,
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
        # Decoding the prompt alone renders an unfinished tail somehow: that text is printed already, and not due again.
        self._printed = self._waiting = ""
        for id in prompt_ids:
            self._feed(id)
        self._printed = self._utf8.getstate()[0].decode("utf-8", "replace") + _text_of_run(self._run)

    def put(self, token_id: int) -> str:
        """Return the text that becomes certain with this id, "" if none does."""
        return self._without_printed(self._feed(token_id))

    def pending(self) -> str:
        """Return the uncertain text that would come next if no more ids came, without unfinished characters."""
        try:
            return "" if self._printed else self._run.decode("utf-8")
        except UnicodeDecodeError:
            return ""

    def flush(self) -> str:
        """Return the rest of the text, once no more ids come."""
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
        # The prompt's end cut a character in two: its stand-in is no longer a prefix of the text.
        text = self._waiting.removeprefix(self._printed)
        self._printed = self._waiting = ""
        return text


class WholeDecoder:
    """A StreamDecoder for a tokenizer that cannot decode piece by piece: all text comes at the end, from `flush`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode, self._prompt, self._new = decode, list(prompt_ids), list[int]()
        self._before = decode(self._prompt)

    def put(self, token_id: int) -> str:
        """Take one more id; return no text."""
        self._new.append(token_id)
        return ""

    def pending(self) -> str:
        """Return the text of the ids so far."""
        text = self._decode([*self._prompt, *self._new])
        return text.removeprefix(self._before) if text.startswith(self._before) else self._decode(self._new)

    def flush(self) -> str:
        """Return all of the text."""
        return self.pending()


def _bytes_of(piece: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[character] for character in piece])
    except KeyError:  # an added token, written as it is
        return piece.encode("utf-8")


def bytes_of_piece(piece: str, decoding: Decoding) -> bytes:
    """Return the bytes that a piece adds to a text that has begun."""
    if decoding.byte_level:
        return _bytes_of(piece)
    for old, new in decoding.replacements:
        piece = piece.replace(old, new)
    match = _BYTE_PIECE.fullmatch(piece) if decoding.byte_fallback else None
    return bytes([int(match[1], 16)]) if match else piece.encode()


def _text_of_run(run: bytearray) -> str:
    """Decode byte pieces as `tokenizers` does: a run that is not UTF-8 throughout becomes one U+FFFD per byte."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


class StopStrings:
    """A search for stop strings in streamed text, however it is cut. Of several, the first one to be complete counts.

    stops: non-empty strings, or none at all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise ValueError(f"stop strings must be in a list: [{stops!r}]")
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"stop strings must be a list of strings, not {stops!r}")
        if "" in stops:
            raise ValueError("a stop string may not be empty: it would stop before the first token")
        self._stops = tuple(stops)
        self._held = ""
        self._found = False

    def put(self, text: str, pending: str = "") -> tuple[str, bool]:
        """Return the text that is safe to print, and whether a stop string was found: the text then ends before it, for
        good. A possible beginning of a stop string is held back. pending: text that follows if nothing else does; it is
        searched too, and has to be given again."""
        if self._found:
            return "", True
        sure = len(self._held) + len(text)
        text = self._held + text + pending
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._found, self._held = True, ""
            return text[: min(ends)[1]], True
        text = text[:sure]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return the text that was held back, once no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that begins the stop string, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
