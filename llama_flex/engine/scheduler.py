"""Continuous batching: requests join and leave while others run, over one pool of pages.

Every step prefills chunks of prompts, which may be of different requests, with the first new token of each that ends
there, and then decodes one token for each running request, or verifies its drafts. On CUDA, tokens are read while the
next step runs, unless that one has drafts.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..cache import Cache
from ..interp.capture import Capture
from ..interp.edits import Edit
from ..interp.probes import as_tuple
from ..kernels.kv_cache import KVDtype, KVFormat, dtype_of
from ..logits.parameters import Sampling, with_seed
from ..masks.layout import BLOCK
from ..masks.mask import Mask
from ..masks.scores import ScoreMod
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.arguments import whole_number
from ..usercode.modules import global_hooks, hooks_of
from .batch import PendingOutput
from .block_manager import BlockManager
from .drafting import COMPILED_SIZES, SIZES
from .fusion import AnyPrompt, Ensemble, as_requests
from .limits import RequestLimits
from .model_runner import ModelRunner
from .output import NonFiniteLogitsError, OutputProcessor, Step
from .paged_batch import WIDTH, DraftingBatch, PagedBatch, PrefillChunk
from .paged_cache import PagedCache, PagedRows, RowCache
from .request import Request, TokenSequence, longest_of, tokens_of
from .request_masks import AttentionSpec, plan_of_rows
from .speculation import Speculation
from .stream import Stream
from .verification import new_stream

BATCH_SIZE = {"cpu": 8, "cuda": 256}
PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}  # per step; a GPU needs many to be busy
_WORTH_COPYING = 16  # tokens; computing fewer takes no longer than copying their page


class Scheduler:
    """The scheduler of an engine's requests, which runs many at a time; see `Engine.submit`.

    The tokens that a request gets do not depend on what else runs.
    """

    @torch.inference_mode(False)  # tensors made here must be usable outside of inference mode
    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        limits: RequestLimits,
        *,
        kv_dtype: KVDtype,
        max_batch_size: int | None,
        max_slots: int | None,
        max_length: int | None,
        memory_fraction: float,
        prefill_tokens: int | None,
        speculation: Speculation | None,
    ) -> None:
        self.runner, self.model, self.tokenizer, self.limits = runner, runner.model, tokenizer, limits
        self.kv_dtype, self._speculation = kv_dtype, speculation
        self.model.check_device()
        device = self.model.device
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
            pages = min(max_batch_size * blocks, PagedCache.most_pages(self.model.dims))
            pages = min(pages, _pages_that_fit(self.model, kv_dtype, memory_fraction))
        else:
            pages = -(-max_slots // BLOCK)
        self.blocks = blocks = min(blocks, pages)
        self.max_length = blocks * BLOCK
        self.prefill_tokens = -(-(prefill_tokens or PREFILL_TOKENS[device.type]) // WIDTH) * WIDTH
        self._inbox: deque[Request] = deque()  # from any thread
        self._waiting: list[Request] = []
        self._new_pages: list[int] = []  # taken in this step
        self._copies: list[tuple[int, int, int]] = []  # (from page, to page, tokens), in this step
        self._preempted: list[Request] = []  # in this step; they wait again at its end
        self._running: list[Request] = []
        # Of those running requests that run alone: their streams, and the steps of these.
        self._streams: dict[Request, tuple[Stream, Iterator[PendingOutput | None]]] = {}
        self._ended: dict[Request, None] = {}  # but not returned yet; from any thread
        self._pending: list[PendingOutput] = []
        self.prompt_tokens = self.new_tokens = 0  # computed so far, and generated so far
        self._numbers = itertools.count()
        self._advancing: asyncio.Task[object] | None = None
        self._step_lock, self._stepping = threading.RLock(), threading.Lock()  # one thread at a time; held in a step
        self._submitting = threading.Lock()  # guards what an unfinished request holds for itself
        self._interrupted = False  # the last step was

        self._free_batch_slots = list(range(max_batch_size))[::-1]
        self._modules: list[Any] = []  # and the ids of their hooks
        self._weights: list[tuple[int, int]] = []
        self._version = 0  # of the weights: pages computed with others are not shared
        self._allocate_cache(pages)

    def _allocate_cache(self, pages: int) -> None:
        """Allocate the cache and the batch on the model's device."""
        dtype, device = self.model.dtype, self.model.device
        self.cache = PagedCache(self.model.dims, pages, KVFormat.of(self.model, self.kv_dtype))
        self.batch = PagedBatch(self.runner, self.cache, self.max_batch_size, self.prefill_tokens, self.blocks)
        if self._speculation is not None and isinstance(drafter := self._speculation.drafter, ModelRunner):
            self.batch.drafter = DraftingBatch(drafter, self.batch)
        self.masks = self.batch.masks
        self._ahead = device.type == "cuda"  # a step's tokens are read while the next one runs
        self._made_for = dtype, device

    def _follow_model(self) -> None:
        """Reallocate and restart all requests if the model's dtype or device has changed."""
        if self._made_for == (self.model.dtype, self.model.device):
            return
        with self._step_lock:
            self.model.check_device()
            self.runner.last = None  # it may hold the old pages
            self._allocate_cache(self.block_manager.num_pages)
            self._recover()
            for request in {*self._waiting, *self._inbox.copy()}:
                mask, score_mod = request.spec.given or (None, None)
                request.spec = self._spec_of(
                    request.ensemble, mask, score_mod, alone=request.runs_alone, cache=request.cache
                )

    def _spec_of(
        self, ensemble: Ensemble, mask: Any, score_mod: Any, alone: bool, cache: Cache | None
    ) -> AttentionSpec:
        """Return the attention spec of a request; raises ValueError for anything but a mask or score function."""
        if alone:
            plan = plan_of_rows(self.model, ensemble.prompts, mask, score_mod, cache)
            return AttentionSpec(None, (mask, score_mod), plan, False)
        return self.masks.spec(mask, score_mod, any(prompt.is_fused for prompt in ensemble.prompts))

    @property
    def block_manager(self) -> BlockManager:
        """The allocator of the cache's pages."""
        return self.cache.block_manager

    @property
    def waiting(self) -> list[Request]:
        """The waiting requests, the next one first."""
        return sorted(r for r in (*self._inbox.copy(), *self._waiting) if not r.finished)

    @property
    def running(self) -> list[Request]:
        """The running requests, by priority, then the oldest first."""
        return sorted(self._running)

    @property
    def num_waiting(self) -> int:
        """The number of waiting requests; cancelled ones count until their turn comes."""
        return len(self._inbox) + len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of running requests."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self._waiting or self._running or self._pending or self._interrupted)

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
        cache: Cache | None = None,
        cached_ids: Sequence[int] | None = None,
        capture: Capture | Sequence[Capture] | None = None,
        edit: Edit | Sequence[Edit] | None = None,
        adapter: str | None = None,
        priority: int = 0,
        callback: Callable[[Step], object] | None = None,
    ) -> Request:
        """See `Engine.submit`."""
        model = self.model
        if self._speculation is not None and self._speculation.needs_cache:
            raise ValueError(
                "a draft model has no pages for submitted requests: use stream or generate, or an engine with "
                "speculate='self' or 'lookup'"
            )
        whole_number("priority", priority)
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function of a Step, not {callback!r}")
        (ensemble,) = as_requests([prompt])
        (limit,) = self.limits.check([ensemble], max_new_tokens, cache)
        if len(ensemble.prompts) > self.max_batch_size:
            raise ValueError(f"{len(ensemble.prompts)} prompts in one request; max_batch_size is {self.max_batch_size}")
        if cache is None:
            limit = self._fit([len(p.ids) for p in ensemble.prompts], limit, max_new_tokens)
        (before,) = self.limits.cached_ids(None if cached_ids is None else [cached_ids], cache, 1)
        self._follow_model()
        captures, edits = as_tuple(capture, Capture, "capture"), as_tuple(edit, Edit, "edit")
        model.probes(captures, edits, len(ensemble.prompts), stepwise=True)  # raises what would end the request later
        if cache is not None and cache.tokens.index.is_inference():
            raise ValueError("the cache was made in torch.inference_mode(), where submitted requests do not run")
        alone = bool(captures or edits or cache)
        spec = self._spec_of(ensemble, mask, score_mod, alone, cache)
        if mask is not None or score_mod is not None:
            spec.plan.check_last_token(longest_of([ensemble], [limit], cache), model.dims.num_heads)
        if not alone and model.looks_ahead_by_default(mask):
            raise ValueError(
                "this model attends in both directions (is_causal is false), and requests are computed in chunks that "
                "cannot see later ones; complete one at a time (generate or stream; --prompt without --json), or "
                "give a mask"
            )
        number, stop_ids = next(self._numbers), self.limits.stop_ids(stop_token_ids)
        text = [*before, *ensemble.prompts[0].ids]
        sampling = with_seed(sampling or Sampling.recommended(model.generation_config))
        request = Request(
            number,
            sampling,
            priority,
            ensemble=ensemble,
            output_processor=OutputProcessor(number, self.tokenizer, text, stop, stop_ids, limit),
            callback=callback,
            spec=spec,
            owner=self,
            captures=captures,
            edits=edits,
            cache=cache,
            cached_ids=before,
            adapter=model.adapters.of_request(adapter),
            runs_alone=alone,
            processors=self.limits.processors(sampling, text, stop_ids, limit),
        )
        with self._submitting:
            self._check_unused(request)
            self._inbox.append(request)
        return request

    def _fit(self, lengths: list[int], limit: int, max_new_tokens: int | None) -> int:
        """Return how many new tokens of at most `limit` fit in the slots after prompts of these lengths; raises
        ValueError if too few do."""
        if max_new_tokens is None:  # as many as fit, with equal room for each prompt
            room = min(self.max_length, self.block_manager.num_pages // len(lengths) * BLOCK)
            limit = max(1, min(limit, room - max(lengths)))
        pages = sum(-(-(length + limit) // BLOCK) for length in lengths)
        if max(lengths) + limit > self.max_length or pages > self.block_manager.num_pages:
            raise ValueError(
                f"{sum(lengths)} tokens and {limit} new ones exceed the slots: {self.max_length} per sequence, "
                f"{self.block_manager.num_pages * BLOCK} in total; ask for fewer, or give the engine a larger "
                "max_length or max_slots"
            )
        return limit

    def _check_unused(self, request: Request) -> None:
        """Raise ValueError if an unfinished request has the same cache or capture: they hold the tokens of one."""
        mine = {id(each) for each in (request.cache, *request.captures) if each is not None}
        for other in (*self._inbox.copy(), *self._waiting, *self._running, *self._preempted) if mine else ():
            if not other.finished and mine & {id(each) for each in (other.cache, *other.captures)}:
                what = "cache" if request.cache is not None and other.cache is request.cache else "capture"
                raise ValueError(f"the {what} belongs to request {other.number}, which is not finished; give another")

    def cancel(self, request: Request) -> None:
        """End a request, keeping its steps so far: at once or, from another thread, after the running step."""
        if request.owner is not self:
            raise ValueError(f"request {request.number} belongs to another engine; cancel it there")
        if not request.finished:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        if self._speculation is not None and not request.finished:  # its last callback may fail
            self._speculation.finish([request])
        self._ended.setdefault(request)  # first: an interrupt between the two must not lose it
        request.finish_reason = reason

    async def advance(self) -> None:
        """Wait for the next step, which the first waiter starts in a thread."""
        task = self._advancing
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._advancing = asyncio.create_task(asyncio.to_thread(self.step))
        await asyncio.shield(task)

    def step(self) -> list[Request]:
        """See `Engine.step`."""
        with self._step_lock:
            if self._stepping.locked():  # by this very thread
                raise ValueError("a callback called step() during a step; call it after the step has returned")
            with self._stepping:
                self._compute()
            ended = [request for request in tuple(self._ended) if request.finished]
            for request in ended:
                del self._ended[request]
            return ended

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self) -> None:
        self._follow_model()
        if self._interrupted:  # by an error, or Ctrl-C
            self._recover()
        self._interrupted = True
        while self._inbox:
            # Register specs early, so that steps are compiled once for all.
            if not (self.masks.is_full() or self._inbox[0].runs_alone):
                self.masks.number_of(self._inbox[0].spec, set())
            heapq.heappush(self._waiting, self._inbox[0])
            self._inbox.popleft()
        drafting = self._speculation is not None and any(map(self._has_drafts, self._running))
        if drafting:  # drafts follow tokens that were read
            before, self._pending = self._pending, []
            for output in before:
                self._process_output(output)
        self._check_weights()
        for request in [r for r in self._running if r.adapter is not None]:
            self._has_adapter(request)
        self._release_finished()
        self._allocate_or_preempt()
        before, self._pending = self._pending, self._prefill()
        first = {request for output in self._pending for request, _ in output.rows}
        if decoding := [r for r in self.running if self._decodes(r) and r not in first and not r.runs_alone]:
            self._pending += self._verify(decoding) if drafting else [self.batch.decode(decoding)]
        self._pending += self._advance_streams()
        for output in before:  # while the device computes the next
            self._process_output(output)
        for output in self._pending:
            output.finish()
        if not self._ahead:
            before, self._pending = self._pending, []
            for output in before:
                self._process_output(output)
        self._release_finished()
        while self._preempted:
            heapq.heappush(self._waiting, self._preempted[-1])
            self._preempted.pop()
        self._interrupted = False

    def _check_weights(self) -> None:
        """Forget what was computed or recorded with other weights, modules or hooks."""
        modules, tensors = list[Any](itertools.chain(*global_hooks())), list[torch.Tensor | None]()
        left: list[Any] = [self.model]
        while left:  # `Module.modules` takes longer than all else here, and the device may be waiting
            module = left.pop()
            left += [child for child in module._modules.values() if child is not None]
            modules += module, module.__dict__.get("forward"), *itertools.chain(*hooks_of(module))
            tensors += *module._parameters.values(), *module._buffers.values()
        weights = [(id(t), 0 if t.is_inference() else t._version) for t in tensors if t is not None]
        if (modules, weights) != (self._modules, self._weights):
            if modules != self._modules or [id for id, _ in weights] != [id for id, _ in self._weights]:
                for batch in (self.batch, *(stream for stream, _ in self._streams.values())):
                    batch.recorded.forget()  # recorded steps use the old ones
            self._modules, self._weights = modules, weights
            self.forget()

    def forget(self) -> None:
        """See `Engine.forget`."""
        self._version += 1

    def _verify(self, requests: list[Request]) -> list[PendingOutput]:
        """Run a step that verifies the drafts of requests, and another of those that cannot have any; if none has, a
        decode step."""
        drafts, sizes = dict[Request, Sequence[int]](), COMPILED_SIZES if self.runner.compile else SIZES
        for request in filter(self._has_drafts, requests):
            assert self._speculation is not None
            room = min(len(s.pages) * BLOCK - s.num_computed_tokens for s in request.sequences)
            room = min(room, request.output_processor.limit - request.num_scheduled) - 1
            drafts[request] = []
            with self._errors_end(request):
                drafts[request] = self._speculation.draft(request, min(room, sizes[-1]))
        longest = max(map(len, drafts.values()), default=0)
        if not longest:
            return [self.batch.decode(requests)]
        others = [r for r in requests if r.kinds.split]
        drafts |= {r: [] for r in requests if r not in drafts and r not in others}
        output = self.batch.verify(list(drafts), drafts, next(size for size in sizes if size >= longest))
        assert self._speculation is not None
        self._speculation.count(drafts, output.counts())
        return [output, self.batch.decode(others)] if others else [output]

    def _has_drafts(self, request: Request) -> bool:
        """Return whether drafts are made for a request that runs with others."""
        return self._speculation is not None and not request.runs_alone and self._speculation.drafts_for(request)

    # ---- admission and preemption

    def _allocate_or_preempt(self) -> None:
        """Allocate pages for the next token of each request; if none is left, preempt the last request in order."""
        for request in self.running:
            for sequence in request.sequences if self._decodes(request) and request.cache is None else ():
                if sequence.num_computed_tokens < len(sequence.pages) * BLOCK:
                    continue
                while not self.block_manager.available and request.sequences:
                    self._preempted.append(max(r for r in self._running if r.cache is None))
                    self._release(self._preempted[-1])
                if not request.sequences:
                    break
                sequence.pages.append(self._take_page())

    def _take_page(self) -> int:
        self._new_pages.append(self.block_manager.allocate())
        return self._new_pages[-1]

    def _has_adapter(self, request: Request) -> bool:
        """Return whether a request can go on; end it if its adapter was removed."""
        with self._errors_end(request):
            self.model.adapters.check(request.adapter)
        return not request.finished

    def _decodes(self, request: Request) -> bool:
        unfinished = request.num_scheduled < request.output_processor.limit
        return unfinished and all(sequence.is_prefilled for sequence in request.sequences)

    def _admit(self) -> Request | None:
        """Start and return the next waiting request; None if there is none, or too few batch slots, pages or specs."""
        while self._waiting and (self._waiting[0].finished or not self._has_adapter(self._waiting[0])):
            heapq.heappop(self._waiting)
        request = min((*self._waiting[:1], *self._preempted), default=None)
        if request is None or request in self._preempted:  # a preempted one waits until its tokens are read
            return None
        prompts = request.ensemble.prompts
        if len(prompts) > self.max_batch_size - sum(len(r.sequences) for r in self._running):
            return None
        if not request.runs_alone:
            spec_number = self.masks.number_of(request.spec, {r.spec_number for r in self._running})
            if spec_number is None:
                return None
            request.spec_number = spec_number
        new = [step.token for step in request.steps]
        for prompt in prompts:
            # Log-weights of a fused prompt change the keys and values after it.
            shares = request.spec.shares and not request.isolated
            adapter = request.adapter and request.adapter.number
            key = (request.spec.key, prompt.log_weights, adapter, self._version) if shares else None
            request.sequences.append(TokenSequence(prompt, tokens_of(prompt, new), key))
        copies = []
        for sequence in request.sequences:
            sequence.pages = list(self._reuse_pages(sequence))
            sequence.num_computed_tokens = len(sequence.pages) * BLOCK
            needed = -(-sequence.num_tokens // BLOCK) - len(sequence.pages) if request.cache is None else 0
            if needed > self.block_manager.available:
                self._free_pages(request)
                return None
            page, count = self._find_partial_page(sequence)
            sequence.pages += [self._take_page() for _ in range(needed)]
            if count:
                copies.append((page, sequence.pages[sequence.num_computed_tokens // BLOCK], count))
                sequence.num_computed_tokens += count
            # Members of an ensemble sample together in a decode step; if only the last token is uncached, one suffices.
            alone = len(prompts) == 1 and sequence.num_computed_tokens < sequence.prefill_target - 1
            if not (alone or request.runs_alone):
                sequence.prefill_target -= 1
        self._copies += copies
        self._running.append(request)  # first: an interrupt between the two must not lose it
        heapq.heappop(self._waiting)
        request.num_scheduled = len(new)
        request.num_cached_tokens = sum(sequence.num_computed_tokens for sequence in request.sequences)
        for sequence in request.sequences:
            self.prompt_tokens += sequence.num_tokens - sequence.num_computed_tokens
            if not request.runs_alone:
                sequence.batch_slot = self._free_batch_slots.pop()
                self.batch.assign_batch_slot(request, sequence)
        return request

    def _reuse_pages(self, sequence: TokenSequence) -> Iterator[int]:
        """Yield the full pages that already hold the beginning of a sequence, adding a user to each."""
        for number in range((sequence.prefill_target - 1) // BLOCK if sequence.key is not None else 0):
            page = self.block_manager.acquire(sequence.prefix_hash(number + 1))
            if page is None:
                return
            yield page

    def _find_partial_page(self, sequence: TokenSequence) -> tuple[int, int]:
        """Return a page that begins with the next tokens of a sequence, and how many; (-1, 0) if not worth copying."""
        number = sequence.num_computed_tokens // BLOCK
        if sequence.key is None:
            return -1, 0
        next_tokens = sequence.block(number, sequence.prefill_target - 1)
        page, count = self.block_manager.find_partial(sequence.prefix_hash(number), next_tokens)
        return (page, count) if count >= _WORTH_COPYING else (-1, 0)

    def _publish_full_pages(self, sequence: TokenSequence, start: int, end: int) -> None:
        """Let other requests share the pages that tokens `start` to `end` fill."""
        for number in range(start // BLOCK, end // BLOCK if sequence.key is not None else 0):
            self.block_manager.register_full(sequence.pages[number], sequence.prefix_hash(number + 1))

    def _publish_partial_pages(self, sequence: TokenSequence, start: int, end: int) -> None:
        """Let other requests copy tokens `start` to `end`, once computed, and those before them in the same pages."""
        for number in range(start // BLOCK, -(-end // BLOCK) if sequence.key is not None else 0):
            self.block_manager.register_partial(
                sequence.pages[number], sequence.prefix_hash(number), sequence.block(number, end)
            )

    def _release(self, request: Request) -> None:
        """Free the pages and batch slots of a request."""
        new = [step.token for step in request.steps]
        for sequence in request.sequences:
            sequence.tokens = tokens_of(sequence.prompt, new)
            end = min(sequence.num_computed_tokens, sequence.num_tokens)
            self._publish_full_pages(sequence, sequence.prefill_target, end)
            self._publish_partial_pages(sequence, sequence.prefill_target, end)
            if not request.runs_alone:
                self._free_batch_slots.append(sequence.batch_slot)
        self._free_pages(request)
        self._running.remove(request)

    def _free_pages(self, request: Request) -> None:
        for sequence in request.sequences:
            for page in reversed(sequence.pages):  # the end of a sequence is evicted before its beginning
                self.block_manager.free(page)
        self._streams.pop(request, None)
        request.sequences = []

    def _release_finished(self) -> None:
        for request in [r for r in self._running if r.finished]:
            self._release(request)

    def _recover(self) -> None:
        """Restart all requests after a failed step, with no pages in use: what it wrote or allocated is unknown."""
        under_way = {*self._running, *self._waiting, *self._preempted}
        self._streams = {}  # first: as they close, they use the sequences
        for request in {*self._running, *self._preempted}:
            request.output_processor.rewind(request.steps)
            self._deliver(request)
        for request in under_way:
            request.sequences = []
        arriving = set(self._inbox.copy())  # one may be in both while it is moved
        self._waiting = sorted(r for r in under_way - arriving if not r.finished)
        self._running, self._preempted, self._new_pages, self._copies, self._pending = [], [], [], [], []
        self._free_batch_slots = list(range(self.max_batch_size))[::-1]
        self.cache.block_manager = BlockManager(self.block_manager.num_pages)

    # ---- prefill and output

    def _prefill(self) -> list[PendingOutput]:
        """Enqueue a prefill step: prompts already begun, then those that can start; return it if it samples tokens."""
        chunks: list[PrefillChunk] = []
        left = self.prefill_tokens
        begun = (r for r in self.running if not all(sequence.is_prefilled for sequence in r.sequences))
        while left and len(chunks) < self.batch.max_chunks and (request := next(begun, None) or self._admit()):
            for sequence in request.sequences if not request.runs_alone else ():
                first = sequence.num_computed_tokens
                while not sequence.is_prefilled and left and len(chunks) < self.batch.max_chunks:
                    start = sequence.num_computed_tokens
                    length = min(WIDTH, sequence.prefill_target - start, left)
                    chunks.append(PrefillChunk(request, sequence, start, length))
                    sequence.num_computed_tokens += length
                    left -= length
                # Other requests may share them in this very step: see `PagedCacheView`.
                self._publish_full_pages(sequence, first, sequence.num_computed_tokens)
        if self._copies:  # before clearing: a source page may have been reallocated
            self.cache.copy(self._copies)
        if taken := set(self._new_pages).difference(page for _, page, _ in self._copies):
            self.cache.clear(sorted(taken))
        self._new_pages, self._copies = [], []
        together = [r for r in self._running if not r.runs_alone]
        outputs = self.batch.prefill(chunks, together) if chunks else []
        for _, sequence, start, length in chunks:
            self._publish_partial_pages(sequence, start, start + length)
        return outputs

    def _advance_streams(self) -> list[PendingOutput]:
        """Enqueue a chunk or a decode step of each request that runs alone; return those that may be read later."""
        outputs = []
        for request in [r for r in self.running if r.runs_alone]:
            if request.finished:  # by the callback of another, perhaps
                continue
            output, ahead = None, False
            with self._errors_end(request):
                output, ahead = self._advance_stream(request)
            if output is not None and ahead:
                outputs.append(output)
            elif output is not None:
                self._process_output(output)
        return outputs

    def _advance_stream(self, request: Request) -> tuple[PendingOutput | None, bool]:
        """Enqueue the next chunk or decode step of a request that runs alone; return it if it samples tokens, and
        whether it may be read later, else finished."""
        if request not in self._streams:
            stream = self._start_stream(request)
            self._streams[request] = stream, stream.steps()
        stream, steps = self._streams[request]
        output = next(steps, None)
        if output is not None and not stream.ahead:
            output.finish()
        return output, stream.ahead

    @contextmanager
    def _errors_end(self, request: Request) -> Iterator[None]:
        """Let an error in the user's code end this request and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything
            traceback.clear_frames(error.__traceback__)  # they hold the stream and its cache
            request.error = error
            self._end(request, "error")

    def _start_stream(self, request: Request) -> Stream:
        """Start the stream of a request that runs alone, or resume it after it was preempted or interrupted."""
        cache = request.cache
        if cache is None:
            longest = max(s.num_tokens for s in request.sequences) + request.output_processor.limit
            blocks = self.blocks if self.runner.compile else min(self.blocks, -(-longest // BLOCK))
            rows: RowCache = PagedRows(self.cache, request.sequences, blocks)
        elif request.start is None:  # its length may have changed while the request waited
            self.limits.check([request.ensemble], request.output_processor.limit, cache)
        else:
            self.model.check_cache(cache, len(request.sequences))
        request.prepare()
        return new_stream(self.runner, [request], rows if cache is None else cache, self._speculation)

    def _process_output(self, output: PendingOutput) -> None:
        """Append sampled tokens; drop those of finished requests."""
        for request, sampled in output.tokens():
            if not sampled.finite:
                if not request.runs_alone:
                    self.forget()  # keys and values may hold NaN, too
                if request.num_cached_tokens and not request.finished:
                    self._restart_isolated(request)
                    continue
                if not request.finished:
                    where = [(request.number, len(request.steps) + 1)]
                    request.error = NonFiniteLogitsError(where, self.model.dtype)
                    self._end(request, "error")
            elif sampled.error is not None and not request.finished:
                request.error = sampled.error
                self._end(request, "error")
            if not request.finished:
                request.add(sampled.token, sampled.logprob, sampled.top_logprobs)
                self.new_tokens += 1
                self._deliver(request)

    def _restart_isolated(self, request: Request) -> None:
        """Restart a request without shared pages: the NaN may come from the request that computed them."""
        request.isolated = True
        for output in self._pending:
            output.rows[:] = [(other, row) for other, row in output.rows if other is not request]
        if request.sequences:  # else it is waiting already
            self._preempted.append(request)
            self._release(request)

    def _deliver(self, request: Request) -> None:
        """Handle the newest step: end the request if the step has a finish_reason, and call the callback."""
        if request.num_delivered == len(request.steps):
            return
        reason = request.steps[-1].finish_reason
        if reason is not None and not request.finished:
            self._end(request, reason)
        if request.callback is not None:
            with self._errors_end(request):
                request.callback(request.steps[-1])
        request.num_delivered += 1


def _pages_that_fit(model: Llama, kv_dtype: KVDtype, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction must be above 0 and at most 1, not {fraction}")
    if model.device.type == "cuda":
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused
    else:
        free = _free_memory()
    pages = int(free * fraction) // PagedCache.page_bytes(model.dims, dtype_of(kv_dtype, model.dtype)) - 1
    if pages < 1:
        raise ValueError(
            f"memory_fraction {fraction} of {free / 1e9:.1f} GB free is less than a page of {BLOCK} tokens"
        )
    return pages


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except OSError:
        raise ValueError("free memory can be determined only on Linux; pass max_slots") from None
