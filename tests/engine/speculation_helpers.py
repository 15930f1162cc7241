"""Helpers of the tests of speculation: drafters, schedules, and what a schedule gives with drafts and without.

A schedule is a stream of any kind, over a caller's cache or not, taken to its end or not. Its outcome holds all that
the stream leaves, which must not depend on drafts.
"""

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from request_helpers import random_ids

from llama_flex import (
    Cache,
    Capture,
    Engine,
    Ensemble,
    Llama,
    LlamaConfig,
    Mask,
    Prompt,
    Sampling,
    Tokenizer,
    edits,
    fuse,
    masks,
)
from llama_flex import scores as scores_
from llama_flex.engine.drafting import Drafter
from llama_flex.engine.fusion import AnyPrompt, as_ensemble
from llama_flex.engine.speculation import Speculation

VOCAB = 160
STOP = 2
BY_HEAD = torch.tensor([3, 9, 40, 500])
# Masks of every kind; some look ahead, and one is for each of the two layers of the schedules' models.
MASKS: dict[str, Any] = {
    "default": None,
    "window": masks.sliding_window(7),
    "window and sinks": masks.sliding_window(5) | masks.sink(2),
    "documents": masks.causal() & masks.document(),
    "looks ahead": masks.bidirectional(),
    "window that looks ahead": masks.bidirectional_window(4),
    "prefix": masks.prefix_lm(6),
    "by head": Mask(lambda q, kv: q.index - kv.index < BY_HEAD[q.head]) & masks.causal(),
    "by position": Mask(lambda q, kv: (kv.index <= q.index) & ((q.position - kv.position) % 3 < 2)),
    "by layer": [masks.sliding_window(4), masks.bidirectional()],
}
SCORES: dict[str, Any] = {"none": None, "alibi": scores_.alibi(4), "softcap": scores_.softcap(3.0)}


@functools.cache
def small_model(device: str = "cpu") -> Llama:
    """Make a one-layer model with the vocabulary of `model`, and more heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8}
    return _random(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=1024, head_dim=16, **sizes), 1).to(device)


@functools.cache
def model(num_key_value_heads: int = 2, device: str = "cpu") -> Llama:
    """Make one of the two-layer models of the schedules."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=num_key_value_heads, **sizes)
    return _random(config, num_key_value_heads).to(device)


def _random(config: LlamaConfig, seed: int) -> Llama:
    torch.manual_seed(seed)
    made = Llama(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return made


def oracle(texts: Sequence[Sequence[int]], probability: float = 1.0, seed: int = 0) -> Drafter:
    """Return a drafter that knows how texts go on, and says each token of it with a probability, else another one."""
    rng = random.Random(seed)

    def draft(ids: Sequence[int], most: int) -> list[int]:
        known = next((text for text in texts if list(text[: len(ids)]) == list(ids)), [])
        rest = list(known[len(ids) :])[:most]
        return [id if rng.random() < probability else (id + 1) % VOCAB for id in rest]

    return draft


def guesses(ids: Sequence[int], most: int) -> list[int]:
    """Draft tokens that depend on the text, hardly ever the right ones."""
    return [(7 * n + ids[-1] + len(ids)) % VOCAB for n in range(most)]


@dataclass
class Schedule:
    """Prompts and the options of a stream over them.

    cache: whether it continues in a cache of the caller's, plain or rolling, in which tokens may be already. taken: how
    many steps are taken before the stream is closed, None for all.
    """

    prompts: list[AnyPrompt]
    options: dict[str, Any]
    cache: str | None = None
    before: list[list[int]] = field(default_factory=list)
    taken: int | None = None
    capture: bool = False
    num_key_value_heads: int = 2
    device: str = "cpu"

    @property
    def model(self) -> Llama:
        """The model."""
        return model(self.num_key_value_heads, self.device)

    @property
    def rows(self) -> int:
        """The number of rows of its cache."""
        return sum(len(as_ensemble(prompt).prompts) for prompt in self.prompts)

    def new_cache(self, engine: Engine) -> Cache | None:
        """Make the cache, and fill it with the tokens in it before."""
        if self.cache is None:
            return None
        cache = (
            engine.model.new_cache(self.rows, 640)
            if self.cache == "plain"
            else engine.model.new_rolling_cache(self.rows, 9, sinks=2)
        )
        if self.before:
            Engine(engine.model, backend="dense").generate(
                self.before, max_new_tokens=1, stop_token_ids=(), cache=cache, mask=self.options.get("mask")
            )
        return cache


@dataclass
class Outcome:
    """What a schedule gave: the steps of each row, what its cache held in the end, what was captured, and what a second
    stream on the cache gave."""

    steps: list[list[Any]]
    held: list[list[tuple[int, int, int]]]
    captured: dict[str, torch.Tensor]
    then: list[list[int]]


def held(cache: Cache) -> list[list[tuple[int, int, int]]]:
    """Return the attributes of the tokens of each row of a cache, in order; of a rolling one those that the next query
    sees, as others are freed later."""
    rows = torch.stack(list(cache.tokens), 2).tolist()
    found = [sorted(tuple(token) for token in row if token[0] >= 0) for row in rows]
    if cache.window is None:
        return found
    first = [length - cache.window + 1 for length in cache.length.tolist()]
    return [[t for t in row if t[0] < cache.sinks or t[0] >= n] for row, n in zip(found, first, strict=True)]


def run(engine: Engine, schedule: Schedule) -> Outcome:
    """Run a schedule."""
    cache, options = schedule.new_cache(engine), dict(schedule.options)
    capture = Capture("resid_post", "attention", where=lambda t: t.index % 3 != 1) if schedule.capture else None
    stream = engine.stream(schedule.prompts, cache=cache, capture=capture, **options)
    steps: list[list[Any]] = [[] for _ in schedule.prompts]
    for step in itertools.islice(stream, schedule.taken):
        steps[step.row].append(step)
        if cache is not None and cache.window is None:
            assert cache.reserved >= int((cache.tokens.index >= 0).sum(1).max()), "reserved"
    stream.close()
    captured = {}
    if capture is not None:
        captured = {f"{site} {n}": capture[site, n] for site in ("resid_post", "attention") for n in (0, 1)}
        captured["index"] = capture.tokens.index
    if cache is None:
        return Outcome(steps, [], captured, [])
    found = held(cache)
    then = engine.generate(
        [[7 + row, 8] for row in range(schedule.rows)],
        cache=cache,
        max_new_tokens=6,
        stop_token_ids=(),
        mask=options.get("mask"),
    )
    return Outcome(steps, found, captured, [each.tokens for each in then])


def assert_same_outcome(one: Outcome, other: Outcome) -> None:
    """Check that two outcomes are the same, numbers up to rounding."""
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert [step.token for step in mine] == [step.token for step in theirs], "tokens"
        assert [(s.text, s.finish_reason) for s in mine] == [(s.text, s.finish_reason) for s in theirs]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.logprob, b.logprob, atol=5e-5, rtol=5e-5)
            tops = [[] if step.top_logprobs is None else step.top_logprobs for step in (a, b)]
            assert [id for id, _ in tops[0]] == [id for id, _ in tops[1]]
            torch.testing.assert_close([v for _, v in tops[0]], [v for _, v in tops[1]], atol=5e-5, rtol=5e-5)
    assert one.held == other.held, "held"
    assert one.captured.keys() == other.captured.keys()
    for name, values in one.captured.items():
        expected = other.captured[name]
        if "attention" in name:  # the step before a stop may have had more keys, which no captured token saw
            most = max(values.shape[-1], expected.shape[-1])
            values, expected = (torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in (values, expected))
        spread = 2e-5 * float(values.abs().amax())
        torch.testing.assert_close(values, expected, atol=spread, rtol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert one.then == other.then, "then"


NEW = {"max_new_tokens": 24, "stop_token_ids": ()}
SAMPLED = {"sampling": Sampling(temperature=1.0, seed=6)}
LIKED = dict.fromkeys(range(20, 60, 10), 9.0)  # so that tokens come again
PENALISED = Sampling(
    logit_bias=LIKED, repetition_penalty=1.1, frequency_penalty=1.5, temperature=0.7, seed=3, top_logprobs=2
)
STOPPED = {"stop_token_ids": range(3, 160, 12)}
PROMPTS = [random_ids(9), random_ids(130), random_ids(2)]
# Some of the schedules that hypothesis draws, for what takes long, and to find faults in a short time.
EXAMPLES = {
    "greedy": Schedule(PROMPTS, NEW, "plain"),
    "sampled": Schedule(PROMPTS, NEW | SAMPLED, before=[random_ids(5), random_ids(140), [3]], cache="plain"),
    "penalties": Schedule(PROMPTS[:1], NEW | {"sampling": PENALISED}, taken=20),
    "stops": Schedule(PROMPTS, NEW | SAMPLED | STOPPED, "plain", capture=True),
    "rolling": Schedule(PROMPTS, NEW | SAMPLED | STOPPED, "rolling", before=[random_ids(140, n) for n in range(3)]),
    "looks ahead": Schedule(PROMPTS, NEW | SAMPLED | {"mask": MASKS["looks ahead"]}, "plain"),
    "by layer": Schedule(PROMPTS[:2], NEW | {"mask": MASKS["by layer"], "score_mod": scores_.alibi(4)}, capture=True),
    "several": Schedule([fuse(PROMPTS[::2], suffix=[4]), Ensemble(PROMPTS, "max")], NEW | SAMPLED),
}


def texts_of(schedule: Schedule, outcome: Outcome) -> list[list[int]]:
    """Return the ids of each text, with what followed."""
    cached = schedule.options.get("cached_ids") or [[] for _ in schedule.prompts]
    return [
        [*before, *as_ensemble(prompt).prompts[0].ids, *(step.token for step in steps)]
        for before, prompt, steps in zip(cached, schedule.prompts, outcome.steps, strict=True)
    ]


@st.composite
def samplings(draw: Callable, most: int) -> Sampling:
    """Draw sampling parameters of every kind, for up to `most` new tokens."""
    chance = functools.partial(draw, st.integers(0, 3))
    given: dict[str, Any] = {"temperature": draw(st.sampled_from([0.0, 0.4, 1.0])), "seed": draw(st.integers(0, 99))}
    given |= {"top_k": draw(st.sampled_from([1, 5, 40]))} if not chance() else {}
    given |= {"top_p": 0.7} if not chance() else {}
    given |= {"min_p": 0.1} if not chance() else {}
    given |= {"typical_p": 0.8} if not chance() else {}
    given |= {"repetition_penalty": draw(st.sampled_from([0.8, 1.3]))} if not chance() else {}
    given |= {"presence_penalty": draw(st.sampled_from([-2.0, 1.5]))} if not chance() else {}
    given |= {"frequency_penalty": draw(st.sampled_from([-1.0, 2.0]))} if not chance() else {}
    given |= {"logit_bias": {20: 6.0, 30: 6.0, STOP: 4.0}} if not chance() else {}
    given |= {"banned_tokens": [3, 20]} if not chance() else {}
    given |= {"min_new_tokens": draw(st.integers(1, min(most, 12)))} if not chance() else {}
    given |= {"top_logprobs": draw(st.integers(1, 4))} if not chance() else {}
    return Sampling(**given)


@st.composite
def prompts_(draw: Callable) -> AnyPrompt:
    """Draw a prompt of any kind."""
    ids = random_ids(draw(st.sampled_from([1, 2, 9, 30, 130])), draw(st.integers(0, 9)))
    match draw(st.sampled_from(["plain"] * 4 + ["repeats", "fused", "ensemble", "documents"])):
        case "repeats":
            return ids[:6] * 4
        case "fused":
            return fuse(
                [ids, [5, 6, 7]], prefix=[4], suffix=[9], positions=draw(st.sampled_from(["continue", "parallel"]))
            )
        case "ensemble":
            return Ensemble([ids, random_ids(17, 3)], draw(st.sampled_from(["mean", "max"])))
        case "documents":
            return Prompt(
                ids, range(len(ids)), [n // 8 for n in range(len(ids))], generated_segment=(len(ids) - 1) // 8
            )
    return ids


@st.composite
def schedules(draw: Callable) -> Schedule:
    """Draw a schedule."""
    prompts = draw(st.lists(prompts_(), min_size=1, max_size=3))
    most = draw(st.sampled_from([1, 2, 9, 24, 40]))
    options: dict[str, Any] = {
        "max_new_tokens": most,
        "sampling": [draw(samplings(most)) for _ in prompts],
        "stop_token_ids": draw(st.sampled_from([(), (STOP,), range(3, 160, 12)])),
    }
    fused = any(p.is_fused for prompt in prompts for p in as_ensemble(prompt).prompts)
    if not fused:
        options["mask"] = MASKS[draw(st.sampled_from(["default", *MASKS]))]
        options["score_mod"] = SCORES[draw(st.sampled_from(["none", "none", *SCORES]))]
    cache = None if fused else draw(st.sampled_from([None, "plain", "rolling"]))
    schedule = Schedule(prompts, options, cache, capture=draw(st.integers(0, 3)) == 0)
    if cache is not None and draw(st.booleans()):
        schedule.before = [random_ids(draw(st.sampled_from([1, 5, 140])), n) for n in range(schedule.rows)]
        if len(prompts) == schedule.rows:
            options["cached_ids"] = schedule.before
    if draw(st.integers(0, 3)) == 0:
        options["edit"] = edits.add("resid_post", 0.3, layers=0, where=lambda t: t.position % 2 == 1)
    if len(prompts) == 1 and draw(st.integers(0, 2)) == 0:
        schedule.taken = draw(st.integers(1, 12))
    if draw(st.integers(0, 2)) == 0:
        options["stop"] = ["c", "Q", "x9", "07"]
    schedule.num_key_value_heads = draw(st.sampled_from([1, 2, 4]))
    return schedule


DRAFTERS = "oracle", "oracle", "oracle", "lookup", "self", "small", "model", "guesses"


def check(
    schedule: Schedule, drafter: str, probability: float = 1.0, tokenizer: Tokenizer | None = None, **options: Any
) -> Speculation:
    """Check that a schedule gives the same with drafts; return what came of them. options: of that engine."""
    plain = Engine(schedule.model, tokenizer, backend="dense")
    expected = run(plain, schedule)
    made: Any = {"small": small_model(schedule.device), "model": schedule.model, "guesses": guesses}.get(
        drafter, drafter
    )
    if drafter == "oracle":
        going_on = schedule.options | {"stop": (), "stop_token_ids": ()}  # beyond what ends the text
        whole = run(plain, replace(schedule, taken=None, capture=False, options=going_on))
        made = oracle(texts_of(schedule, whole), probability)
    engine = Engine(schedule.model, tokenizer, **{"backend": "dense"} | options, speculate=made)
    assert_same_outcome(run(engine, schedule), expected)
    assert engine.speculation is not None
    return engine.speculation
