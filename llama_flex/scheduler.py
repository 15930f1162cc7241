"""Continuous batching: requests come and go while others run, over one pool of pages.

Every step computes a chunk of prompts, which may be of different requests, with the first new token of each that ends
there, and then one token for each request that was under way. Tokens are read while the next step runs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import masks
from .arguments import whole_number
from .attention import try_last
from .batching import WIDTH, Batches, Piece, Unread
from .fusion import AnyPrompt, Ensemble, as_ensemble
from .masks import BLOCK, Mask
from .model import Llama
from .paging import PagedCache, Pool
from .request import Request, Text, longest_of, tokens_of
from .sampling import Sampling, seeded
from .scores import ScoreMod
from .streaming import NonFiniteLogitsError, Step, Steps
from .together import Rule

if TYPE_CHECKING:
    from .engine import Engine

BATCH_SIZE = {"cpu": 8, "cuda": 256}
PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}  # of a step; a GPU needs many to be busy
_WORTH_COPYING = 16  # tokens; computing fewer takes no longer than copying their page


class Scheduler:
    """Runs the requests of an engine, many at a time; see `Engine.submit`.

    What a request gets does not depend on what else runs.
    """

    @torch.inference_mode(False)  # what is made here and for a request is used later, wherever that is
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
        engine.model.check_device()
        config, device = self.model.config, self.model.device
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_slots", max_slots),
            ("max_length", max_length),
            ("prefill_tokens", prefill_tokens),
        ):
            if value is not None:
                whole_number(name, value, least=1)
        self.max_batch_size = max_batch_size = max_batch_size or BATCH_SIZE[device.type]
        blocks = -(-(max_length or self.model.context) // BLOCK)
        if max_slots is None:
            pages = min(max_batch_size * blocks, PagedCache.most_pages(config))
            pages = min(pages, _pages_that_fit(self.model, memory_fraction))
        else:
            pages = -(-max_slots // BLOCK)
        self.blocks = blocks = min(blocks, pages)
        self.max_length = blocks * BLOCK
        self.prefill_tokens = -(-(prefill_tokens or PREFILL_TOKENS[device.type]) // WIDTH) * WIDTH
        self._inbox: deque[Request] = deque()  # from any thread
        self._waiting: list[Request] = []
        self._taken: list[int] = []  # pages, in this step
        self._copies: list[tuple[int, int, int]] = []  # from page to page so many tokens, in this step
        self._sent_away: list[Request] = []  # in this step; they wait once it is done
        self._running: list[Request] = []
        self._ended: dict[Request, None] = {}  # and not returned yet; from any thread
        self._unread: list[Unread] = []
        self.prompt_tokens = self.new_tokens = 0  # computed so far, and given so far
        self._numbers = itertools.count()
        self._advancing: asyncio.Task[object] | None = None
        self._turn, self._amid = threading.RLock(), threading.Lock()  # of a thread that steps; and its step
        self._cut_short = False  # the step before

        self._seats = list(range(max_batch_size))[::-1]
        self._weights: list[tuple[int, int]] = []
        self._version = 0  # of the weights: what was computed with others is not shared
        self._allocate(pages)

    def _allocate(self, pages: int) -> None:
        """Make what lies in memory, for the model's dtype on its device."""
        dtype, device = self.model.dtype, self.model.device
        self.cache = PagedCache(self.model.config, pages, dtype=dtype, device=device)
        self.batches = Batches(self.engine, self.cache, self.max_batch_size, self.prefill_tokens, self.blocks)
        self.rules = self.batches.rules
        self._ahead = device.type == "cuda"  # a step is read while the next one runs
        self._made_for = dtype, device

    def _follow_model(self) -> None:
        """After the model was given another dtype or device: what is under way begins anew there."""
        if self._made_for == (self.model.dtype, self.model.device):
            return
        with self._turn:
            self.model.check_device()
            self._allocate(self.pool.count)
            self._start_over()
            for request in {*self._waiting, *self._inbox.copy()}:
                request.rule = self._rule_of(request.ensemble, *(request.rule.given or (None, None)))

    def _rule_of(self, ensemble: Ensemble, mask: Any, score_mod: Any) -> Rule:
        """How a request attends; raises ValueError."""
        fused = any(p.generated_segment == masks.GENERATED for p in ensemble.prompts)
        return self.rules.rule(mask, score_mod, fused)

    @property
    def pool(self) -> Pool:
        """The pages."""
        return self.cache.pool

    @property
    def waiting(self) -> list[Request]:
        """Those that wait for their turn, the next one first."""
        return sorted(r for r in (*self._inbox.copy(), *self._waiting) if not r.finished)

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
        return not (self._inbox or self._waiting or self._running or self._unread or self._cut_short)

    @torch.inference_mode(False)
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
        whole_number("priority", priority)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function of a Step, not {callback!r}")
        ensemble = as_ensemble(prompt)
        (limit,) = engine.check([ensemble], max_new_tokens)
        if len(ensemble.prompts) > self.max_batch_size:
            raise ValueError(f"{len(ensemble.prompts)} prompts in one request; max_batch_size is {self.max_batch_size}")
        lengths = [len(p.ids) for p in ensemble.prompts]
        if max_new_tokens is None:  # as many as fit, if all have the same room
            room = min(self.max_length, self.pool.count // len(lengths) * BLOCK)
            limit = max(1, min(limit, room - max(lengths)))
        pages = sum(-(-(length + limit) // BLOCK) for length in lengths)
        if max(lengths) + limit > self.max_length or pages > self.pool.count:
            raise ValueError(
                f"{sum(lengths)} tokens and {limit} new ones exceed the slots: {self.max_length} of a text and "
                f"{self.pool.count * BLOCK} in all; ask for fewer, or give the engine a larger max_length or max_slots"
            )
        self._follow_model()
        rule = self._rule_of(ensemble, mask, score_mod)
        if not rule.shares:
            longest = longest_of(ensemble.prompts, [limit] * len(ensemble.prompts))
            try_last(rule.layers, longest, model.config.num_attention_heads)
        if model.looks_ahead_by_default(mask):
            raise ValueError(
                "this model attends in both directions (is_causal is false), and requests are computed in pieces, of "
                "which none sees a later one; complete one at a time (generate or stream; --prompt without --json), or "
                "give a mask"
            )
        stop_ids = engine.stop_ids(stop_token_ids)
        number = next(self._numbers)
        request = Request(
            number,
            seeded(sampling or Sampling.recommended(model.generation_config)),
            priority,
            ensemble=ensemble,
            maker=Steps(number, engine.tokenizer, ensemble.prompts[0].ids, stop, stop_ids, limit),
            callback=callback,
            rule=rule,
            scheduler=self,
        )
        self._inbox.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request, at once or, from another thread, after the step that runs; what it has given stays."""
        if request.scheduler is not self:
            raise ValueError(f"request {request.number} is of another engine; cancel it there")
        if not request.finished:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        self._ended.setdefault(request)  # first: an interrupt between the two must not leave it unsaid
        request.finish_reason = reason

    async def advance(self) -> None:
        """Wait for a step, which one of all that wait starts."""
        task = self._advancing
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._advancing = asyncio.create_task(asyncio.to_thread(self.step))
        await asyncio.shield(task)

    def step(self) -> list[Request]:
        """See `Engine.step`."""
        with self._turn:
            if self._amid.locked():  # by this very thread
                raise ValueError("the engine is amid a step, and a callback of that step asks for another")
            with self._amid:
                self._compute()
            ended = [request for request in tuple(self._ended) if request.finished]
            for request in ended:
                del self._ended[request]
            return ended

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self) -> None:
        self._follow_model()
        if self._cut_short:  # by an error, or Ctrl-C
            self._start_over()
        self._cut_short = True
        while self._inbox:
            if not self.rules.is_full():  # known early, so that steps are compiled for all of them at once
                self.rules.number_of(self._inbox[0].rule, set())
            heapq.heappush(self._waiting, self._inbox[0])
            self._inbox.popleft()
        self._look_at_weights()
        self._clear()
        self._make_room()
        asked = self._prefill()
        first = {request for unread in asked for request, _ in unread.rows}
        if going := [r for r in self.running if self._goes_on(r) and r not in first]:
            asked.append(self.batches.decode(going))
        if self._ahead:
            asked, self._unread = self._unread, asked
        for unread in asked:
            self._read(unread)
        self._clear()
        while self._sent_away:
            heapq.heappush(self._waiting, self._sent_away[-1])
            self._sent_away.pop()
        self._cut_short = False

    def _look_at_weights(self) -> None:
        weights = [(id(p), 0 if p.is_inference() else p._version) for p in self.model.parameters()]
        if weights != self._weights:
            if [id for id, _ in weights] != [id for id, _ in self._weights]:
                self.batches.forget_recorded()  # they compute with the ones that were there
            self._weights = weights
            self.forget()

    def forget(self) -> None:
        """See `Engine.forget`."""
        self._version += 1

    # ---- who runs

    def _make_room(self) -> None:
        """A page for the next token of each request, if need be of one that came later, which must wait then."""
        for request in self.running:
            for text in request.texts if self._goes_on(request) else ():
                if text.start < len(text.pages) * BLOCK:
                    continue
                while not self.pool.available and request.texts:
                    self._sent_away.append(max(self._running))
                    self._leave(self._sent_away[-1])
                if not request.texts:
                    break
                text.pages.append(self._take())

    def _take(self) -> int:
        self._taken.append(self.pool.take())
        return self._taken[-1]

    def _goes_on(self, request: Request) -> bool:
        return request.asked < request.maker.limit and all(s.start >= s.goal for s in request.texts)

    def _admit(self) -> Request | None:
        """The next request that waits, if there are seats and pages for it."""
        while self._waiting and self._waiting[0].finished:
            heapq.heappop(self._waiting)
        request = min((*self._waiting[:1], *self._sent_away), default=None)
        if request is None or request in self._sent_away:  # that one is next, once its tokens are read
            return None
        prompts = request.ensemble.prompts
        pattern = self.rules.number_of(request.rule, {r.pattern for r in self._running})
        if len(prompts) > len(self._seats) or pattern is None:
            return None
        request.pattern = pattern
        new = [step.token for step in request.steps]
        for prompt in prompts:
            # Weights are of a fused prompt, and change what comes after it.
            shares = request.rule.shares and not request.alone
            key = (request.rule.key, prompt.log_weights, self._version) if shares else None
            request.texts.append(Text(prompt, tokens_of(prompt, new), key))
        copies = []
        for text in request.texts:
            text.pages = list(self._found(text))
            text.start = len(text.pages) * BLOCK
            needed = -(-text.tokens.shape[1] // BLOCK) - len(text.pages)
            if needed > self.pool.available:
                self._give_back(request)
                return None
            page, count = self._beginning(text)
            text.pages += [self._take() for _ in range(needed)]
            if count:
                copies.append((page, text.pages[text.start // BLOCK], count))
                text.start += count
            # Rows that choose together do it in one step, and what is known but for its last token needs no other.
            if len(prompts) > 1 or text.start == text.goal - 1:
                text.goal -= 1
        self._copies += copies
        self._running.append(request)  # first: an interrupt between the two must find it somewhere
        heapq.heappop(self._waiting)
        request.asked, request.took = len(new), any(text.start for text in request.texts)
        for text in request.texts:
            self.prompt_tokens += text.tokens.shape[1] - text.start
            text.seat = self._seats.pop()
            self.batches.sit(request, text, len(new))
        return request

    def _found(self, text: Text) -> Iterator[int]:
        """The pages that hold the beginning of a text already, now its own too."""
        for number in range((text.goal - 1) // BLOCK if text.key is not None else 0):
            page = self.pool.find(text.before(number + 1))
            if page is None:
                return
            yield page

    def _beginning(self, text: Text) -> tuple[int, int]:
        """A page that holds some of the tokens that come next, and how many."""
        number = text.start // BLOCK
        if text.key is None:
            return -1, 0
        page, count = self.pool.find_beginning(text.before(number), text.block(number, text.goal - 1))
        return (page, count) if count >= _WORTH_COPYING else (-1, 0)

    def _name(self, text: Text, start: int, end: int) -> None:
        """Let others use the pages that tokens `start` to `end` fill."""
        for number in range(start // BLOCK, end // BLOCK if text.key is not None else 0):
            self.pool.name(text.pages[number], text.before(number + 1))

    def _begin(self, text: Text, start: int, end: int) -> None:
        """Let others copy, once they are computed, tokens `start` to `end` and what is before them in their pages."""
        for number in range(start // BLOCK, -(-end // BLOCK) if text.key is not None else 0):
            self.pool.begin(text.pages[number], text.before(number), text.block(number, end))

    def _leave(self, request: Request) -> None:
        """Give back what a request runs with."""
        new = [step.token for step in request.steps]
        for text in request.texts:
            text.tokens = tokens_of(text.prompt, new)
            end = min(text.start, text.tokens.shape[1])
            self._name(text, text.goal, end)
            self._begin(text, text.goal, end)
            self._seats.append(text.seat)
        self._give_back(request)
        self._running.remove(request)

    def _give_back(self, request: Request) -> None:
        for text in request.texts:
            for page in reversed(text.pages):  # the end of a text is forgotten before its beginning
                self.pool.give_back(page)
        request.texts = []

    def _clear(self) -> None:
        for request in [r for r in self._running if r.finished]:
            self._leave(request)

    def _start_over(self) -> None:
        """After a step that failed: what it wrote is unknown, and who holds what."""
        under_way = {*self._running, *self._waiting, *self._sent_away}
        for request in {*self._running, *self._sent_away}:
            request.maker.rewind(request.steps)
            self._tell(request)
        for request in under_way:
            request.texts = []
        arriving = set(self._inbox.copy())  # one may be on its way from there
        self._waiting = sorted(r for r in under_way - arriving if not r.finished)
        self._running, self._sent_away, self._taken, self._copies, self._unread = [], [], [], [], []
        self._seats = list(range(self.max_batch_size))[::-1]
        self.cache.pool = Pool(self.pool.count)

    # ---- what runs

    def _prefill(self) -> list[Unread]:
        """Enqueue a chunk: of prompts under way, and then of those that can begin; and the first tokens after it."""
        pieces: list[Piece] = []
        left = self.prefill_tokens
        begun = (r for r in self.running if not all(text.start >= text.goal for text in r.texts))
        while left and len(pieces) < self.batches.max_pieces and (request := next(begun, None) or self._admit()):
            for text in request.texts:
                first = text.start
                while text.start < text.goal and left and len(pieces) < self.batches.max_pieces:
                    pieces.append(Piece(request, text, text.start, min(WIDTH, text.goal - text.start, left)))
                    text.start += pieces[-1].length
                    left -= pieces[-1].length
                self._name(text, first, text.start)  # others may use them in this very step: see `Rows`
        if self._copies:  # first: a page may be taken that another is a copy of
            self.cache.copy(self._copies)
        if taken := set(self._taken).difference(page for _, page, _ in self._copies):
            self.cache.clear(sorted(taken))
        self._taken, self._copies = [], []
        asked = self.batches.prefill(pieces, self._running) if pieces else []
        for _, text, start, length in pieces:
            self._begin(text, start, start + length)
        return asked

    def _read(self, unread: Unread) -> None:
        """Take in tokens. Those of requests that have ended meanwhile are nobody's."""
        tokens, logprobs, finite = unread.read()
        for request, row in unread.rows:
            if not finite[row]:
                self.forget()  # there may be some NaN in keys and values, too
                if request.took and not request.finished:
                    self._compute_alone(request)
                    continue
                if not request.finished:
                    where = [(request.number, len(request.steps) + 1)]
                    request.error = NonFiniteLogitsError(where, self.model.dtype)
                    self._end(request, "error")
            if not request.finished:
                request.steps.append(request.maker.put(int(tokens[row]), logprobs[row]))
                self.new_tokens += 1
                self._tell(request)

    def _compute_alone(self, request: Request) -> None:
        """Begin a request anew: the NaN may be another's, whose pages it took."""
        request.alone = True
        for unread in self._unread:
            unread.rows[:] = [(other, row) for other, row in unread.rows if other is not request]
        if request.texts:  # else it waits already
            self._sent_away.append(request)
            self._leave(request)

    def _tell(self, request: Request) -> None:
        """Let a token that was just added do what it does: end the request, and go to its callback."""
        if request.told == len(request.steps):
            return
        reason = request.steps[-1].finish_reason
        if reason is not None and not request.finished:
            self._end(request, reason)
        if request.callback is not None:
            try:  # whatever it raises ends this request and no other
                request.callback(request.steps[-1])
            except Exception as error:  # noqa: BLE001  - runs the user's code
                request.error = error
                self._end(request, "error")
        request.told += 1


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
