"""Continuous batching: requests come and go while others run, over one pool of pages.

Every step computes a chunk of prompts, in rows of 64 tokens that may be of different requests, and then one token
for each request that is under way. What it does is in a few tensors of fixed sizes that the host fills; what it leaves
for the next one, the newest tokens, stays on the device. So steps are compiled for a few sizes and replayed, and tokens
are read while the next step runs. Dimensions: R rows of a step, V vocabulary.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import masks, scores
from .attention import Layers
from .decoding import WEIGHTS, reading
from .explain import Last
from .fusion import AnyPrompt, Ensemble, Prompt, as_ensemble, combined
from .masks import BLOCK, Mask
from .model import Llama, plainly
from .paging import PagedCache, Pool, Rows
from .rules import Token, take
from .sampling import Sampling, SamplingTensors, sample, seeded
from .scores import ScoreMod
from .streaming import Completion, Step, Steps

if TYPE_CHECKING:
    from .engine import Engine

BATCH_SIZE = {"cpu": 8, "cuda": 256}
PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}  # of a step; a GPU needs many to be busy
ROW = 64  # tokens of a prompt in a row of a step; the last row of a prompt is padded
_WORTH_COPYING = 16  # tokens; as long as computing few, copying a page takes
PATTERNS = 8  # that may run at a time: every one is evaluated for every row


class _Sequence:
    """One text of a request: a prompt and what is generated after it."""

    def __init__(self, prompt: Prompt, tokens: np.ndarray, key: Hashable) -> None:
        """tokens: ids, positions and segments, `[3, N]`, of what there is so far. key: what else decides its keys and
        values; None if they are not to be shared."""
        self.prompt, self.tokens, self.key = prompt, tokens, key
        self.pages: list[int] = []
        self.start = 0  # how many of its tokens are in pages
        self.goal = tokens.shape[1] - 1  # how many are to be there; the last one is fed as new tokens are
        self.seat = -1
        self._contents: list[bytes] = []  # what is in the pages before each, as far as it was asked

    def before(self, page: int) -> bytes:
        """What stands for all tokens before a page, each after those before it, and for `key`."""
        if not self._contents:
            self._contents.append(repr(self.key).encode())
        while page >= len(self._contents):
            block = np.ascontiguousarray(self.block(len(self._contents) - 1))
            self._contents.append(hashlib.sha256(self._contents[-1] + block.tobytes()).digest())
        return self._contents[page]

    def block(self, page: int, end: int | None = None) -> np.ndarray:
        """The tokens of a page, as far as there are any, or up to token `end`."""
        return self.tokens[:, page * BLOCK : min((page + 1) * BLOCK, end or self.tokens.shape[1])]


@dataclass(eq=False)
class Request:
    """A prompt under way, and what it has given so far; what `Engine.submit` returns.

    steps: every token so far. finish_reason: "stop" (a stop token or string), "length", "cancelled", "error" (its
    callback raised: `error`), or None while it waits or runs. `async for step in request` gives steps as they come.
    """

    number: int
    sampling: Sampling
    priority: int
    steps: list[Step] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    _ensemble: Ensemble = field(kw_only=True, repr=False)
    _maker: Steps = field(kw_only=True, repr=False)
    _callback: Callable[[Step], object] | None = field(kw_only=True, repr=False)
    _rule: _Rule = field(kw_only=True, repr=False)
    _scheduler: Scheduler = field(kw_only=True, repr=False)
    _sequences: list[_Sequence] = field(default_factory=list, repr=False)
    _asked: int = field(default=0, repr=False)  # how many tokens have been asked for; the last may not be read yet
    _pattern: int = field(default=0, repr=False)

    @property
    def completion(self) -> Completion:
        """What there is so far, in one."""
        whole = Completion()
        for step in self.steps:
            whole.add(step)
        whole.finish_reason = self.finish_reason
        return whole

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def __lt__(self, other: Request) -> bool:
        return (-self.priority, self.number) < (-other.priority, other.number)

    async def __aiter__(self) -> AsyncIterator[Step]:
        """The steps, as they come; the engine runs meanwhile, in a thread. Cancels the request if left early."""
        try:
            for n in itertools.count():
                while n >= len(self.steps) and not self.finished:
                    await self._scheduler.advance()
                if n >= len(self.steps):
                    break
                yield self.steps[n]
        finally:
            self._scheduler.cancel(self)
        if self.error is not None:
            raise self.error


class _Rule(NamedTuple):
    """How a request attends. key: equal for requests that attend alike."""

    key: Hashable
    given: object  # what the key was made of: it holds addresses of tensors, so they must stay
    layers: Layers
    shares: bool  # pages with others: nothing but the tokens decides what they hold


class _Buffer:
    """Numbers of one step, which the host fills and the device reads, always in the same memory."""

    def __init__(self, device: torch.device, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.on_device = {n: torch.zeros(shape, dtype=dtype, device=device) for n, (dtype, shape) in shapes.items()}
        self._device = device
        self._hosts = []  # two, so that one is filled while the other is copied
        for _ in range(2 if device.type == "cuda" else 0):
            pinned = {n: torch.zeros(shape, dtype=dtype, pin_memory=True) for n, (dtype, shape) in shapes.items()}
            self._hosts.append((pinned, torch.cuda.Event()))

    def fill(self) -> dict[str, np.ndarray]:
        """What to write the next step's numbers to, before `send`."""
        if not self._hosts:
            return {n: x.numpy() for n, x in self.on_device.items()}
        self._hosts.reverse()
        pinned, sent = self._hosts[0]
        sent.synchronize()
        return {n: x.numpy() for n, x in pinned.items()}

    def send(self) -> None:
        """Give the device what was filled in; does not wait."""
        for pinned, sent in self._hosts[:1]:
            for name, x in pinned.items():
                self.on_device[name].copy_(x, non_blocking=True)
            sent.record(torch.cuda.current_stream(self._device))


class _Unread(NamedTuple):
    """Tokens of a step that may not be there yet, and the row of each request."""

    read: Callable[[], list[list[float]]]
    rows: list[tuple[Request, int]]


# What the host says of each row of a decoding step; INTS as int64, REALS as float32.
_INTS = ("seat", "id", "position", "segment", "done", "top_k", "seed", "leader", "members", "is_max")
_REALS = ("temperature", "top_p", "min_p", "repetition_penalty")


class Scheduler:
    """Runs the requests of an engine, many at a time; see `Engine.submit`.

    What a request gets does not depend on what else runs.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_size: int | None,
        max_slots: int | None,
        max_length: int | None,
        memory_fraction: float,
        prefill_tokens: int | None,
    ) -> None:
        self.engine, self.model = engine, engine.model
        config, device = self.model.config, self.model.device
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_slots", max_slots),
            ("max_length", max_length),
            ("prefill_tokens", prefill_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.max_batch_size = max_batch_size = max_batch_size or BATCH_SIZE[device.type]
        blocks = -(-(max_length or self.model.context) // BLOCK)
        if max_slots is None:
            pages = min(max_batch_size * blocks, PagedCache.most_pages(config))
            pages = min(pages, _pages_that_fit(self.model, memory_fraction))
        else:
            pages = -(-max_slots // BLOCK)
        self.cache = PagedCache(config, pages, dtype=self.model.dtype, device=device)
        blocks = min(blocks, pages)
        self.max_length = blocks * BLOCK
        self.prefill_rows = -(-(prefill_tokens or PREFILL_TOKENS[device.type]) // ROW)
        # Compiled for each size that occurs. Up to 64 rows a step takes no longer: its products wait for the weights.
        rows, chunks = (1, 8, *(64 << i for i in range(16))), (4**i for i in range(16))
        self.sizes = {
            1: sorted({min(size, max_batch_size) for size in rows}),
            ROW: sorted({min(size, self.prefill_rows) for size in chunks}),
        }

        self._inbox: deque[Request] = deque()  # from any thread
        self._waiting: list[Request] = []
        self._copies: list[tuple[int, int]] = []  # of pages, in this step
        self._sent_away: list[Request] = []  # in this step; they wait once it is done
        self._running: list[Request] = []
        self._ended: deque[Request] = deque()  # from any thread
        self._unread: _Unread | None = None
        self.prompt_tokens = self.new_tokens = 0  # computed so far, and given so far
        self._numbers = itertools.count()
        self._advancing: asyncio.Task[object] | None = None

        # A seat for each sequence, and one that takes what padding leaves.
        self._seats = list(range(max_batch_size))[::-1]
        self._ints = np.zeros((max_batch_size + 1, len(_INTS)), np.int64)
        self._reals = np.ones((max_batch_size + 1, len(_REALS)), np.float32)
        self._ints[:, _INTS.index("seat")] = np.arange(max_batch_size + 1)
        self._newest = torch.zeros(max_batch_size + 1, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None  # [seats, V], once a request has a repetition penalty
        self._result = torch.zeros(2, max_batch_size, dtype=torch.float64, device=device)

        self._blocks = blocks
        self._buffers: dict[tuple[int, int], _Buffer] = {}
        self._steps: dict[tuple[Any, ...], Callable[[], object]] = {}
        self._recorded: set[tuple[Any, ...]] = set()
        self._rules = [self._rule(None, None, False)]
        self._combined: dict[Hashable, Layers] = {}
        self._of_row = self._tables(0)
        self._weights: list[tuple[int, int]] = []
        self._version = 0  # of the weights: what was computed with others is not shared

    @property
    def pool(self) -> Pool:
        """The pages."""
        return self.cache.pool

    @property
    def waiting(self) -> list[Request]:
        """Those that wait for their turn, the next one first."""
        return sorted(r for r in (*self._inbox, *self._waiting) if not r.finished)

    @property
    def running(self) -> list[Request]:
        """Those whose tokens are being computed, the oldest first."""
        return sorted(self._running)

    @property
    def num_waiting(self) -> int:
        """How many wait, about: the cancelled ones leave when it is their turn."""
        return len(self._inbox) + len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many run."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self._waiting or self._running or self._unread)

    def submit(
        self,
        prompt: AnyPrompt,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Iterable[int] | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        priority: int = 0,
        callback: Callable[[Step], object] | None = None,
    ) -> Request:
        """See `Engine.submit`."""
        engine, model = self.engine, self.model
        (limit,) = engine.check([prompt], max_new_tokens)
        ensemble = as_ensemble(prompt)
        if len(ensemble.prompts) > self.max_batch_size:
            raise ValueError(f"{len(ensemble.prompts)} prompts in one request; max_batch_size is {self.max_batch_size}")
        lengths = [len(p.ids) for p in ensemble.prompts]
        if max_new_tokens is None:  # as many as fit, if all have the same room
            room = min(self.max_length, self.pool.count // len(lengths) * BLOCK)
            limit = max(1, min(limit, room - max(lengths)))
        pages = sum(-(-(length + limit) // BLOCK) for length in lengths)
        if max(lengths) + limit > self.max_length or pages > self.pool.count:
            raise ValueError(
                f"{sum(lengths)} tokens and {limit} new ones exceed the slots: {self.max_length} of a sequence and "
                f"{self.pool.count * BLOCK} in all; ask for fewer, or give the engine a larger max_length or max_slots"
            )
        stop_ids = model.eos_token_ids if stop_token_ids is None else stop_token_ids
        number = next(self._numbers)
        request = Request(
            number,
            seeded(sampling or Sampling.recommended(model.generation_config)),
            priority,
            _ensemble=ensemble,
            _maker=Steps(number, engine.tokenizer, ensemble.prompts[0].ids, stop, stop_ids, limit),
            _callback=callback,
            _rule=self._rule(mask, score_mod, any(p.generated_segment == masks.GENERATED for p in ensemble.prompts)),
            _scheduler=self,
        )
        self._inbox.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request, at once or, from another thread, after the step that runs; what it has given stays."""
        if not request.finished:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        if request.finish_reason is None:
            request.finish_reason = reason
            self._ended.append(request)
        elif reason == "error":  # in the callback for the last token
            request.finish_reason = reason

    async def advance(self) -> None:
        """Wait for a step, which one of all that wait starts."""
        task = self._advancing
        if task is None or task.done():
            task = self._advancing = asyncio.create_task(asyncio.to_thread(self.step))
        await asyncio.shield(task)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Compute a chunk of prompts, and a token of each request under way; returns the requests that have ended.

        If it fails or is interrupted, what was under way waits again, and nothing that was read is lost.
        """
        done = False
        try:
            while self._inbox:
                if len(self._rules) < PATTERNS:
                    self._pattern_of(self._inbox[0])  # known early, so that steps are compiled for all of them at once
                heapq.heappush(self._waiting, self._inbox[0])
                self._inbox.popleft()
            self._look_at_weights()
            self._clear()
            self._make_room()
            self._prefill()
            asked = self._decode()
            if self.model.device.type == "cuda":  # read while the next step runs
                asked, self._unread = self._unread, asked
            self._read(asked)
            self._clear()
            while self._sent_away:
                heapq.heappush(self._waiting, self._sent_away[-1])
                self._sent_away.pop()
            done = True
        finally:
            if not done:  # an error, or Ctrl-C
                self._start_over()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _look_at_weights(self) -> None:
        weights = [(id(p), p._version) for p in self.model.parameters()]
        if weights != self._weights:
            if [id for id, _ in weights] != [id for id, _ in self._weights]:
                self._steps, self._recorded = {}, set()  # they compute with the ones that were there
            self._weights, self._version = weights, self._version + 1

    # ---- who runs

    def _make_room(self) -> None:
        """A page for the next token of each request, if need be of one that came later, which must wait then."""
        for request in self.running:
            for sequence in request._sequences if self._goes_on(request) else ():
                if sequence.start < len(sequence.pages) * BLOCK:
                    continue
                while not self.pool.available and request._sequences:
                    self._sent_away.append(max(self._running))
                    self._leave(self._sent_away[-1])
                if not request._sequences:
                    break
                sequence.pages.append(self.pool.take())

    def _goes_on(self, request: Request) -> bool:
        return request._asked < request._maker.limit and all(s.start >= s.goal for s in request._sequences)

    def _admit(self) -> Request | None:
        """The next request that waits, if there are seats and pages for it."""
        while self._waiting and self._waiting[0].finished:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return None
        request = self._waiting[0]
        prompts = request._ensemble.prompts
        pattern = self._pattern_of(request)
        if len(prompts) > len(self._seats) or pattern is None:
            return None
        request._pattern = pattern
        new = [step.token for step in request.steps]
        for prompt in prompts:
            # Weights are of a fused prompt, and change what comes after it.
            key = (request._rule.key, prompt.log_weights, self._version) if request._rule.shares else None
            request._sequences.append(_Sequence(prompt, _tokens(prompt, new), key))
        copies = []
        for sequence in request._sequences:
            sequence.pages = list(self._found(sequence))
            sequence.start = len(sequence.pages) * BLOCK
            needed = -(-sequence.tokens.shape[1] // BLOCK) - len(sequence.pages)
            if needed > self.pool.available:
                self._give_back(request)
                return None
            page, count = self._beginning(sequence)
            sequence.pages += [self.pool.take() for _ in range(needed)]
            if count:
                copies.append((page, sequence.pages[sequence.start // BLOCK]))
                sequence.start += count
        self._copies += copies
        self._running.append(request)  # first: an interrupt between the two must find it somewhere
        heapq.heappop(self._waiting)
        request._asked = len(new)
        for sequence in request._sequences:
            self.prompt_tokens += sequence.goal + 1 - sequence.start
            sequence.seat = self._seats.pop()
            self._sit(request, sequence, len(new))
        return request

    def _sit(self, request: Request, sequence: _Sequence, done: int) -> None:
        """Fill in a seat for the step that feeds the last token known."""
        s = request.sampling
        id, position, segment = sequence.tokens[:, -1].tolist()
        row = {
            "seat": sequence.seat,
            "id": id,
            "position": position,
            "segment": segment,
            "done": done,
            "top_k": s.top_k,
            "seed": s.seed,
            "members": len(request._sequences),
            "is_max": request._ensemble.combine == "max",
        }
        self._ints[sequence.seat] = [row.get(name, 0) for name in _INTS]
        temperature = s.temperature if s.temperature > 1e-30 else 0.0  # see `sampling.stack`
        self._reals[sequence.seat] = temperature, s.top_p, s.min_p, s.repetition_penalty
        if s.repetition_penalty != 1:
            if self._seen is None:
                shape = self.max_batch_size + 1, self.model.config.vocab_size
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
            ids = torch.from_numpy(np.concatenate([other.tokens[0] for other in request._sequences]))
            self._seen[sequence.seat] = False
            self._seen[sequence.seat, ids.to(self.model.device)] = True

    def _found(self, sequence: _Sequence) -> Iterator[int]:
        """The pages that hold the beginning of a sequence already, now its own too."""
        for number in range(sequence.goal // BLOCK if sequence.key is not None else 0):
            page = self.pool.find(sequence.before(number + 1))
            if page is None:
                return
            yield page

    def _beginning(self, sequence: _Sequence) -> tuple[int, int]:
        """A page that holds some of the tokens that come next, and how many."""
        number = sequence.start // BLOCK
        if sequence.key is None:
            return -1, 0
        page, count = self.pool.find_beginning(sequence.before(number), sequence.block(number, sequence.goal))
        return (page, count) if count >= _WORTH_COPYING else (-1, 0)

    def _name(self, sequence: _Sequence, start: int, end: int) -> None:
        """Let others use the pages that tokens `start` to `end` fill."""
        for number in range(start // BLOCK, end // BLOCK if sequence.key is not None else 0):
            self.pool.name(sequence.pages[number], sequence.before(number + 1))

    def _begin(self, sequence: _Sequence, start: int, end: int) -> None:
        """Let others copy, once they are computed, tokens `start` to `end` and what is before them in their pages."""
        for number in range(start // BLOCK, -(-end // BLOCK) if sequence.key is not None else 0):
            self.pool.begin(sequence.pages[number], sequence.before(number), sequence.block(number, end))

    def _leave(self, request: Request) -> None:
        """Give back what a request runs with."""
        new = [step.token for step in request.steps]
        for sequence in request._sequences:
            sequence.tokens = _tokens(sequence.prompt, new)
            end = min(sequence.start, sequence.tokens.shape[1])
            self._name(sequence, sequence.goal, end)
            self._begin(sequence, sequence.goal, end)
            self._seats.append(sequence.seat)
        self._give_back(request)
        self._running.remove(request)

    def _give_back(self, request: Request) -> None:
        for sequence in request._sequences:
            for page in reversed(sequence.pages):  # the end of a text is forgotten before its beginning
                self.pool.give_back(page)
        request._sequences = []

    def _clear(self) -> None:
        for request in [r for r in self._running if r.finished]:
            self._leave(request)

    def _start_over(self) -> None:
        """After a step that failed: what it wrote is unknown, and who holds what."""
        under_way = {*self._running, *self._waiting, *self._sent_away}
        for request in under_way:
            request._sequences = []
        arriving = set(self._inbox.copy())  # one may be on its way from there
        self._waiting = sorted(r for r in under_way - arriving if not r.finished)
        self._running, self._sent_away, self._copies, self._unread = [], [], [], None
        self._seats = list(range(self.max_batch_size))[::-1]
        self.cache.pool = Pool(self.pool.count)

    # ---- what runs

    def _prefill(self) -> None:
        """Enqueue a chunk: blocks of prompts, of those under way and then of those that can begin."""
        chosen: list[tuple[Request, _Sequence, int, int]] = []  # with the first token, and how many
        begun = (r for r in self.running if not all(s.start >= s.goal for s in r._sequences))
        while len(chosen) < self.prefill_rows and (request := next(begun, None) or self._admit()):
            for sequence in request._sequences:
                first = sequence.start
                while sequence.start < sequence.goal and len(chosen) < self.prefill_rows:
                    count = min(ROW, sequence.goal - sequence.start)
                    chosen.append((request, sequence, sequence.start, count))
                    sequence.start += count
                self._name(sequence, first, sequence.start)  # others may use them in this very step: see `Rows`
        if self._copies:
            self.cache.copy(self._copies)
            self._copies = []
        if not chosen:
            return
        size, buffer, filled = self._filling(len(chosen), ROW)
        for row, (_, sequence, start, count) in enumerate(chosen):
            filled["rows"][:, row] = start, sequence.start, count
            filled["tokens"][:, row, :count] = sequence.tokens[:, start : start + count]
        self._run(size, ROW, buffer, filled, [(r, s) for r, s, _, _ in chosen], ())
        for _, sequence, start, count in chosen:
            self._begin(sequence, start, start + count)

    def _decode(self) -> _Unread | None:
        """Enqueue a token of each request whose prompt is done."""
        going = [r for r in self.running if self._goes_on(r)]
        if not going:
            return None
        rows = [(request, sequence) for request in going for sequence in request._sequences]
        size, buffer, filled = self._filling(len(rows), 1)
        seats = [sequence.seat for _, sequence in rows]
        seats += [self.max_batch_size] * (size - len(rows))
        filled["ints"][:] = self._ints[seats].T
        filled["reals"][:] = self._reals[seats].T
        filled["ints"][_INTS.index("leader")] = np.arange(size)  # padding too is no other's
        leaders: dict[int, int] = {}
        for row, (request, sequence) in enumerate(rows):
            filled["rows"][:, row] = sequence.start, sequence.start + 1, 1
            sequence.start += 1
            filled["ints"][_INTS.index("leader"), row] = leaders.setdefault(request.number, row)
        self._run(size, 1, buffer, filled, rows, _kinds(going))
        for request in going:
            request._asked += 1
            for sequence in request._sequences:
                after = sequence.prompt.generated_position or 0
                values = {
                    "id": -1,
                    "position": after + request._asked - 1,
                    "segment": sequence.prompt.generated_segment,
                    "done": request._asked,
                }
                self._ints[sequence.seat, [_INTS.index(n) for n in values]] = list(values.values())
        return _Unread(reading(self._result), [(request, leaders[request.number]) for request in going])

    def _filling(self, count: int, width: int) -> tuple[int, _Buffer, dict[str, np.ndarray]]:
        """The size of a step for so many rows, its buffer, and what to fill in."""
        size = next(s for s in self.sizes[width] if s >= count)
        if (size, width) not in self._buffers:
            shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
                "of_block": (torch.int32, (size, self._blocks)),
                "rows": (torch.int32, (3, size)),
            }
            if width == 1:
                shapes |= {"ints": (torch.int64, (len(_INTS), size)), "reals": (torch.float32, (len(_REALS), size))}
            else:
                shapes |= {"tokens": (torch.int64, (3, size, width))}
            self._buffers[size, width] = _Buffer(self.model.device, shapes)
        buffer = self._buffers[size, width]
        filled = buffer.fill()
        filled["of_block"].fill(self.pool.count)
        filled["rows"].fill(0)
        return size, buffer, filled

    def _run(
        self,
        size: int,
        width: int,
        buffer: _Buffer,
        filled: dict[str, np.ndarray],
        rows: list[tuple[Request, _Sequence]],
        kinds: tuple[bool, ...],
    ) -> None:
        for row, (_, sequence) in enumerate(rows):
            filled["of_block"][row, : len(sequence.pages)] = sequence.pages
        layers = self._layers(rows)
        buffer.send()
        start, end, count = buffer.on_device["rows"].unbind(0)
        of_block = buffer.on_device["of_block"]
        if not self.engine.compile:  # then shapes may differ, and what no row needs is not looked at
            of_block = of_block[:, : max(len(sequence.pages) for _, sequence in rows)]
        cache = Rows(self.cache, of_block, start, end)
        if width == 1:
            self.engine.last = Last(layers, lambda: cache.tokens)
        key = size, width, kinds, layers
        if key not in self._steps:
            step = self._step(size, buffer.on_device, layers, cache, count, kinds)
            step()
            if self.engine.compile:
                self._steps[key] = step
        elif key not in self._recorded:
            self._steps[key] = self.engine.graphs.record(self._steps[key], self.model.device)
            self._recorded.add(key)
        else:
            self._steps[key]()

    def _step(
        self,
        size: int,
        given: dict[str, Tensor],
        layers: Layers,
        cache: Rows,
        count: Tensor,
        kinds: tuple[bool, ...],
    ) -> Callable[[], None]:
        """What computes a step of this size, from what is given and always in the same memory."""
        engine = self.engine
        if "tokens" in given:
            ids, positions, segments = given["tokens"].unbind(0)

            def prefill() -> None:
                engine._step(ids, count, positions, segments, layers, cache)

            return prefill

        ints = dict(zip(_INTS, given["ints"].unbind(0), strict=True))
        reals = dict(zip(_REALS, given["reals"].unbind(0), strict=True))
        state = _State(**ints, **reals, newest=self._newest, seen=self._seen, result=self._result[:, :size])
        run = engine.graphs.of("paged", size, self.max_batch_size, kinds) if engine.compile else plainly

        def decode() -> None:
            ids, positions, segments = run("feed", _feed, state)
            x = engine._step(ids, count, positions, segments, layers, cache)
            run("choose", _choose, self.model, x, state, kinds)

        return decode

    def _read(self, unread: _Unread | None) -> None:
        """Take in the tokens of a step. Those of requests that have ended meanwhile are nobody's."""
        if unread is None:
            return
        tokens, logprobs = unread.read()
        for request, row in unread.rows:
            if request.finished:
                continue
            step = request._maker.put(int(tokens[row]), logprobs[row])
            request.steps.append(step)
            self.new_tokens += 1
            if step.finish_reason is not None:
                self._end(request, step.finish_reason)
            if request._callback is not None:
                try:  # whatever it raises ends this request and no other
                    request._callback(step)
                except Exception as error:  # noqa: BLE001  - runs the user's code
                    request.error = error
                    self._end(request, "error")

    # ---- masks and score functions of several requests in one step

    def _rule(
        self,
        mask: Mask | Sequence[Mask | None] | None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None,
        fused: bool,
    ) -> _Rule:
        """The rule of a request. Raises ValueError for what is no mask or score function."""
        model, default = self.model, None
        if fused:
            default = masks.fused() & model.default_mask
        if mask is None and score_mod is None:
            return _Rule(("default", fused), None, model.attention_layers(default), True)
        given = [m or default for m in mask] if isinstance(mask, list | tuple) else mask or default
        layers = model.attention_layers(given, score_mod)
        return _Rule((fused, _identity(mask), _identity(score_mod)), (mask, score_mod), layers, False)

    def _pattern_of(self, request: Request) -> int | None:
        """The number of a request's rule among those that may run now; None if there are too many."""
        for number, rule in enumerate(self._rules):
            if rule.key == request._rule.key:
                return number
        used = {r._pattern for r in self._running} | {0}
        unused = [n for n in range(len(self._rules)) if n not in used]
        if len(self._rules) < PATTERNS:
            self._rules.append(request._rule)
        elif unused:
            self._rules[unused[0]] = request._rule
        else:
            return None
        self._forget_combined()
        return self._rules.index(request._rule)

    def _forget_combined(self) -> None:
        alone = {rule.layers for rule in self._rules}
        self._combined = {}
        self._steps = {key: step for key, step in self._steps.items() if key[-1] in alone}
        self._recorded &= set(self._steps)

    def _tables(self, weights: int) -> _Buffer:
        rows = max(self.max_batch_size, self.prefill_rows)
        number = torch.int32, (rows,)
        shapes = {"pattern": number, "member": number, "weights": (torch.float32, (rows, weights))}
        return _Buffer(self.model.device, shapes)

    def _layers(self, rows: list[tuple[Request, _Sequence]]) -> Layers:
        """How each layer attends where every row has the rule of its request."""
        numbers = sorted({request._pattern for request, _ in rows})
        weights = max(len(sequence.prompt.log_weights) for _, sequence in rows)
        if len(numbers) == 1 and self._rules[numbers[0]].shares and not weights:
            return self._rules[numbers[0]].layers
        if weights > self._of_row.on_device["weights"].shape[1]:
            self._of_row = self._tables(-(-weights // WEIGHTS) * WEIGHTS)
            self._forget_combined()
        filled = self._of_row.fill()
        filled["weights"].fill(0)
        for row, (request, sequence) in enumerate(rows):
            filled["pattern"][row] = request._pattern
            filled["member"][row] = request._sequences.index(sequence)
            filled["weights"][row, : len(sequence.prompt.log_weights)] = sequence.prompt.log_weights
        self._of_row.send()
        numbers = numbers if len(numbers) == 1 else list(range(len(self._rules)))  # few graphs: one, or all
        key = *numbers, weights > 0
        if key not in self._combined:
            self._combined[key] = self._combine(numbers, weights > 0)
        return self._combined[key]

    def _combine(self, numbers: list[int], weighted: bool) -> Layers:
        tables = self._of_row.on_device
        own_masks: list[Mask] = []
        own_scores: list[ScoreMod | None] = []
        for layer in range(self.model.config.num_hidden_layers):
            each = [rule.layers.patterns[rule.layers.of_layer[layer]] for rule in (self._rules[n] for n in numbers)]
            own_masks.append(_mask_of_each(numbers, [p.mask for p in each], tables["pattern"], tables["member"]))
            score = _score_of_each(numbers, [p.score_mod for p in each], tables["pattern"], tables["member"])
            if weighted:
                weights = scores.segment_weights(tables["weights"])
                score = weights if score is None else score >> weights
            own_scores.append(score)
        return self.model.attention_layers(own_masks, own_scores)


class _Alone:
    """A token of a row as a mask sees it that was written for a request alone: rows are counted in the request.

    In rows of other requests all is 0: what the mask looks up may have no more.
    """

    def __init__(self, token: Token, member: Tensor, mine: Tensor) -> None:
        each = take(member, token.batch), token.index, token.position, token.segment
        self.batch, self.index, self.position, self.segment = (torch.where(mine, x, 0) for x in each)
        self.head = token.head


def _mask_of_each(numbers: list[int], each: list[Mask], pattern: Tensor, member: Tensor) -> Mask:
    """In each row the mask whose number is its pattern."""

    def predicate(q: Token, kv: Token) -> Tensor:
        number, allowed = take(pattern, q.batch), torch.zeros_like(kv.index, dtype=torch.bool)
        for n, mask in zip(numbers, each, strict=True):
            mine = number == n
            lone: Any = _Alone(q, member, mine), _Alone(kv, member, mine)
            allowed = allowed | mine & mask.evaluate(*lone)
        return allowed

    return Mask(predicate, " or ".join(map(str, each)))


def _score_of_each(numbers: list[int], each: list[ScoreMod | None], pattern: Tensor, member: Tensor) -> ScoreMod | None:
    """In each row the score function whose number is its pattern; None if there is none."""
    if not any(each):
        return None

    def function(score: Tensor, q: Token, kv: Token) -> Tensor:
        number, new = take(pattern, q.batch), score
        for n, mod in zip(numbers, each, strict=True):
            if mod is not None:
                mine = number == n
                lone: Any = _Alone(q, member, mine), _Alone(kv, member, mine)
                new = torch.where(mine, mod.evaluate(score, *lone), new)
        return new

    return ScoreMod(function, " or ".join(map(str, each)))


def _identity(rule: Any) -> Hashable:
    return tuple(map(_identity, rule)) if isinstance(rule, list | tuple) else rule and rule.identity()


def _tokens(prompt: Prompt, new: Sequence[int]) -> np.ndarray:
    """Ids, positions and segments, `[3, N]`, of a prompt and of what was generated after it."""
    after = prompt.generated_position or 0
    return np.array(
        [
            [*prompt.ids, *new],
            [*prompt.positions, *range(after, after + len(new))],
            [*prompt.segments, *itertools.repeat(prompt.generated_segment, len(new))],
        ],
        np.int64,
    )


def _pages_that_fit(model: Llama, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction must be above 0 and at most 1, not {fraction}")
    if model.device.type == "cuda":
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused
    else:
        free = _free_memory()
    pages = int(free * fraction) // PagedCache.page_bytes(model.config, model.dtype) - 1
    if pages < 1:
        raise ValueError(f"{fraction} of {free / 1e9:.1f} GB free does not hold a page of {BLOCK} tokens")
    return pages


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except OSError:
        raise ValueError("how much memory is free is known on Linux only; give the engine max_slots") from None


def _kinds(requests: Iterable[Request]) -> tuple[bool, ...]:
    """What any of them needs: temperature, top_k or top_p, min_p, repetition_penalty, several rows."""
    each = [
        (
            r.sampling.temperature > 0,
            r.sampling.top_k > 0 or r.sampling.top_p < 1,
            r.sampling.min_p > 0,
            r.sampling.repetition_penalty != 1,
            len(r._sequences) > 1,
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
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    newest: Tensor  # [seats]
    seen: Tensor | None  # [seats, V]
    result: Tensor  # [2, R], float64: tokens and their log-probabilities


def _feed(s: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and segments to go on with, each `[R, 1]`."""
    ids = torch.where(s.id < 0, s.newest[s.seat], s.id)
    return ids[:, None], s.position[:, None].to(torch.int32), s.segment[:, None].to(torch.int32)


def _choose(model: Llama, x: Tensor, s: _State, kinds: tuple[bool, ...]) -> None:
    """From the last layer's output `[R, 1, E]` to the next tokens."""
    random, cut, least, penalty, several = kinds
    parameters = SamplingTensors(
        s.temperature if random else None,
        s.top_k if cut else None,
        s.top_p if cut else None,
        s.min_p if least else None,
        s.repetition_penalty if penalty else None,
        s.seed if random else None,
    )
    logits = model.head(x)[:, 0]
    if several:
        logits = combined(logits, s.leader, s.is_max > 0, s.members)
    seen = s.seen[s.seat] if penalty and s.seen is not None else None
    token, logprob = sample(logits, parameters, s.done, seen)
    if several:
        token = token[s.leader]
    if seen is not None and s.seen is not None:
        s.seen[s.seat, token] = True
    s.newest[s.seat] = token
    s.result.copy_(torch.stack((token.double(), logprob.double())))
