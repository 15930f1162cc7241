"""The steps of many requests: computed in a few sizes, each always in the same memory, so that they can be replayed.

What a step does is in a few tensors that the host fills; what it leaves for the next one, the newest tokens, stays on
the device, so the host need not wait for it. Dimensions: R rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import Layers
from .decoding import Buffer, reading
from .explain import Last
from .fusion import combined
from .model import Llama, plainly
from .paging import PagedCache, Rows, sent
from .request import Request, Text
from .sampling import SamplingTensors, all_finite, sample
from .together import Row, Rules

if TYPE_CHECKING:
    from .engine import Engine

WIDTH = 64  # tokens of a prompt in a row of a step, at most
_ROW_MEAN = 32  # a step of N tokens has N // 32 rows: room for short prompts, whose rows are half empty
# What the host says of each row of a step, to choose its next token; INTS as int64, REALS as float32.
_INTS = ("seat", "id", "position", "segment", "done", "top_k", "seed", "leader", "members", "is_max")
_REALS = ("temperature", "tail", "min_p", "repetition_penalty")


class Unread(NamedTuple):
    """Tokens of a step that may not be there yet, and the row of each request."""

    read: Callable[[], list[list[float]]]
    rows: list[tuple[Request, int]]


class Piece(NamedTuple):
    """What a row of a step computes of a prompt: `length` tokens from `start` on."""

    request: Request
    text: Text
    start: int
    length: int


class Batches:
    """Computes steps of requests that have seats. A seat is what stays of a text from step to step."""

    def __init__(self, engine: Engine, cache: PagedCache, seats: int, tokens: int, blocks: int) -> None:
        """tokens: of prompts in a step at most, a multiple of WIDTH. blocks: of slots of a text at most."""
        self.engine, self.model, self.cache = engine, engine.model, cache
        self.seats, self.blocks = seats, blocks
        # Compiled for each size that occurs. Up to 64 rows a step takes no longer: its products wait for the weights.
        sizes = 1, 8, *(64 << i for i in range(seats.bit_length()))
        self.decode_sizes = sorted({min(size, seats) for size in sizes})
        self.prefill_sizes = sorted({min(WIDTH << i, tokens) for i in range(tokens.bit_length())})
        self.max_pieces = tokens // _ROW_MEAN
        self.rules = Rules(self.model, max(seats, self.max_pieces))
        device = self.model.device
        # One seat more takes what padding leaves.
        self._ints = np.zeros((seats + 1, len(_INTS)), np.int64)
        self._reals = np.ones((seats + 1, len(_REALS)), np.float32)
        self._ints[:, _INTS.index("seat")] = np.arange(seats + 1)
        self._newest = torch.zeros(seats + 1, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None  # [seats + 1, V], once a request has a repetition penalty
        self._results = {
            width: torch.zeros(3, rows, dtype=torch.float64, device=device)
            for width, rows in ((WIDTH, self.max_pieces), (1, seats))
        }
        self._buffers: dict[tuple[int, int], Buffer] = {}
        self._steps: dict[tuple[Any, ...], Callable[[], object]] = {}
        self._recorded: set[tuple[Any, ...]] = set()
        self._generation = self.rules.generation

    def forget_recorded(self, keep: Iterable[Layers] = ()) -> None:
        """Record steps anew, but those of some layers: their parameters or their rules are others."""
        kept = set(keep)
        self._steps = {key: step for key, step in self._steps.items() if key[-1] in kept}
        self._recorded &= self._steps.keys()

    def sit(self, request: Request, text: Text, done: int) -> None:
        """Fill in a seat, for a text whose next token is the one after `done` new ones."""
        s = request.sampling
        id, position, segment = text.tokens[:, -1].tolist()
        row = {
            "seat": text.seat,
            "id": id,
            "position": position,
            "segment": segment,
            "done": done,
            "top_k": s.top_k,
            "seed": s.seed,
            "members": len(request.texts),
            "is_max": request.ensemble.combine == "max",
        }
        self._ints[text.seat] = [row.get(name, 0) for name in _INTS]
        self._reals[text.seat] = s.divisor, 1 - s.top_p, s.min_p, s.repetition_penalty
        if s.repetition_penalty != 1:
            if self._seen is None:
                shape = self.seats + 1, self.model.config.vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
            ids = torch.from_numpy(np.concatenate([other.tokens[0] for other in request.texts]))
            self._seen[text.seat] = False
            self._seen[text.seat, sent(ids, self.model.device)] = True

    def prefill(self, pieces: Sequence[Piece], running: Iterable[Request]) -> list[Unread]:
        """Enqueue some of some prompts, and the next token of each that ends there; chosen as all that run may need it,
        so that few graphs are compiled."""
        count = sum(piece.length for piece in pieces)
        size = next(s for s in self.prefill_sizes if s >= count and s // _ROW_MEAN >= len(pieces))
        buffer, filled = self._numbers(size, WIDTH)
        # Spread: a CPU's threads get rows side by side, and should all have something to do.
        at = {n * (size // _ROW_MEAN) // len(pieces): piece for n, piece in enumerate(pieces)}
        for row, (_, text, start, length) in at.items():
            filled["rows"][:, row] = start, text.start, length
            filled["tokens"][:, row, :length] = text.tokens[:, start : start + length]
        lengths = filled["rows"][2]
        padding = np.arange(WIDTH) >= lengths[:, None]
        filled["chosen"][:] = np.argsort(padding.ravel(), kind="stable")[:size]
        filled["last"][:] = np.maximum(lengths.cumsum() - 1, 0)
        ends = {row: p for row, p in at.items() if p.start + p.length == p.text.tokens.shape[1]}
        self._seat(filled, {row: p.text for row, p in ends.items()})
        rows = {row: (p.request, p.text) for row, p in at.items()}
        asked = [(p.request, row) for row, p in ends.items()]
        self._run(size, WIDTH, buffer, filled, rows, asked, _kinds(running) if asked else ())
        return [Unread(reading(self._results[WIDTH]), asked)] if asked else []

    def decode(self, going: Sequence[Request]) -> Unread:
        """Enqueue a token of each request."""
        rows = dict(enumerate((request, text) for request in going for text in request.texts))
        size = next(s for s in self.decode_sizes if s >= len(rows))
        buffer, filled = self._numbers(size, 1)
        self._seat(filled, {row: text for row, (_, text) in rows.items()})
        leaders: dict[int, int] = {}
        for row, (request, text) in rows.items():
            filled["rows"][:, row] = text.start, text.start + 1, 1
            text.start += 1
            filled["ints"][_INTS.index("leader"), row] = leaders.setdefault(request.number, row)
        asked = [(request, leaders[request.number]) for request in going]
        self._run(size, 1, buffer, filled, rows, asked, _kinds(going))
        return Unread(reading(self._results[1]), asked)

    def _seat(self, filled: dict[str, np.ndarray], texts: Mapping[int, Text]) -> None:
        """What is in the seats of texts, each in its row; the other rows choose for nobody."""
        rows = filled["ints"].shape[1]
        seats = [texts[row].seat if row in texts else self.seats for row in range(rows)]
        filled["ints"][:] = self._ints[seats].T
        filled["reals"][:] = self._reals[seats].T
        filled["ints"][_INTS.index("leader")] = np.arange(rows)

    def _numbers(self, size: int, width: int) -> tuple[Buffer, dict[str, np.ndarray]]:
        """The buffer of a step of so many tokens in rows of a width, and what to fill in."""
        if (size, width) not in self._buffers:
            rows = size if width == 1 else size // _ROW_MEAN
            shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                "of_block": (torch.int32, (rows, self.blocks)),
                "rows": (torch.int32, (3, rows)),
                "ints": (torch.int64, (len(_INTS), rows)),
                "reals": (torch.float32, (len(_REALS), rows)),
            }
            if width > 1:
                shapes |= {"tokens": (torch.int64, (3, rows, width)), "chosen": (torch.int64, (size,))}
                shapes |= {"last": (torch.int64, (rows,))}
            self._buffers[size, width] = Buffer(self.model.device, shapes)
        buffer = self._buffers[size, width]
        filled = buffer.fill()
        filled["of_block"].fill(self.cache.pool.count)
        filled["rows"].fill(0)
        if width > 1:
            filled["tokens"].fill(0)  # what padding had before is more than a table may have that a rule looks it up in
        return buffer, filled

    def _run(
        self,
        size: int,
        width: int,
        buffer: Buffer,
        filled: dict[str, np.ndarray],
        rows: Mapping[int, tuple[Request, Text]],
        asked: list[tuple[Request, int]],
        kinds: tuple[bool, ...],
    ) -> None:
        """Enqueue a step. asked: which requests get a token, and in which row."""
        for row, (_, text) in rows.items():
            filled["of_block"][row, : len(text.pages)] = text.pages
        layers = self.rules.layers(
            {n: Row(r.pattern, r.texts.index(t), t.prompt.log_weights) for n, (r, t) in rows.items()}
        )
        if self._generation != self.rules.generation:
            self._generation = self.rules.generation
            self.forget_recorded(keep=[rule.layers for rule in self.rules.rules])
        buffer.send()
        start, end, count = buffer.on_device["rows"].unbind(0)
        of_block = buffer.on_device["of_block"]
        if not self.engine.compile:  # then shapes may differ, and what no row needs is not looked at
            of_block = of_block[:, : max(len(text.pages) for _, text in rows.values())]
        cache = Rows(self.cache, of_block, start, end, buffer.on_device.get("chosen"))
        self.engine.last = Last(layers, lambda: cache.tokens)
        key = size, width, kinds, layers  # forget_recorded reads the last
        if key not in self._steps:
            step = self._step(width, buffer.on_device, layers, cache, count, kinds)
            step()
            if self.engine.compile:
                self._steps[key] = step
        elif key not in self._recorded:
            _, self._steps[key] = self.engine.graphs.record(self._steps[key], self.model.device)
            self._recorded.add(key)
        else:
            self._steps[key]()
        for request, _ in asked:
            request.asked += 1
            for text in request.texts:
                after = text.prompt.generated_position or 0
                values = {
                    "id": -1,
                    "position": after + request.asked - 1,
                    "segment": text.prompt.generated_segment,
                    "done": request.asked,
                }
                self._ints[text.seat, [_INTS.index(n) for n in values]] = list(values.values())

    def _step(
        self,
        width: int,
        given: dict[str, Tensor],
        layers: Layers,
        cache: Rows,
        count: Tensor,
        kinds: tuple[bool, ...],
    ) -> Callable[[], None]:
        """What computes a step, from what is given and always in the same memory."""
        engine, rows = self.engine, len(count)
        ints = dict(zip(_INTS, given["ints"].unbind(0), strict=True))
        reals = dict(zip(_REALS, given["reals"].unbind(0), strict=True))
        result = self._results[width][:, :rows]
        state = _State(**ints, **reals, last=given.get("last"), newest=self._newest, seen=self._seen, result=result)
        run = engine.graphs.of("paged", rows, width, self.seats, kinds) if engine.compile else plainly

        def step() -> None:
            if width == 1:
                ids, positions, segments = run("feed", _feed, state)
            else:
                ids, positions, segments = given["tokens"].unbind(0)
            x, _ = engine._step(ids, count, positions, segments, layers, cache)
            if kinds:
                run("choose", _choose, self.model, x, state, kinds)

        return step


def _kinds(requests: Iterable[Request]) -> tuple[bool, ...]:
    """What any of them needs: temperature, top_k or top_p, min_p, repetition_penalty, several rows."""
    each = [
        (
            r.sampling.temperature > 0,
            r.sampling.top_k > 0 or r.sampling.top_p < 1,
            r.sampling.min_p > 0,
            r.sampling.repetition_penalty != 1,
            len(r.texts) > 1,
        )
        for r in requests
    ]
    return tuple(map(any, zip(*each, strict=True)))


class _State(NamedTuple):
    """What choosing tokens reads and changes. Of each row `[R]`, in the order of _INTS and _REALS; and of seats."""

    seat: Tensor
    id: Tensor  # -1: the one chosen in the step before
    position: Tensor
    segment: Tensor
    done: Tensor
    top_k: Tensor
    seed: Tensor
    leader: Tensor
    members: Tensor
    is_max: Tensor
    temperature: Tensor
    tail: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    last: Tensor | None  # where each row's last token is among those computed, if they are packed
    newest: Tensor  # [seats]
    seen: Tensor | None  # [seats, V]
    result: Tensor  # [3, R], float64: tokens, their log-probabilities, and whether all logits were finite


def _feed(s: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and segments to go on with, each `[R, 1]`."""
    ids = torch.where(s.id < 0, s.newest[s.seat], s.id)
    return ids[:, None], s.position[:, None].to(torch.int32), s.segment[:, None].to(torch.int32)


def _choose(model: Llama, x: Tensor, s: _State, kinds: tuple[bool, ...]) -> None:
    """From the last layer's output, `[R, 1, E]` or packed, to the next token of each row."""
    random, cut, least, penalty, several = kinds
    parameters = SamplingTensors(
        s.temperature if random else None,
        s.top_k if cut else None,
        s.tail if cut else None,
        s.min_p if least else None,
        s.repetition_penalty if penalty else None,
        s.seed if random else None,
    )
    x = x if s.last is None else x[0, s.last, None]
    logits = model.head(x)[:, 0]
    finite = all_finite(logits).double()
    if several:
        finite = torch.ones_like(finite).scatter_reduce(0, s.leader, finite, "amin")
        logits = combined(logits, s.leader, s.is_max > 0, s.members)
    seen = s.seen[s.seat] if penalty and s.seen is not None else None
    token, logprob = sample(logits, parameters, s.done, seen)
    if several:
        token = token[s.leader]
    if seen is not None and s.seen is not None:
        s.seen[s.seat, token] = True
    s.newest[s.seat] = token
    s.result.copy_(torch.stack((token.double(), logprob.double(), finite)))
