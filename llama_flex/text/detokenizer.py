"""Decode tokens as they come: exact text piece by piece, and stop strings found however the text is cut."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: a printable Latin-1 byte stands for itself, the others, in order, are
    the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class Decoding(NamedTuple):
    """The steps from pieces to text, as far as LLaMA's tokenizers go; see `StreamDecoder`."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    separator: str = ""


class StreamDecoder:
    """Text of ids that arrive one by one: what `put` and `flush` return, joined, is exactly what `decode` returns.

    Text comes out as soon as no later id can change it. For byte-level vocabularies only an unfinished character waits
    (three bytes at most). In sentencepiece ones a run of byte pieces such as <0xE4> waits for its end, since one bad
    byte turns the whole run into U+FFFD. The work per id does not grow with the text.
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
        # Decoding the prompt alone shows an unfinished tail in some way: that is printed already, and not due again.
        self._printed = self._waiting = ""
        for id in prompt_ids:
            self._feed(id)
        self._printed = self._utf8.getstate()[0].decode("utf-8", "replace") + _text_of_run(self._run)

    def put(self, token_id: int) -> str:
        """The text that is certain with this id; "" while there is none."""
        return self._without_printed(self._feed(token_id))

    def pending(self) -> str:
        """The text that is not certain yet and would come next if no more ids came, but for unfinished characters."""
        try:
            return "" if self._printed else self._run.decode("utf-8")
        except UnicodeDecodeError:
            return ""

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


class WholeDecoder:
    """The same for a tokenizer whose text is not known piece by piece: all of it comes at the end, from `flush`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode, self._prompt, self._new = decode, list(prompt_ids), list[int]()
        self._before = decode(self._prompt)

    def put(self, token_id: int) -> str:
        """Take one more id; gives no text."""
        self._new.append(token_id)
        return ""

    def pending(self) -> str:
        """The text of the ids so far."""
        text = self._decode([*self._prompt, *self._new])
        return text.removeprefix(self._before) if text.startswith(self._before) else self._decode(self._new)

    def flush(self) -> str:
        """All of the text."""
        return self.pending()


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
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"stop strings must be a list of texts, not {stops!r}")
        if "" in stops:
            raise ValueError("a stop string may not be empty: it would stop before the first token")
        self._stops = tuple(stops)
        self._held = ""
        self._found = False

    def put(self, text: str, pending: str = "") -> tuple[str, bool]:
        """The text that is safe to print, and whether a stop string was found: the text ends before it, then and for
        good. What may be the beginning of a stop string is held back. pending: text that follows if nothing else does;
        it is searched too, and has to be given again."""
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
    """The most characters at the end of the text that begin the stop string, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
