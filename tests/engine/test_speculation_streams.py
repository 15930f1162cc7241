"""Drafts change nothing that a stream leaves: its tokens, its cache, its captures, and what a later stream gives."""

import inspect
import sys
from collections import Counter
from types import FunctionType

import pytest
from choosing_helpers import letters_tokenizer
from helpers import few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from request_helpers import random_ids
from speculation_helpers import (
    DRAFTERS,
    EXAMPLES,
    MASKS,
    NEW,
    PROMPTS,
    SAMPLED,
    Schedule,
    check,
    held,
    oracle,
    run,
    schedules,
    texts_of,
)

from llama_flex import Engine, Sampling, fuse
from llama_flex.engine import batch, engine, verification
from llama_flex.engine.model_runner import ModelRunner
from llama_flex.masks.plan import AttentionPlan


def limits(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.mark.parametrize("count", few([30], [500]))
def test_drafts_change_no_schedule(letters, count):
    found = Counter()

    @limits(count)
    @given(schedules(), st.sampled_from(DRAFTERS), st.sampled_from([0.5, 0.9, 1.0]), st.sampled_from([False, "auto"]))
    def test(schedule, drafter, probability, compile):
        speculation = check(schedule, drafter, probability, letters, compile=compile)
        found[drafter] += speculation.accepted

    test()
    assert found["oracle"] > count, "few drafts were accepted, so little was tested"


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("drafter", few(["oracle"], ["lookup", "self", "small", "model", "guesses"]))
def test_drafts_change_no_example(name, drafter):
    speculation = check(EXAMPLES[name], drafter)
    assert drafter != "oracle" or 0 < speculation.accepted == speculation.drafted


@pytest.mark.parametrize(
    ("name", "drafter", "compile"),
    [
        ("sampled", "oracle", "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)  # each compiles for a minute
            for case in (("sampled", "oracle", True), ("penalties", "self", True), ("several", "model", True))
        ),
    ],
)
def test_drafts_change_no_compiled_example(name, drafter, compile):
    check(EXAMPLES[name], drafter, 0.9, compile=compile, backend="flex")


@pytest.mark.parametrize(
    "options", [NEW, NEW | SAMPLED, NEW | {"sampling": Sampling(top_k=5, temperature=0.8, seed=1)}]
)
@pytest.mark.parametrize("mask", ["default", "window", "by head"])
def test_all_drafts_of_the_model_itself_are_accepted(options, mask):
    prompts = [*PROMPTS, fuse(PROMPTS[::2])] if mask == "default" else PROMPTS
    speculation = check(Schedule(prompts, options | {"mask": MASKS[mask]}), "model")
    assert speculation.accepted == speculation.drafted >= 20 * len(prompts)


def test_steps_are_saved():
    speculation = check(EXAMPLES["greedy"], "oracle")
    assert speculation.texts == 3
    # 23 tokens follow the first one: with up to 3, 6 and 12 drafts in the three steps that are needed.
    assert (speculation.decoded, speculation.decode_steps) == (3 * 23, 3 * 3)
    assert speculation.describe() == "drafts by draft: 60 in 3 texts, 60 accepted, 7.67 tokens a step"


@pytest.mark.parametrize("taken", [1, 2, 7, 20])
def test_a_closed_stream_leaves_the_tokens_before_the_last_ones_taken(taken):
    schedule = EXAMPLES["sampled"]
    expected = run(Engine(schedule.model, backend="dense"), schedule)
    drafting = Engine(schedule.model, backend="dense", speculate=oracle(texts_of(schedule, expected)))
    cache, found = schedule.new_cache(drafting), [[], [], []]
    stream = drafting.stream(schedule.prompts, cache=cache, **schedule.options)
    for _ in range(taken):
        step = next(stream)
        found[step.row].append(step.token)
    stream.close()
    for row, tokens in enumerate(found):
        assert tokens == [step.token for step in expected.steps[row]][: len(tokens)]
        length = len(schedule.before[row]) + len(schedule.prompts[row]) + max(0, len(tokens) - 1)
        assert [index for index, *_ in held(cache)[row]] == list(range(length))
    assert cache.reserved == max(map(len, held(cache)))


@pytest.mark.parametrize("lengths", [[60], [60, 20], [1, 127]])
def test_drafts_fill_a_cache_to_its_last_slot(lengths):
    prompts = [random_ids(n) for n in lengths]
    schedule = Schedule(prompts, SAMPLED | {"stop_token_ids": (), "max_new_tokens": 128 - max(lengths)})
    plain = Engine(schedule.model, backend="dense")
    texts = texts_of(schedule, run(plain, schedule))
    for made in (oracle(texts), oracle(texts[:1]), oracle(texts[-1:], 0.7), "self"):
        drafting = Engine(schedule.model, backend="dense", speculate=made)
        cache = drafting.new_cache(len(prompts), 128)
        done = drafting.generate(prompts, cache=cache, **schedule.options)
        assert [[*prompt, *each.tokens] for prompt, each in zip(prompts, done, strict=True)] == texts
        assert cache.length.tolist() == [len(text) - 1 for text in texts]


@pytest.mark.parametrize(("drafter", "at"), [("oracle", 2), ("oracle", 3), *(("self", n) for n in range(5, 11))])
def test_an_interrupt_leaves_a_cache_with_the_tokens_before_the_last_one_taken(monkeypatch, drafter, at):
    schedule = EXAMPLES["greedy"]
    texts = texts_of(schedule, run(Engine(schedule.model, backend="dense"), schedule))
    drafting = Engine(schedule.model, backend="dense", speculate=oracle(texts) if drafter == "oracle" else drafter)
    cache, tokens, calls, step = drafting.new_cache(3, 512), [[], [], []], [], ModelRunner.step

    def interrupted(self, ids, *given):
        calls.append(ids.shape[1])
        result = step(self, ids, *given)
        if len([width for width in calls if width < 128]) == at:
            raise KeyboardInterrupt
        return result

    def take() -> None:
        for each in drafting.stream(schedule.prompts, cache=cache, **schedule.options):
            tokens[each.row].append(each.token)

    monkeypatch.setattr(ModelRunner, "step", interrupted)  # of the drafter, too
    with pytest.raises(KeyboardInterrupt):
        take()
    lengths = [len(p) + len(t) - 1 for p, t in zip(schedule.prompts, tokens, strict=True)]
    assert cache.length.tolist() == lengths
    assert cache.reserved == max(lengths)
    monkeypatch.undo()
    rest = [[t[-1]] for t in tokens]
    more = 24 - max(map(len, tokens))
    options = schedule.options | {"max_new_tokens": more}
    again = drafting.generate(rest, cache=cache, **options)
    for text, prompt, taken, done in zip(texts, schedule.prompts, tokens, again, strict=True):
        assert [*prompt, *taken, *done.tokens] == text[: len(prompt) + len(taken) + more]


def test_a_stream_that_ends_late_leaves_what_the_caller_has_appended_to_the_cache():
    schedule = Schedule([[5, 6, 7]], NEW)
    texts = texts_of(schedule, run(Engine(schedule.model, backend="dense"), schedule))
    engine = Engine(schedule.model, backend="dense", speculate=oracle(texts))
    cache = engine.new_cache(1, 128)
    stream = engine.stream(schedule.prompts, cache=cache, **NEW)
    next(stream), next(stream)
    engine.generate([[8, 9]], cache=cache, max_new_tokens=1, stop_token_ids=())
    before = held(cache)
    stream.close()
    assert held(cache) == before


# ---- faults that must be found


def mutate(monkeypatch, owner, name: str, old: str, new: str) -> None:
    """Replace a part of a function's source."""
    function = getattr(owner, name)
    lines = inspect.getsource(function)
    indent = len(lines) - len(lines.lstrip())
    source = "\n".join(line[indent:] for line in lines.split("\n"))
    assert source.count(old) == 1, f"{name} has changed: {old}"
    scope = dict(vars(sys.modules[function.__module__]))
    if inspect.isclass(owner):
        source = source.replace("super()", f"super({owner.__name__}, self)")
    exec(compile(f"from __future__ import annotations\n{source.replace(old, new)}", name, "exec"), scope)
    made = scope[name]
    assert isinstance(made, FunctionType)
    monkeypatch.setattr(owner, name, made)


FAULTS = {
    "every draft is accepted": (batch, "_verify_next", "(token[:, :-1] == drafts) & ", ""),
    "rejected drafts stay in the cache": (batch, "_verify_next", "cache.drop(count - new)", "pass"),
    "drafts have the next positions": (
        *(batch.Batch, "_fill_drafts"),
        *("first + np.arange(len(ids))", "first + np.arange(len(ids)) + (np.arange(len(ids)) > 0)"),
    ),
    "the noise is that of the next step": (
        batch,
        "_verify_next",
        "s.done[:, None] + column",
        "s.done[:, None] + column + 1",
    ),
    "penalties do not count drafts": (
        batch,
        "_verify_next",
        "column[:, None] > column[: t - 1]",
        "column[:, None] < 0",
    ),
    "tokens after a stop stay in a rolling cache": (
        *(verification.VerifyingStream, "_next"),
        *("self._drop_unread()", "pass"),
    ),
    "tokens that were not taken stay": (verification.VerifyingStream, "_drop_unread", "if not drop:", "if True:"),
    "rejected drafts are captured": (verification, "_first_tokens", "torch.where(kept, index, -1)", "index"),
}


def check_examples() -> None:
    for name, schedule in EXAMPLES.items():
        check(schedule, "oracle", 1.0 if name in ("rolling", "stops", "penalties") else 0.7)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_schedules_find_faults(monkeypatch, fault):
    mutate(monkeypatch, *FAULTS[fault])
    with pytest.raises(AssertionError):
        check_examples()


def test_the_schedules_find_drafts_that_see_later_ones(monkeypatch):
    monkeypatch.setattr(AttentionPlan, "backward", property(lambda self: self))
    with pytest.raises(AssertionError, match="tokens"):
        check(EXAMPLES["looks ahead"], "oracle")


def test_the_schedules_find_a_rolling_cache_that_drafts_roll(monkeypatch):
    mutate(monkeypatch, engine, "new_stream", "held.window is not None", "False")
    with pytest.raises(AssertionError):
        check(EXAMPLES["rolling"], "self")
