"""Run one step of a model over a cache of any kind, compiled or not, and record steps for replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from ..attention import Backend
from ..interp.hook_points import Captured, Probe
from ..kernels import cpu, flex_attention
from ..kernels.kv_cache import KVDtype
from ..masks.layout import SlotCache
from ..masks.plan import AttentionPlan
from ..model import Llama, Run, run_eager
from ..tokens import Tokens
from ..usercode.arguments import check_choice
from ..usercode.modules import are_own, check_hooks, hooks_of, is_changed
from . import operations
from .graphs import Graphs, compiles_for

T = TypeVar("T")
# What compile="auto" means. On a CPU the dense kernels of `kernels.cpu` need no compiling, and are faster than
# Inductor's FlexAttention. On a GPU compiled steps take half the time of uncompiled ones, but compiling takes 7 s if
# the code is cached, else 25 s, in which uncompiled steps give 900 to 3,300 tokens (8B, H200).
COMPILES_BY_ITSELF = {"cpu": False, "cuda": True}
# So there streams begin with uncompiled steps, recorded and replayed: prompts of up to so many tokens in all, as dense
# attention takes memory for each pair of tokens, and so many decode steps of a shape. A rule and not a clock, because
# what is compiled rounds differently in 16 bits.
UNCOMPILED_STEPS, UNCOMPILED_PROMPTS = 2048, 4096


class LastRun(NamedTuple):
    """The plan and the tokens of the last run, and what keys and values are kept in, for `explain`."""

    plan: AttentionPlan
    tokens: Callable[[], Tokens]  # returns the tokens held now, [B, S]
    kv_dtype: KVDtype

    def newest(self) -> Tokens:
        """Return each row's newest token, `[B, 1]`."""
        held = self.tokens()
        at = held.index.argmax(1, keepdim=True)
        return held.map(lambda x: x.gather(1, at))


class ModelRunner:
    """The runner of a model's steps, which holds the compiled ones.

    backend: of attention. graphs: the compiled parts. shapes: those of compiled steps, as (rows, tokens, slots, ...).
    last: the last run. uncompiled: the runner of the first steps where "auto" compiles; steps: how many of each shape
    it has run; compiling: functions that wait for the compilation of a shape.
    """

    def __init__(self, model: Llama, *, compile: bool | Literal["auto"] = False, backend: Backend = "flex") -> None:
        check_choice("backend", backend, get_args(Backend))
        self.model, self._backend = model, backend
        self.uncompiled: ModelRunner | None = None
        self.steps: Counter[Hashable] = Counter()
        self.compiling: dict[Hashable, Callable[[], None]] = {}
        self.compile = compile
        self.graphs = Graphs()
        self.shapes: set[tuple[Any, ...]] = set()
        self.last: LastRun | None = None

    @property
    def compile(self) -> bool:
        """Whether steps are compiled; may be set between calls, to "auto" too. Raises ValueError on a CPU before torch
        2.13, whose compiled reductions of booleans write out of bounds."""
        return self._compile

    @compile.setter
    def compile(self, on: bool | Literal["auto"]) -> None:
        if on not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', found {on!r}")
        self._auto = on == "auto"
        if on == "auto":
            on = COMPILES_BY_ITSELF.get(self.model.device.type, False)
        if on and not compiles_for(self.model.device):
            raise ValueError(
                f"CPU code compiled by torch {torch.__version__} corrupts memory; use torch 2.13 or newer, or do not "
                "compile: compile=False, --compile off"
            )
        self._compile = on
        if not (on and self._auto):
            self.uncompiled = None
        elif self.uncompiled is None:
            self.uncompiled = ModelRunner(self.model)
            self.uncompiled._auto = True

    def follow(self, other: ModelRunner) -> None:
        """Compile, or not, and attend as another runner does."""
        self._backend, self.compile = other._backend, "auto" if other._auto else other._compile

    @property
    def backend(self) -> Backend:
        """The backend of attention: the one asked for, but "dense" where "auto" does not compile."""
        return "dense" if self._auto and not self._compile else self._backend

    def for_prompts(self, plan: AttentionPlan, tokens: int, probes: Mapping[int, Probe]) -> ModelRunner:
        """Return the runner with which a stream of prompts of so many tokens begins: where "auto" compiles, the
        uncompiled one, if it can replay the stream's steps."""
        first = self.uncompiled
        if first is None or tokens > UNCOMPILED_PROMPTS or self.model.rotary.limit is not None:
            return self  # frequencies that depend on the length are made of numbers on the host
        return first if first.replays(plan, probes) and first.has_own_modules() else self

    def steps_left(self, shape: Hashable) -> int:
        """Return how many more decode steps of a shape are uncompiled, where "auto" compiles."""
        return max(0, UNCOMPILED_STEPS - self.steps[shape])

    def replays(self, plan: AttentionPlan, probes: Mapping[int, Probe] | None = None) -> bool:
        """Return whether steps are recorded and replayed: compiled ones, and with "auto" uncompiled ones, unless they
        run a user's functions, which may read values of tensors, or do anything else."""
        return self._compile or (self._auto and plan.is_own and not probes)

    def has_own_modules(self) -> bool:
        """Return whether the model consists of this package's modules, unchanged: a user's module or hook may do
        anything else in every step."""
        return all(
            type(x) is nn.ModuleList or are_own(x) or (type(x) is nn.Embedding and not is_changed(x))
            for x in self.model.modules()
        )

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], T]]:
        """Run a step while recording it; return its result and a replay function; see `Graphs.record`."""
        if self._compile or self.model.device.type == "cuda":
            return self.graphs.record(step, self.model.device)
        return operations.record(step)

    def run_for(self, *key: Any) -> Run:
        """Return a function that runs the parts of a step, compiled for `key` if steps are compiled."""
        if self.model.device.type == "cpu" and self.model.dtype in cpu.DTYPES:
            cpu.load(self.model.dtype)  # compiled code can only use it
        return self.graphs.of(*key) if self.compile else run_eager

    def compiled_plan(self, plan: AttentionPlan) -> AttentionPlan:
        """Return the plan that compiled steps without probes use: with flash-attn-4, if it is installed.

        Inductor frees the tensors that a mask reads before that kernel runs, if something else in the same compiled
        part, such as a probe, reads them, too (torch 2.11: "UnboundLocalError").
        """
        return plan.with_flash if flex_attention.has_flash(self.model.device) else plan

    def step(
        self,
        ids: Tensor,
        lengths: Tensor,
        positions: Tensor,
        segments: Tensor,
        plan: AttentionPlan,
        cache: SlotCache,
        probes: Mapping[int, Probe] | None = None,
        adapters: Tensor | None = None,
    ) -> tuple[Tensor, Captured | None]:
        """Append ids `[R, T]`, of which `lengths` in each row are real; return the last layer's output, `[R, T, E]` or
        packed, and the tensors that probes captured. adapters: see `Llama.step`. Raises ValueError for forward hooks of
        the whole model."""
        if any(hooks_of(self.model)):
            check_hooks(
                self.model,
                "generation runs its parts one by one",
                "register it on those, such as model.layers[0] or model.norm",
            )
        key: tuple[Any, ...] = ()
        if self.compile:
            plan = plan if probes else self.compiled_plan(plan)
            shape = ids.shape if cache.token_indices is None else (1, len(cache.token_indices))
            kv = cache.layers[0]
            of_rows = None if adapters is None else adapters.shape
            key = (*shape, cache.max_length, type(cache), kv.k.shape, kv.kv_dtype, of_rows, plan.structure)
            self.shapes.add(key)
        run = self.run_for(*key)
        return self.model.step(ids, lengths, positions, segments, cache, plan, self.backend, run, probes, adapters)


class RecordedSteps:
    """Whole steps by key, each always in the same memory: compiled, or just run, at first, then recorded, then
    replayed."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._ran: set[tuple[Hashable, ...]] = set()
        self._replays: dict[tuple[Hashable, ...], tuple[object, Callable[[], object]]] = {}

    def run(self, key: tuple[Hashable, ...], step: Callable[[], T], *, replays: bool, memory: object = None) -> T:
        """Run a step, or replay it. replays: see `ModelRunner.replays`. memory: an object whose replacement makes a
        recording stale, such as a cache's layers."""
        key = self._runner.compile, *key
        if not replays or key not in self._ran:
            result = step()
            if not self._runner.compile:
                self.forget()  # recording takes hardly longer than a step: keep the latest only
            self._ran.add(key)
            return result
        recorded_on, replay = self._replays.get(key, (None, None))
        if replay is not None and recorded_on is memory:
            return cast(T, replay())
        if not self._runner.compile and not self._runner.has_own_modules():  # asked only here: it takes 0.2 ms
            return step()
        self._replays.pop(key, None)  # free the old recording before the new one allocates
        replay = None
        result, again = self._runner.record(step)
        self._replays[key] = memory, again
        return result

    def forget(self, keep: Collection[Hashable] = ()) -> None:
        """Drop all steps, except those whose keys end in one of `keep`."""
        self._ran = {key for key in self._ran if key[-1] in keep}
        self._replays = {key: step for key, step in self._replays.items() if key in self._ran}
