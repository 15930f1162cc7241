"""Check a tokenizer.json before `tokenizers` reads it, which some files crash or keep busy forever."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

# The tokenizer.json of Llama 3 has a million items.
MAX_ITEMS = 3 * 2**20
MAX_PREFIXES = 2**19  # distinct ones of a Unigram vocabulary; each takes 350 bytes
MAX_STEPS = 1000  # of normalizers, pre-tokenizers and so on
MAX_PATTERN_CHARACTERS = 2**12  # of all regular expressions; compiled, they are far larger
MAX_ADDED_BYTES = 2**18  # of the added tokens, which are normalised when the file is read
MAX_NORMALIZED_BYTES = 2**20  # of the added tokens once normalised, by an upper bound
MAX_SEARCHED_CHARACTERS = 2**12  # of the added tokens, if the normalizer searches them by regular expressions
MAX_PIECES = 360_000  # of a Unigram vocabulary, or of a tokenizer.model
# The exceptions of code that takes JSON to be of the expected form.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def check(serialized: bytes, added: list[str]) -> None:
    """Refuse a file that crashes `tokenizers` 0.23 or takes it too long. added: the texts of further added tokens.

    Refused are too many items for a vocabulary, and a Unigram one of more or longer pieces, since its trie takes 350
    bytes a node; duplicate keys; merges that make no token of the vocabulary, by a continuing_subword_prefix or
    otherwise, since they are copied into a buffer that is too short; too many steps or too long regular expressions;
    added tokens that are too long, also after the normalizer, which may double them again and again; a normalizer whose
    regular expression may take too long on them. Raises ValueError, and others of MALFORMED.
    """
    if sum(map(serialized.count, (b",", b"[", b"{"))) + 4 * serialized.count(b":") > MAX_ITEMS:
        raise ValueError("too many items for a vocabulary")
    file = json.loads(serialized.decode("utf-8"), object_pairs_hook=_unique)
    model, normalizer = file["model"], file.get("normalizer")
    if model.get("type") == "Unigram":
        pieces = [piece for piece, _ in model["vocab"]]
        if len(pieces) > MAX_PIECES or _prefixes(pieces) > MAX_PREFIXES:
            raise ValueError("too many or too long pieces for a vocabulary")
    merges = [m for m in model.get("merges") or () if not (isinstance(m, str) and m.startswith("#version"))]
    joined = ("".join(m) if isinstance(m, list) else m.replace(" ", "") for m in merges)
    if (merges and model.get("continuing_subword_prefix")) or not all(map(model["vocab"].__contains__, joined)):
        raise ValueError("merges whose result is not in the vocabulary")
    steps = list(_objects([normalizer, *(file.get(name) for name in ("pre_tokenizer", "decoder", "post_processor"))]))
    if len(steps) > MAX_STEPS or sum(map(len, _patterns(steps))) > MAX_PATTERN_CHARACTERS:
        raise ValueError("too many steps or too long regular expressions")
    texts = [*added, *(token["content"] for token in file.get("added_tokens") or ())]
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_ADDED_BYTES or size * _growth(normalizer) > MAX_NORMALIZED_BYTES:
        raise ValueError("added tokens that are too long, before or after normalization")
    searched = _patterns(_objects(normalizer))
    repeats = [len(re.findall(r"[*+?{]", re.sub(r"\\.", "", pattern))) for pattern in searched]
    # With two repetitions, nested or one after the other, a search can take arbitrarily long.
    if repeats and (max(repeats) > 1 or sum(map(len, texts)) > MAX_SEARCHED_CHARACTERS):
        raise ValueError("a regular expression in the normalizer that may take too long on the added tokens")


def _prefixes(pieces: Iterable[str]) -> int:
    """Count the distinct prefixes of pieces, the nodes of a trie."""
    count, before = 0, ""
    for piece in sorted(pieces):
        differs = (i for i, (a, b) in enumerate(zip(before, piece, strict=False)) if a != b)
        count += len(piece) - next(differs, min(len(before), len(piece)))
        before = piece
    return count


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a duplicate key")  # json keeps the last, but `tokenizers` reads each
    return unique


def _objects(part: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a part of a tokenizer.json."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _objects(inner)


def _patterns(objects: Iterable[dict[str, Any]]) -> list[str]:
    """Return the regular expressions in these objects."""
    return [found for x in objects if isinstance(found := x.get("Regex"), str)]


def _growth(normalizer: Any) -> float:
    """Return an upper bound on the factor by which a normalizer lengthens a text."""
    match normalizer:
        case None:
            return 1
        case {"type": "Sequence", "normalizers": steps}:
            return math.prod(map(_growth, steps))
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return max(1, len(new.encode()) / len(old.encode()))
        case {"type": "Replace", "content": new}:  # a regular expression may match the empty string
            return 1 + len(new.encode())
        case {"type": "Prepend", "prepend": new}:
            return 1 + len(new.encode())
        case {"type": "Precompiled", "precompiled_charsmap": encoded}:
            charsmap = base64.b64decode(encoded)
            replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            return max(map(len, replacements))
        case {"type": "Strip" | "StripAccents" | "Nmt"}:
            return 1
        case {"type": "Lowercase" | "NFC" | "NFD" | "ByteLevel"}:
            return 3
        case _:  # a character becomes at most 18, in NFKD
            return 18
