"""What is wrong with a mask or a score function, in words.

`check_mask` evaluates one on random tokens: by its dense definition, for single cells, in eager and in compiled
FlexAttention, in the full forward and in cached decoding. Dimensions: B batch, H query heads, T query tokens, S slots.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .attention import Backend
from .compiling import Graphs
from .config import LlamaConfig
from .masks import Mask
from .model import Llama, plainly
from .rules import Token, Tokens, arange, grid, name_of
from .scores import ScoreMod

Level: TypeAlias = Literal["error", "note"]
LENGTHS = (1, 127, 128, 129, 300)  # one token, and up to, at and past the edges of blocks of 128
DOCUMENT = 50  # tokens of a segment
TOLERANCE = 160 * torch.finfo(torch.float32).eps  # about 2e-5; of logits, relative to the largest

_LIBRARIES = (str(Path(__file__).parent) + os.sep, sysconfig.get_paths()["stdlib"], "<frozen", "<string>", "<eval")
_DATA_DEPENDENT = re.compile(
    r"Boolean value of Tensor|[Dd]ata-dependent|converted to (a )?(Python )?[Ss]calar|converted to an index"
    r"|_local_scalar_dense|call_method item\("
)
_OUT_OF_RANGE = re.compile(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)")
_WRONG_TYPE = re.compile(r"returned .*; (a predicate returns|it returns the score)")
_CELL = "for query {2} and key {3} (row {0}, head {1}, length {4})"


@dataclass(frozen=True)
class Finding:
    """One thing found: an error gives wrong results or none, a note is allowed and worth knowing.

    what: data-dependent, wrong-type, wrong-shape, index-out-of-range, raises, does-not-compile, not-elementwise,
    not-deterministic, not-finite, no-key, not-causal, depends-on-batch, depends-on-head, global-tensor, cache-differs,
    eager-differs or compiled-differs. message: a sentence with the values and the way out.
    """

    level: Level
    what: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}: {self.message}"


class _Wrong(Exception):
    """What and message of an error that leaves nothing more to check."""


def check_mask(
    mask: Callable[..., Any],
    *,
    num_heads: int = 4,
    lengths: Sequence[int] = LENGTHS,
    segments: Tensor | None = None,
    compile: bool = True,
    passed: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """What is wrong with a mask or a score function, see `as_rule`; on CPU, with two rows.

    segments: integers `[max(lengths)]`; default: documents of 50 tokens, numbered from 0.
    compile: also compile a model's step at the longest length: three graphs of some ten seconds each.
    passed: called with a line for each check that passed.
    Each kind of finding is reported once. What the function raises is a finding. Raises ValueError for what is no such
    function, and for arguments that do not fit.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(f"check_mask needs lengths from 1, not {lengths}")
    lengths, longest = sorted(lengths), max(lengths)
    segments = torch.arange(longest) // DOCUMENT if segments is None else segments
    if segments.is_floating_point() or segments.shape != (longest,):
        raise ValueError(f"segments must be {longest} integers, found {segments.dtype} {list(segments.shape)}")
    rule, model, found = as_rule(mask), _random_model(num_heads), dict[str, Finding]()
    texts = [Tokens.arriving(length, batch=2, segments=segments[:length]) for length in lengths]

    def good(check: Callable[..., Iterable[Finding] | None], *args: Any) -> bool:
        """Run a check; are the next ones of use?"""
        findings, fault = attempt(lambda: list(check(*args) or ()))
        for finding in [fault] if fault else findings:
            found.setdefault(finding.what, finding)
        return all(finding.level == "note" or finding.what == "no-key" for finding in found.values())

    with torch.no_grad():
        if good(_globals, rule) and all(good(_answers_agree, rule, text, model) for text in texts):
            passed(f"answers of single cells, of all at once and in cached decoding: the same at lengths {lengths}")
            causal, last = "not-causal" not in found, texts[-1]
            if all(good(_logits_agree, rule, model, text, compile and text is last, causal) for text in texts):
                ways = "eager FlexAttention" + " and compiled" * compile
                passed(
                    f"a model's logits in {ways}: within {TOLERANCE:.2g} of their definition, in cached decoding too"
                )
    return list(found.values())


def as_rule(function: Callable[..., Any]) -> Mask | ScoreMod:
    """A `Mask` or `ScoreMod` as it is; or made of a function, by the number of arguments that it takes.

    `(q, kv)`, `(score, q, kv)`, or FlexAttention's `mask_mod(b, h, q_idx, kv_idx)` and `score_mod(score, b, h, q_idx,
    kv_idx)`. Raises ValueError for any other.
    """
    if isinstance(function, Mask | ScoreMod):
        return function
    for count, kind in ((2, Mask), (3, ScoreMod), (4, Mask.from_mask_mod), (5, ScoreMod.from_score_mod)):
        try:
            inspect.signature(function).bind(*range(count))
        except (TypeError, ValueError):  # ValueError: a builtin that does not say
            continue
        return kind(function)
    known = "(q, kv), (score, q, kv), (b, h, q_idx, kv_idx), (score, b, h, q_idx, kv_idx)"
    raise ValueError(f"{name_of(function)} is a function of none of {known}")


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, Finding | None]:
    """What the function returns; or what it raised, as a finding with the line of the user's code."""
    try:
        return function(*args), None
    except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything, to report it
        return None, _fault(error)


def _fault(error: Exception) -> Finding:
    if isinstance(error, _Wrong):
        return Finding("error", *error.args)
    text, line = str(error), _user_line(error)
    first = f"{type(error).__name__}: {(text.strip() or 'no message').splitlines()[0]}"
    what, message = "raises", f"it raises {first}{line}"
    if out := _OUT_OF_RANGE.search(text):
        way = "make it as long as the longest text, or clamp the index"
        what, message = "index-out-of-range", f"index {out[1]} into a tensor of {out[2]}{line}: {way}"
    elif _DATA_DEPENDENT.search(text):
        way = "no `if`, `and`, `or`, `not`, `a < b < c`, `int()`, `.item()` on tensors; use torch.where, `&`, `|`, `~`"
        what, message = "data-dependent", f"Python decides by the value of a tensor{line}: {way} ({first})"
    elif isinstance(error, ValueError) and _WRONG_TYPE.search(text):
        what, message = "wrong-type", text + ("; is a `return` missing?" if "NoneType" in text else "")
    elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        what, message = "does-not-compile", f"torch cannot trace or compile it{line}: {first}"
    return Finding("error", what, message)


def _user_line(error: Exception) -> str:
    """Where in the user's code an error arose, by its traceback or by what the compiler says; "" if nowhere."""
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    frames += [(name, int(line), None) for name, line in re.findall(r'File "(.+?)", line (\d+)', str(error))]
    for name, line, source in reversed(frames):
        if not name.startswith(_LIBRARIES) and f"{os.sep}site-packages{os.sep}" not in name:
            return f" in line {line} of {Path(name).name}" + (f", `{source}`" if source else "")
    return ""


def _globals(rule: Mask | ScoreMod) -> Iterator[Finding]:
    try:
        rule.to("meta")  # stands for any device but the CPU
    except ValueError as error:
        if "global tensor" not in str(error):
            raise
        yield Finding("note", "global-tensor", str(error))


def _ask(rule: Mask | ScoreMod, q: Token, kv: Token, shape: tuple[int, ...]) -> Tensor:
    """The answers for query and key tokens, in that shape; a score function's for scores that differ by the cell."""
    scores = ((7 * q.index + 13 * kv.index + 3 * q.head + 5 * q.batch) % 61) / 10 - 3
    answer = rule.evaluate(scores, q, kv) if isinstance(rule, ScoreMod) else rule.evaluate(q, kv)
    try:
        return answer.expand(shape)
    except RuntimeError:
        asked = f"{list(shape)} cells" if shape else "one query and one key"
        way = "use operations of single elements, and tables at an index, `table[kv.index]`"
        raise _Wrong("wrong-shape", f"it returns {list(answer.shape)} for {asked}: {way}") from None


def _cells(rule: Mask | ScoreMod, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
    """The answers for all cells, `[B, H, T, S]`; the heads have stride 0 if the function does not look at them."""
    (b, t), s = q.index.shape, kv.index.shape[1]
    return _ask(rule, *grid(q, kv, num_heads, arange(t, q), arange(s, q)), (b, num_heads, t, s))


def _pieces(length: int) -> list[tuple[int, int]]:
    """Start and end of two chunks of one size, and then of at least 8 single tokens, if there are as many."""
    chunk = max(length - 8, 0) // 2
    return list(pairwise(sorted({0, chunk, *range(2 * chunk, length + 1)})))


def _first(cells: Tensor, full: Tensor) -> tuple[Any, ...] | None:
    """Row, head, query and key of the first true cell of `[B, H, T, S]`, the number of keys, and the cell's answer."""
    for query, key, row, head in cells.permute(2, 3, 0, 1).nonzero()[:1].tolist():
        return row, head, query, key, full.shape[-1], full[row, head, query, key].item()
    return None


def _answers_agree(rule: Mask | ScoreMod, tokens: Tokens, model: Llama) -> Iterator[Finding]:
    """The answers for all cells: against asking again, for single cells and in a cache; and what they mean."""
    rule, (b, t), heads = rule.to("cpu"), tokens.index.shape, model.config.num_attention_heads
    full = _cells(rule, tokens, tokens, heads)

    def compare(what: str, name: str, answers: Tensor, way: str) -> None:
        close = torch.isclose(answers, full, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if first := _first(~close, full):
            values = f"{name} {answers[first[:4]].item()}, in the full forward {first[5]}"
            raise _Wrong(what, f"{values} {_CELL.format(*first)}: {way}")

    compare("not-deterministic", "asked again", _cells(rule, tokens, tokens, heads), "take chance from a table")
    alone, cached, cache, picked = full.clone(), full.clone(), model.new_cache(b, t), {0, t // 2, t - 1}
    for cell in product({0, b - 1}, {0, heads - 1}, picked, picked):
        row, head, query, key = map(torch.tensor, cell)
        alone[cell] = _ask(rule, Token(tokens, row, head, query), Token(tokens, row, head, key), ())
    way = "FlexAttention asks for single cells, so no `.max()`, `.any()`, sizes or other looks at many"
    compare("not-elementwise", "alone", alone, way)
    for start, end in _pieces(t):
        new = Tokens(*(x[:, start:end] for x in tokens))
        with cache.appending(end - start):
            cache.append(new)
        held = Tokens(*(x.flip(1) for x in cache.tokens))  # a token may lie in any slot
        cached[:, :, start:end, :end] = _cells(rule, new, held, heads)[..., held.index[0].argsort()[-end:]]
    compare("cache-differs", "in cached decoding", cached, "use q.index and kv.index, no rows, slots, sizes or offset")
    for level, what, cells, message in _meanings(rule, full):
        if first := _first(cells, full):
            yield Finding(level, what, message.format(*first))


def _meanings(rule: Mask | ScoreMod, full: Tensor) -> list[tuple[Level, str, Tensor, str]]:
    """What the answers for all cells may mean: a level, what, the cells that do, and a message for the first one."""
    later = torch.ones_like(full[0, 0]).triu(1) > 0
    if isinstance(rule, ScoreMod):
        hidden, fine = full == -torch.inf, full.isfinite() | later
        odd = f"the score becomes {{5}} {_CELL}: mind division, logarithms and powers"
        nothing = "every score of query {2} becomes -inf (length {4}): leave it a key, such as itself"
        inf = f"the score becomes -inf {_CELL}: a mask hides keys without computing them"
        return [
            ("error", "not-finite", ~(fine | hidden), odd),
            ("error", "not-finite", (hidden | later).all(-1, keepdim=True), nothing),
            ("note", "not-finite", ~fine, inf),
        ]
    by_head = torch.full_like(full, full.shape[1] > 1 and full.stride(1) > 0)
    no_key = "query {2} sees no key (row {0}, head {1}, length {4}) and attends to nothing, which gives 0: let it see "
    late = "query {2} sees key {3}, which arrives later (length {4}), so generation cannot give what the full forward "
    row = f"row 0 answers otherwise {_CELL}, of the same tokens: allowed, but what a prompt gives depends on its row"
    head = "looks at heads: allowed, but with grouped queries torch's GPU decoding kernel refuses lists of blocks by "
    return [
        ("error", "no-key", ~full.any(-1, keepdim=True), no_key + "itself, `| (kv.index == q.index)`"),
        ("note", "not-causal", full & later, late + "gives: `& masks.causal()`, and no offset of your own"),
        ("note", "depends-on-batch", full != full[:1], row),
        ("note", "depends-on-head", by_head, head + "head"),
    ]


def _random_model(num_heads: int) -> Llama:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16 * num_heads,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
    )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        return Llama(config).eval().requires_grad_(False)


def _logits_agree(rule: Mask | ScoreMod, model: Llama, tokens: Tokens, compile: bool, causal: bool) -> None:
    """A model's logits in every way against the dense ones, and in cached decoding against the full forward."""

    def compare(what: str, ways: str, ours: Tensor, expected: Tensor) -> None:
        off = (ours - expected).abs().amax(-1) / expected.abs().max()
        for query, row in (~(off <= TOLERANCE)).T.nonzero().tolist():  # NaN too
            values = f"by {float(off.max()):.2g} of the largest, {TOLERANCE:.2g} is allowed"
            where = f"first in row {row} at query {query} (length {off.shape[1]})"
            way = "use operations of single elements only, and no state"
            raise _Wrong(what, f"the logits of {ways} differ {values}; {where}: {way}")

    dense = {}
    for cached, where in ((False, "the full forward"), (True, "cached decoding")):
        dense[cached] = _logits(rule, model, tokens, "dense", cached)
        for way in ("eager", "compiled") if compile else ("eager",):
            ours = _logits(rule, model, tokens, way, cached)
            compare(f"{way}-differs", f"{way} and dense in {where}", ours, dense[cached])
    if causal:
        compare("cache-differs", "cached decoding and the full forward", dense[True], dense[False])


_BACKENDS: dict[str, Backend] = {"dense": "dense", "eager": "flex", "compiled": "flex"}


def _logits(rule: Mask | ScoreMod, model: Llama, tokens: Tokens, way: str, cached: bool) -> Tensor:
    """Logits `[B, T, V]` of random ids: "dense", "eager" or "compiled"."""
    b, length = tokens.index.shape
    ids = torch.randint(model.config.vocab_size, (b, length), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(b, length) if cached else None
    mask, score_mod = (rule if isinstance(rule, kind) else None for kind in (Mask, ScoreMod))
    layers = model.attention_layers(mask, score_mod, cache)  # type: ignore[arg-type]  # narrowed by `kind`
    graphs, logits = Graphs(), []
    for start, end in _pieces(length) if cached else [(0, length)]:
        # Compiled code is guarded on strides, so these are no slices.
        part, segment = (x[:, start:end].clone(memory_format=torch.contiguous_format) for x in (ids, tokens.segment))
        run, backend = graphs.of(end - start) if way == "compiled" else plainly, _BACKENDS[way]
        with nullcontext() if cache is None else cache.appending(end - start):
            x, _ = model.step(part, None, None, segment, cache, layers, backend, run)
            logits.append(model.head(x))
    return torch.cat(logits, 1)
