"""Check masks and score functions, and explain what is wrong: `python -m llama_flex.eval.check_mask FILE.py:NAME`.

`check_mask` evaluates one on random tokens: by its dense definition, for single cells, in eager and in compiled
FlexAttention, in the full forward and in cached decoding. Dimensions: B batch, H query heads, T query tokens, S slots.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..attention import Backend
from ..config import LlamaConfig
from ..engine.graphs import Graphs
from ..masks.cells import arange, each_cell
from ..masks.mask import Mask
from ..masks.scores import ScoreMod
from ..model import Llama, run_eager
from ..tokens import Token, Tokens
from ..usercode.captured import name_of
from ..usercode.errors import FunctionError, diagnose

Level: TypeAlias = Literal["error", "note"]
LENGTHS = (1, 127, 128, 129, 300)  # one token, and up to, at and past the edges of blocks of 128
DOCUMENT = 50  # tokens per segment
TOLERANCE = 160 * torch.finfo(torch.float32).eps  # about 2e-5; of logits, relative to the largest

_MODULE = "_checked"  # the name under which the command imports FILE.py
_NO_CHANCE = "take random numbers from a table made beforehand"
_CELL = "for query {2} and key {3} (row {0}, head {1}, length {4})"


@dataclass(frozen=True)
class Finding:
    """One finding: an error means wrong results or none, a note is allowed but worth knowing.

    what: data-dependent, wrong-type, wrong-shape, index-out-of-range, raises, does-not-compile, not-elementwise,
    not-deterministic, not-finite, no-key, not-causal, depends-on-batch, depends-on-head, global-tensor, cache-differs,
    eager-differs or compiled-differs. message: a sentence with the values and the way out.
    """

    level: Level
    what: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}: {self.message}"


def check_mask(
    mask: Callable[..., Any],
    *,
    num_heads: int = 4,
    lengths: Sequence[int] = LENGTHS,
    segments: Tensor | None = None,
    compile: bool = True,
    passed: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Check a mask or a score function (see `as_token_function`) on the CPU, with two rows.

    segments: integers `[max(lengths)]`; default: documents of 50 tokens, numbered from 0.
    compile: also compile a model's step at the longest length: three graphs of about ten seconds each.
    passed: called with a line for each check that passed.
    Each kind of finding is reported once. Exceptions of the function are findings. Raises ValueError for anything that
    is not such a function, and for arguments that do not fit.
    """
    if min(lengths, default=0) < 1:
        raise ValueError(f"check_mask needs lengths of at least 1, not {lengths}")
    lengths, longest = sorted(lengths), max(lengths)
    segments = torch.arange(longest) // DOCUMENT if segments is None else segments
    if segments.is_floating_point() or segments.shape != (longest,):
        raise ValueError(f"segments must be {longest} integers, found {segments.dtype} {list(segments.shape)}")
    rule, model, found = as_token_function(mask), _random_model(num_heads), dict[str, Finding]()
    texts = [Tokens.arriving(length, batch=2, segments=segments[:length]) for length in lengths]

    def good(check: Callable[..., Iterable[Finding] | None], *args: Any) -> bool:
        """Run a check; return whether the next ones are still useful."""
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


def as_token_function(function: Callable[..., Any]) -> Mask | ScoreMod:
    """Return a `Mask` or `ScoreMod` as it is, or make one of a function, by the number of its arguments.

    `(q, kv)`, `(score, q, kv)`, or FlexAttention's `mask_mod(b, h, q_idx, kv_idx)` and `score_mod(score, b, h, q_idx,
    kv_idx)`. Raises ValueError for any other.
    """
    if isinstance(function, Mask | ScoreMod):
        return function
    for count, kind in ((2, Mask), (3, ScoreMod), (4, Mask.from_mask_mod), (5, ScoreMod.from_score_mod)):
        try:
            inspect.signature(function).bind(*range(count))
        except (TypeError, ValueError):  # ValueError: a builtin without a signature
            continue
        return kind(function)
    known = "(q, kv), (score, q, kv), (b, h, q_idx, kv_idx), (score, b, h, q_idx, kv_idx)"
    raise ValueError(f"{name_of(function)} takes none of the known argument lists: {known}")


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, Finding | None]:
    """Call a function; return its result, or its exception as a finding with the line of the user's code."""
    try:
        return function(*args), None
    except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything, to report it
        what, message = (error.what, error.fault) if isinstance(error, FunctionError) else diagnose(error)
        return None, Finding("error", what, message)


def _globals(rule: Mask | ScoreMod) -> Iterator[Finding]:
    try:
        rule.to("meta")  # stands for any device but the CPU
    except ValueError as error:
        if "global tensor" not in str(error):
            raise
        yield Finding("note", "global-tensor", str(error))


def _scores(q: Token, kv: Token) -> Tensor:
    """Return scores that differ from cell to cell."""
    return ((7 * q.index + 13 * kv.index + 3 * q.head + 5 * q.batch) % 61) / 10 - 3


def _cells(rule: Mask | ScoreMod, q: Tokens, kv: Tokens, num_heads: int) -> Tensor:
    """Return the results for all cells, `[B, H, T, S]`; heads have stride 0 if the function does not read them."""

    def answer(q: Token, kv: Token) -> Tensor:
        return rule.evaluate(_scores(q, kv), q, kv) if isinstance(rule, ScoreMod) else rule.evaluate(q, kv)

    return each_cell(answer, q, kv, arange(num_heads, q))


def _at_once(rule: Mask | ScoreMod, tokens: Tokens, num_heads: int) -> Tensor | None:
    """Return the results `[B, H, T, S]` of one call of the function for all cells; None if that fails."""
    (b, t), row = tokens.index.shape, arange(tokens.index.shape[1], tokens)
    batch, head = arange(b, tokens)[:, None, None, None], arange(num_heads, tokens)[:, None, None]
    q, kv = Token(tokens, batch, head, row[:, None]), Token(tokens, batch, head, row)
    given = (_scores(q, kv), q, kv) if isinstance(rule, ScoreMod) else (q, kv)
    answers, fault = attempt(lambda: torch.as_tensor(rule.function(*given)).expand(b, num_heads, t, t))
    return None if fault else answers


def _pieces(length: int) -> list[tuple[int, int]]:
    """Return (start, end) of two chunks of equal size, and then of at least 8 single tokens, if there are as many."""
    chunk = max(length - 8, 0) // 2
    return list(pairwise(sorted({0, chunk, *range(2 * chunk, length + 1)})))


def _first(cells: Tensor, full: Tensor) -> tuple[Any, ...] | None:
    """Return row, head, query and key of the first true cell `[B, H, T, S]`, the number of keys, and its result."""
    for query, key, row, head in cells.permute(2, 3, 0, 1).nonzero()[:1].tolist():
        return row, head, query, key, full.shape[-1], full[row, head, query, key].item()
    return None


def _answers_agree(rule: Mask | ScoreMod, tokens: Tokens, model: Llama) -> Iterator[Finding]:
    """Compare the results for all cells with a second evaluation, a single call and a cache; interpret them."""
    rule, (b, t), heads = rule.to("cpu"), tokens.index.shape, model.dims.num_heads
    full = _cells(rule, tokens, tokens, heads)

    def differs(what: str, name: str, answers: Tensor, way: str) -> Finding | None:
        close = torch.isclose(answers, full, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if (first := _first(~close, full)) is None:
            return None
        values = f"{name} {answers[first[:4]].item()}, but {first[5]} in the full forward"
        return Finding("error", what, f"{values} {_CELL.format(*first)}: {way}")

    if again := differs("not-deterministic", "asked again", _cells(rule, tokens, tokens, heads), _NO_CHANCE):
        yield again
        return
    if (answers := _at_once(rule, tokens, heads)) is not None:
        way = "FlexAttention evaluates each cell alone, so `.max()`, `.any()` and sizes see only that cell"
        if found := differs("not-elementwise", "in one call for all cells", answers, way):
            yield replace(found, level="note")
    cached, cache = full.clone(), model.new_cache(b, t)
    for start, end in _pieces(t):
        new = Tokens(*(x[:, start:end] for x in tokens))
        with cache.appending(end - start):
            cache.append(new)
        held = Tokens(*(x.flip(1) for x in cache.tokens))  # a token may lie in any slot
        cached[:, :, start:end, :end] = _cells(rule, new, held, heads)[..., held.index[0].argsort()[-end:]]
    way = "use q.index and kv.index, not rows, slots, sizes or an offset"
    if found := differs("cache-differs", "in cached decoding", cached, way):
        yield found
        return
    for level, what, cells, message in _meanings(rule, full):
        if first := _first(cells, full):
            yield Finding(level, what, message.format(*first))


def _meanings(rule: Mask | ScoreMod, full: Tensor) -> list[tuple[Level, str, Tensor, str]]:
    """Interpret the results for all cells: a level, a kind, the cells in question, and a message for the first one."""
    later = torch.ones_like(full[0, 0]).triu(1) > 0
    if isinstance(rule, ScoreMod):
        hidden, fine = full == -torch.inf, full.isfinite() | later
        odd = f"the score becomes {{5}} {_CELL}: check divisions, logarithms and powers"
        nothing = "every score of query {2} becomes -inf (length {4}): leave it at least one key, such as itself"
        inf = f"the score becomes -inf {_CELL}: a mask hides keys without computing them"
        return [
            ("error", "not-finite", ~(fine | hidden), odd),
            ("error", "not-finite", (hidden | later).all(-1, keepdim=True), nothing),
            ("note", "not-finite", ~fine, inf),
        ]
    by_head = torch.full_like(full, full.shape[1] > 1 and full.stride(1) > 0)
    no_key = "query {2} sees no key (row {0}, head {1}, length {4}), so its output is 0: let it see "
    late = "query {2} sees key {3}, which arrives later (length {4}), so generation cannot match the full forward"
    row = f"row 0 differs {_CELL} for the same tokens: allowed, but results depend on a prompt's row"
    head = "depends on the head: allowed, but torch's GPU decoding kernel does not support per-head block lists with "
    return [
        ("error", "no-key", ~full.any(-1, keepdim=True), no_key + "itself, `| (kv.index == q.index)`"),
        ("note", "not-causal", full & later, late + ": use `& masks.causal()`, without an offset"),
        ("note", "depends-on-batch", full != full[:1], row),
        ("note", "depends-on-head", by_head, head + "grouped queries"),
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
    """Compare a model's logits in every way with the dense ones, and those of cached decoding with the full forward."""

    def compare(what: str, ways: str, ours: Tensor, expected: Tensor) -> None:
        off = (ours - expected).abs().amax(-1) / expected.abs().max()
        for query, row in (~(off <= TOLERANCE)).T.nonzero().tolist():  # NaN too
            values = f"by {float(off.max()):.2g} of the largest, {TOLERANCE:.2g} is allowed"
            where = f"first in row {row} at query {query} (length {off.shape[1]})"
            way = "use elementwise operations only, and no state"
            raise FunctionError(str(rule), what, f"the logits of {ways} differ {values}; {where}: {way}")

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
    """Return logits `[B, T, V]` of random ids. way: "dense", "eager" or "compiled"."""
    b, length = tokens.index.shape
    ids = torch.randint(model.config.vocab_size, (b, length), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(b, length) if cached else None
    mask, score_mod = (rule if isinstance(rule, kind) else None for kind in (Mask, ScoreMod))
    plan = model.attention_plan(mask, score_mod, cache)  # type: ignore[arg-type]  # narrowed by `kind`
    graphs, logits = Graphs(), []
    for start, end in _pieces(length) if cached else [(0, length)]:
        # Compiled code is guarded on strides, so copy instead of slicing.
        part, segment = (x[:, start:end].clone(memory_format=torch.contiguous_format) for x in (ids, tokens.segment))
        run, backend = graphs.of(end - start) if way == "compiled" else run_eager, _BACKENDS[way]
        with nullcontext() if cache is None else cache.appending(end - start):
            x, _ = model.step(part, None, None, segment, cache, plan, backend, run)
            logits.append(model.head(x))
    return torch.cat(logits, 1)


# ---- the command


class Parser(argparse.ArgumentParser):
    """Report wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"error: {message}\n")


def load(target: str) -> Any:
    """Return the object FILE.py:NAME. Raises ValueError for a missing file or name, and for a file that fails."""
    file, _, name = target.rpartition(":")
    if not file or not name:
        raise ValueError(f"{target} is not FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(_MODULE, file)
    if not Path(file).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE.py` does
    try:
        _, fault = attempt(spec.loader.exec_module, module)
    except SystemExit as error:
        raise ValueError(f"{file}: exits when it is run; put that under `if __name__ == '__main__':`") from error
    if fault:
        raise ValueError(f"{file}: {fault.message}")
    if not hasattr(module, name):
        raise ValueError(f"{file}: has no {name}")
    return getattr(module, name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0 without errors, 1 with errors, 2 for a wrong argument."""
    parser = Parser(
        prog="python -m llama_flex.eval.check_mask",
        description="Check a mask or a score function for mistakes. NAME is a Mask, a predicate (q, kv), a ScoreMod, a "
        "score function (score, q, kv), or FlexAttention's mask_mod(b, h, q_idx, kv_idx) or score_mod(score, b, h, "
        "q_idx, kv_idx). Exit code: 0 without errors, 1 with errors, 2 for a wrong argument.",
    )
    parser.add_argument("target", metavar="FILE.py:NAME", help="a mask, a predicate, a score function; FILE.py is run")
    parser.add_argument("--heads", type=int, default=4, help="number of query heads (default: 4)")
    parser.add_argument(
        "--no-compile", action="store_true", help="skip the checks of compiled code, which take most of the time"
    )
    options = parser.parse_args(arguments)

    try:
        findings = check_mask(
            load(options.target),
            num_heads=options.heads,
            compile=not options.no_compile,
            passed=lambda line: print(f"passed: {line}", flush=True),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    return int(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
