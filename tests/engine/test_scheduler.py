"""Continuous batching: every request gets what it would get alone, whatever else runs, comes and goes."""

import gc
import random
import tracemalloc
from collections import Counter

import pytest
import torch
from helpers import few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from request_helpers import Case, Refused, check_empty, make_case, new_engine, random_ids, tokens_of

from llama_flex import Engine, Ensemble, Mask, Sampling, fuse, masks, scores
from llama_flex.engine.request import Request
from llama_flex.masks.layout import BLOCK

KINDS = 40


def cases_of_many_kinds(engine: Engine) -> list[Case]:
    """Make requests of many kinds, with what each gives alone."""
    rng = random.Random(0)
    shared = [rng.randrange(3, 160) for _ in range(400)]
    window, parity = masks.sliding_window(40) | masks.sink(2), torch.tensor([1, 0] * 300)

    def own(q, kv, table=parity):
        return (kv.index <= q.index) & (table[kv.index.clamp(0, 599)] + q.batch >= 0) & (q.index - kv.index < 77)

    found = []
    for n in range(24):
        length = rng.choice([1, 2, 30, 127, 128, 129, 200, 256, 300])
        ids = [rng.randrange(3, 160) for _ in range(length)]
        options = {"max_new_tokens": rng.choice([1, 3, 9, 20]), "stop_token_ids": ()}
        if n % 2:
            options["sampling"] = Sampling(temperature=0.9, top_k=rng.choice([0, 20]), top_p=0.95, seed=n)
        if n % 5 == 1:
            options["sampling"] = Sampling(temperature=0.7, repetition_penalty=1.3, min_p=0.02, seed=-n)
        if n % 3 == 0:
            ids = shared[: rng.choice([128, 200, 256, 390])] + ids[:5]
        prompt = ids
        if n % 6 == 4:
            prompt = fuse([ids, shared[:50]], prefix=[4, 5], suffix=[6], positions=rng.choice(["continue", "parallel"]))
        if n % 7 == 2:
            options["mask"] = rng.choice([window, Mask(own)])
        if n % 8 == 3:
            options["stop_token_ids"] = range(100, 160, 4)
        found.append(make_case(engine, prompt, **options))

    new = {"max_new_tokens": 9, "stop_token_ids": ()}
    sampled = new | {"sampling": Sampling(temperature=1.0, top_p=0.9, seed=5)}
    penalised = new | {"sampling": Sampling(temperature=0.8, repetition_penalty=1.4, seed=6)}
    a, b, c, d = (random_ids(length, 7) for length in (3, 60, 140, 250))
    # The same tokens with other weights: what follows the prompts, even a whole page of suffix, must not be shared.
    weighted = [fuse([b, a], suffix=c, weights=w) for w in ([1, 1], [9, 1], [1, 20])]
    each = fuse([d, b, a], prefix=[9], positions="parallel", weights=[0.2, 1, 4])
    per_row = masks.sliding_window(torch.tensor([33]))
    each_layer = [masks.sliding_window(20) | masks.sink(1), None]

    widths = torch.tensor([5, 50])

    def of_member(q, kv):
        return (kv.index <= q.index) & (q.index - kv.index < widths[q.batch])

    found += [
        make_case(engine, Ensemble([a, b], "mean"), **sampled),
        make_case(engine, Ensemble([b, a, b[:30]], "max"), **new),
        make_case(engine, Ensemble([c, d[:128]], "mean"), **penalised),
        make_case(engine, Ensemble([d, c], "max"), **new),
        make_case(engine, Ensemble([b, c], "mean"), **new, mask=Mask(of_member)),
        make_case(engine, Ensemble([fuse([a, b], suffix=a), b], "mean"), **sampled),
        *(make_case(engine, prompt, **new) for prompt in weighted),
        make_case(engine, each, **sampled),
        make_case(engine, each, **new, score_mod=scores.softcap(2.0)),
        make_case(engine, d, **sampled, score_mod=scores.alibi(4)),
        make_case(engine, c, **new, score_mod=[None, scores.softcap(1.5)], mask=masks.sliding_window(64)),
        make_case(engine, d, **new, mask=each_layer),
        make_case(engine, fuse([b, c]), **new, mask=each_layer),
        make_case(engine, c, **sampled, mask=per_row),
    ]
    assert len(found) == KINDS
    assert len({tuple(case.expected) for case in found}) > 35
    return found


@pytest.fixture(scope="module")
def cases(dense) -> list[Case]:
    """Requests of many kinds, computed by the dense definition."""
    return cases_of_many_kinds(dense)


@pytest.fixture(scope="module")
def cases_by_flex(flex) -> list[Case]:
    """Requests of many kinds, computed by FlexAttention; that takes ten times as long."""
    return cases_of_many_kinds(flex)


schedules = st.fixed_dictionaries(
    {
        "order": st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=10),
        "arrivals": st.lists(st.integers(0, 4), min_size=10, max_size=10),
        "priorities": st.lists(st.integers(0, 2), min_size=10, max_size=10),
        "ends": st.lists(st.sampled_from([None] * 6 + ["cancel", "raise"]), min_size=10, max_size=10),
        "rows": st.integers(2, 6),
        "pages": st.integers(4, 9),
        "prefill": st.sampled_from([128, 256, 512, 1024]),
        "ahead": st.booleans(),  # whether a step is read while the next one runs, as on CUDA
        "seed": st.integers(0, 2**32),
    }
)


def run_schedule(like: Engine, cases: list[Case], schedule: dict) -> list[tuple[Case, Request, int | None]]:
    """Submit and end requests as a schedule says, and check what holds at every step.

    Returns each case with its request, and after how many tokens it is cancelled or its callback raises, if it is to.
    """
    tested = new_engine(
        like,
        max_batch_size=schedule["rows"],
        max_slots=schedule["pages"] * BLOCK,
        prefill_tokens=schedule["prefill"],
    )
    scheduler = tested.scheduler
    scheduler._ahead = schedule["ahead"]
    rng = random.Random(schedule["seed"])
    rng.shuffle(scheduler.block_manager._free)
    coming = [
        (cases[number], *rest)
        for number, *rest in zip(
            schedule["order"], schedule["arrivals"], schedule["priorities"], schedule["ends"], strict=False
        )
    ]
    submitted: list[tuple[Case, Request, int | None]] = []
    delivered: dict[int, list] = {}
    ended = []
    for clock in range(2000):
        for item in [x for x in coming if x[1] <= clock]:
            coming.remove(item)
            case, _, priority, end = item
            after = rng.randrange(len(case.expected)) if end else None

            def callback(step, end=end, after=after):
                delivered.setdefault(step.row, []).append(step)
                if end == "raise" and len(delivered[step.row]) > after:
                    raise Refused

            try:
                request = tested.submit(case.prompt, priority=priority, callback=callback, **case.options)
            except ValueError:
                assert case.rows > schedule["rows"] or case.pages > schedule["pages"]
                continue
            assert case.rows <= schedule["rows"]
            assert case.pages <= schedule["pages"]
            submitted.append((case, request, after if end else None))
            if end == "cancel" and rng.random() < 0.3:
                tested.cancel(request)
        for _, request, after in submitted:
            if after is not None and len(request.steps) > after:
                tested.cancel(request)
        if not coming and scheduler.idle:
            break
        ended += tested.step()
        users = scheduler.block_manager.ref_counts
        held = [page for r in scheduler.running for sequence in r.sequences for page in sequence.pages]
        assert [held.count(page) for page in range(len(users))] == users
    assert scheduler.idle
    assert scheduler.block_manager.available == schedule["pages"]
    assert sorted(scheduler._free_batch_slots) == list(range(schedule["rows"]))
    assert sorted(r.number for r in ended) == [request.number for _, request, _ in submitted]  # each once
    for _, request, _ in submitted:
        assert delivered.get(request.number, []) == request.steps  # each once, in order
    return submitted


def check(submitted: list[tuple[Case, Request, int | None]]) -> None:
    """Check that requests gave what they give alone, or the beginning of it if they ended early."""
    for case, request, after in submitted:
        tokens = tokens_of(request)
        assert request.finished
        assert tokens == case.expected[: len(tokens)]
        if after is None:
            assert request.finish_reason in ("stop", "length")
            assert tokens == case.expected
        elif request.finish_reason in ("stop", "length"):  # before it was cancelled
            assert tokens == case.expected
        elif request.finish_reason == "error":
            assert isinstance(request.error, Refused)
            assert len(tokens) == after + 1


def in_schedules(count: int):
    """Run a test in so many schedules, the same ones each time."""

    def decorate(test):
        limits = settings(
            max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        return pytest.mark.usefixtures("read_later")(limits(given(schedule=schedules)(test)))

    return decorate


@in_schedules(12)
def test_every_request_gets_what_it_gets_alone_in_a_few_schedules(dense, cases, schedule):
    check(run_schedule(dense, cases, schedule))


@pytest.mark.exhaustive
@in_schedules(100)
def test_every_request_gets_what_it_gets_alone(dense, cases_by_flex, schedule):
    check(run_schedule(dense, cases_by_flex, schedule))


@pytest.mark.exhaustive
@in_schedules(20)
def test_every_request_gets_what_it_gets_alone_in_flex_attention(flex, cases_by_flex, schedule):
    check(run_schedule(flex, cases_by_flex, schedule))


@pytest.mark.slow
@in_schedules(1000)
def test_every_request_gets_what_it_gets_alone_in_many_schedules(flex, cases_by_flex, schedule):
    check(run_schedule(flex, cases_by_flex, schedule))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_of_request_in_one_batch_gives_the_tokens_of_flex_attention_by_the_dense_definition(
    dense, cases_by_flex, read_later, seed
):
    order = random.Random(seed).sample(range(KINDS), KINDS)
    same = {"arrivals": [seed % 2 * n for n in range(KINDS)], "priorities": [0] * KINDS, "ends": [None] * KINDS}
    sizes = {"rows": 5 + seed, "pages": 12, "prefill": 512}
    check(run_schedule(dense, cases_by_flex, {"order": order, **same, **sizes, "ahead": seed > 1, "seed": seed}))


# --- Many requests ---


def soak(like: Engine, cases: list[Case], preempted: list[Request], count: int, waiting: int = 8) -> None:
    """Run so many requests on few pages, some of them cancelled and some failing, and check tokens and memory.

    waiting: how many wait at most when the next one is submitted.
    """
    engine = new_engine(like, max_batch_size=5, max_slots=4 * BLOCK, prefill_tokens=256)
    scheduler, rng = engine.scheduler, random.Random(count)
    under_way: dict[int, tuple[Case, Request, str | None]] = {}
    reasons, objects, memory, tensors, ended = Counter(), [], [], [], 0
    tracemalloc.start()
    for number in range(count):
        case, end = rng.choice(cases), rng.choice([None] * 8 + ["cancel", "raise"])
        after = rng.randrange(len(case.expected))

        def callback(step, end=end, after=after):
            if end == "raise" and len(under_way[step.row][1].steps) > after:
                raise Refused

        request = engine.submit(case.prompt, callback=callback, priority=rng.choice([0, 0, 1]), **case.options)
        assert request.number == number
        under_way[number] = case, request, end
        while len(scheduler.waiting) > waiting or (number == count - 1 and not scheduler.idle):
            if rng.random() < 0.1:
                _, chosen, end = rng.choice(list(under_way.values()))
                if end == "cancel":
                    engine.cancel(chosen)
            for done in engine.step():
                case, request, end = under_way.pop(done.number)  # each ends once
                assert request is done
                assert tokens_of(done) == case.expected[: len(done.steps)]
                reasons[done.finish_reason] += 1
                if done.finish_reason in ("stop", "length"):
                    assert tokens_of(done) == case.expected
                else:
                    assert end is not None
                ended += 1
        if number % (count // 4) == count // 4 - 1:
            request = done = chosen = None
            preempted_now, _ = len(preempted), preempted.clear()
            assert preempted_now > count // 20, preempted_now
            gc.collect()
            objects.append(len(gc.get_objects()))
            memory.append(tracemalloc.get_traced_memory()[0])  # NumPy's included
            tensors.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert not under_way
    assert ended == count
    assert min(reasons[r] for r in ("stop", "length", "cancelled", "error")) > count // 100
    tracemalloc.stop()
    # The last quarter ends idle; the first may not have filled all pages.
    assert objects[2] < objects[0] + 2000, objects
    assert memory[2] < memory[0] + 500_000, memory
    assert max(tensors) < min(tensors) + 20, tensors
    check_empty(engine)


def test_fifty_requests_on_few_pages_end_once_and_right(dense, short_cases, preempted):
    soak(dense, short_cases, preempted, 52, waiting=2)


@pytest.mark.exhaustive
def test_two_hundred_requests_on_few_pages_end_once_and_right(dense, short_cases, preempted):
    soak(dense, short_cases, preempted, 200)


@pytest.mark.slow
def test_two_thousand_requests_on_few_pages_end_once_and_right_in_memory_that_does_not_grow(
    dense, short_cases, preempted
):
    soak(dense, short_cases, preempted, 2000)


# --- Who runs next ---


@pytest.mark.parametrize("count", few([25], [60]))
def test_requests_are_never_overtaken_by_later_or_lower_ones(dense, preempted, count):
    """Check that the first of those that wait runs next, and never waits while a later one runs on its pages."""
    engine = new_engine(dense, max_batch_size=4, max_slots=5 * BLOCK, prefill_tokens=256)
    rng = random.Random(1)
    requests, started = [], []
    while len(requests) < count or not engine.scheduler.idle:
        if len(requests) < count:
            ids = random_ids(rng.choice([100, 120, 127, 250]), len(requests))
            requests.append(
                engine.submit(
                    ids, max_new_tokens=rng.choice([10, 40]), stop_token_ids=(), priority=rng.choice([0, 0, 1])
                )
            )
        before = {r for r in requests if r.sequences}
        could = [r for r in requests if not r.sequences and not r.finished]  # all that wait
        engine.step()
        for request in [r for r in could if r.sequences]:
            started.append(request)
            assert not [r for r in could if r < request and not r.sequences and not r.finished]
            # Nobody who was preempted for others comes after one that is admitted.
            assert not [r for r in before if r < request and not r.sequences and not r.finished]
    assert len(preempted) > 5
    assert len(started) >= count
    assert all(r.finish_reason == "length" for r in requests)
    check_empty(engine)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_slots": 0}, "max_slots must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1"),
        ({"memory_fraction": 0}, "memory_fraction"),
        ({"memory_fraction": 2}, "memory_fraction"),
        ({"memory_fraction": 1e-12}, "is less than a page"),
        ({"max_slots": 2**40}, "more than attention can address"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flex, options, match):
    with pytest.raises(ValueError, match=match):
        Engine(flex.model, **options).submit([5])
