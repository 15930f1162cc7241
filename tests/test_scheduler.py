"""Continuous batching: every request gets what it would get alone, whatever else runs, comes and goes."""

import asyncio
import gc
import itertools
import random
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import attend_densely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flex import Engine, Ensemble, Llama, LlamaConfig, Mask, Sampling, batching, fuse, masks, scores
from llama_flex.engine.fusion import AnyPrompt, as_ensemble
from llama_flex.engine.paged_cache import PagedCache
from llama_flex.engine.request import Request
from llama_flex.engine.scheduler import Scheduler
from llama_flex.text.detokenizer import _BYTE_LEVEL, Decoding, StreamDecoder


@dataclass
class Asked:
    prompt: AnyPrompt
    options: dict
    alone: list[int]

    @property
    def rows(self) -> int:
        return len(as_ensemble(self.prompt).prompts)

    @property
    def pages(self) -> int:
        new = self.options["max_new_tokens"]
        return sum(-(-(len(p.ids) + new) // 128) for p in as_ensemble(self.prompt).prompts)


def alone(engine: Engine, prompt: AnyPrompt, **options) -> Asked:
    (completion,) = engine.generate([prompt], **options)
    return Asked(prompt, options, completion.tokens)


def tokens_of(request: Request) -> list[int]:
    return [step.token for step in request.steps]


def random_ids(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, 160) for _ in range(length)]


def tiny() -> Llama:
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = Llama(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine(tiny())


@pytest.fixture
def dense(monkeypatch):
    """Attention by its dense definition."""
    attend_densely(monkeypatch)


@pytest.fixture
def read_later(monkeypatch):
    """A step may be read after the next one, as on CUDA, where what it left is copied at once."""
    monkeypatch.setattr(batching, "reading", lambda found: found.clone().tolist)


@pytest.fixture(scope="module")
def asked(plain) -> list[Asked]:
    """Requests of many kinds, with what each gives alone in an engine that has nothing else to do."""
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
        found.append(alone(plain, prompt, **options))

    new = {"max_new_tokens": 9, "stop_token_ids": ()}
    sampled = new | {"sampling": Sampling(temperature=1.0, top_p=0.9, seed=5)}
    penalised = new | {"sampling": Sampling(temperature=0.8, repetition_penalty=1.4, seed=6)}
    a, b, c, d = (random_ids(length, 7) for length in (3, 60, 140, 250))
    # The same tokens weighted otherwise: what follows the prompts, a page of suffix too, is not the same to others.
    weighted = [fuse([b, a], suffix=c, weights=w) for w in ([1, 1], [9, 1], [1, 20])]
    each = fuse([d, b, a], prefix=[9], positions="parallel", weights=[0.2, 1, 4])
    per_row = masks.sliding_window(torch.tensor([33]))
    each_layer = [masks.sliding_window(20) | masks.sink(1), None]

    widths = torch.tensor([5, 50])

    def of_member(q, kv):
        return (kv.index <= q.index) & (q.index - kv.index < widths[q.batch])

    found += [
        alone(plain, Ensemble([a, b], "mean"), **sampled),
        alone(plain, Ensemble([b, a, b[:30]], "max"), **new),
        alone(plain, Ensemble([c, d[:128]], "mean"), **penalised),
        alone(plain, Ensemble([d, c], "max"), **new),
        alone(plain, Ensemble([b, c], "mean"), **new, mask=Mask(of_member)),
        alone(plain, Ensemble([fuse([a, b], suffix=a), b], "mean"), **sampled),
        *(alone(plain, prompt, **new) for prompt in weighted),
        alone(plain, each, **sampled),
        alone(plain, each, **new, score_mod=scores.softcap(2.0)),
        alone(plain, d, **sampled, score_mod=scores.alibi(4)),
        alone(plain, c, **new, score_mod=[None, scores.softcap(1.5)], mask=masks.sliding_window(64)),
        alone(plain, d, **new, mask=each_layer),
        alone(plain, fuse([b, c]), **new, mask=each_layer),
        alone(plain, c, **sampled, mask=per_row),
    ]
    assert len(found) == KINDS
    assert len({tuple(one.alone) for one in found}) > 35
    return found


KINDS = 40
schedules = st.fixed_dictionaries(
    {
        "order": st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=10),
        "arrivals": st.lists(st.integers(0, 4), min_size=10, max_size=10),
        "priorities": st.lists(st.integers(0, 2), min_size=10, max_size=10),
        "ends": st.lists(st.sampled_from([None] * 6 + ["cancel", "raise"]), min_size=10, max_size=10),
        "rows": st.integers(2, 6),
        "pages": st.integers(4, 9),
        "prefill": st.sampled_from([128, 256, 512, 1024]),
        "ahead": st.booleans(),  # as on CUDA
        "seed": st.integers(0, 2**32),
    }
)


class Refused(Exception):
    pass


def run(plain: Engine, asked: list[Asked], plan: dict) -> list[tuple[Asked, Request, int | None]]:
    tested = Engine(
        plain.model,
        max_batch_size=plan["rows"],
        max_slots=plan["pages"] * 128,
        prefill_tokens=plan["prefill"],
    )
    scheduler = tested.scheduler
    scheduler._ahead = plan["ahead"]
    rng = random.Random(plan["seed"])
    rng.shuffle(scheduler.block_manager._free)
    waiting = [
        (asked[number], *rest)
        for number, *rest in zip(plan["order"], plan["arrivals"], plan["priorities"], plan["ends"], strict=False)
    ]
    going: list[tuple[Asked, Request, int | None]] = []
    said: dict[int, list] = {}
    ended = []
    for clock in range(2000):
        for item in [w for w in waiting if w[1] <= clock]:
            waiting.remove(item)
            one, _, priority, end = item
            after = rng.randrange(len(one.alone)) if end else None

            def callback(step, end=end, after=after):
                said.setdefault(step.row, []).append(step)
                if end == "raise" and len(said[step.row]) > after:
                    raise Refused

            try:
                request = tested.submit(one.prompt, priority=priority, callback=callback, **one.options)
            except ValueError:
                assert one.rows > plan["rows"] or one.pages > plan["pages"]
                continue
            assert one.rows <= plan["rows"]
            assert one.pages <= plan["pages"]
            going.append((one, request, after if end else None))
            if end == "cancel" and rng.random() < 0.3:
                tested.cancel(request)
        for _, request, after in going:
            if after is not None and len(request.steps) > after:
                tested.cancel(request)
        if not waiting and scheduler.idle:
            break
        ended += tested.step()
        users = scheduler.block_manager.users
        held = [page for r in scheduler.running for sequence in r.texts for page in sequence.pages]
        assert [held.count(page) for page in range(len(users))] == users
    assert scheduler.idle
    assert scheduler.block_manager.available == plan["pages"]
    assert sorted(scheduler._seats) == list(range(plan["rows"]))
    assert sorted(r.number for r in ended) == [request.number for _, request, _ in going]  # each once
    for _, request, _ in going:
        assert said.get(request.number, []) == request.steps  # each once, in order
    return going


def check(going: list[tuple[Asked, Request, int | None]]) -> None:
    for one, request, after in going:
        tokens = [step.token for step in request.steps]
        assert request.finished
        assert tokens == one.alone[: len(tokens)]
        if after is None:
            assert request.finish_reason in ("stop", "length")
            assert tokens == one.alone
        elif request.finish_reason in ("stop", "length"):  # before it was cancelled
            assert tokens == one.alone
        elif request.finish_reason == "error":
            assert isinstance(request.error, Refused)
            assert len(tokens) == after + 1


def schedule_test(cases: int, *fixtures: str):
    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(schedules)
    def test(plain, asked, plan):
        check(run(plain, asked, plan))

    return pytest.mark.usefixtures("read_later", *fixtures)(test)


test_every_request_gets_what_it_gets_alone = schedule_test(100, "dense")
test_every_request_gets_what_it_gets_alone_in_flex_attention = schedule_test(20)
test_every_request_gets_what_it_gets_alone_in_many_schedules = pytest.mark.slow(schedule_test(1000))


NEW = {"max_new_tokens": 6, "stop_token_ids": ()}


@pytest.fixture(scope="module")
def short(plain) -> list[Asked]:
    """Forty short requests, computed densely."""
    rng = random.Random(3)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        attend_densely(patch)
        for n in range(40):
            prompt = random_ids(
                rng.choice([rng.randint(1, 300), *[rng.choice([128, 128, 256]) - rng.randint(0, 2)] * 3]), n % 3
            )
            options = {
                "max_new_tokens": rng.choice([1, 5, 9, 12]),
                "stop_token_ids": range(3, 160, 40) if n % 4 == 3 else (),
            }
            if n % 2:
                options["sampling"] = Sampling(temperature=0.9, top_p=0.95, seed=n)
            if n % 10 == 4:
                prompt = Ensemble([prompt[:115], prompt[:50]], "max" if n % 20 == 4 else "mean")
            if n % 8 == 6:
                options["mask"] = masks.sliding_window(20 + n)
            found.append(alone(plain, prompt, **options))
    return found


@pytest.fixture
def preempted(monkeypatch) -> list[Request]:
    """Every request that had to leave before its end, as often as it had to."""
    found, leave = [], Scheduler._leave

    def noting(self, request):
        if not request.finished:
            found.append(request)
        leave(self, request)

    monkeypatch.setattr(Scheduler, "_leave", noting)
    return found


@pytest.fixture
def prefilled(monkeypatch) -> list[tuple[int, int]]:
    """The request and the first token of every block of prompts that is computed."""
    found, run = [], Batches._run

    def noting(self, size, width, buffer, filled, rows, *given):
        if width > 1:
            found.extend((r.number, int(filled["rows"][0, row])) for row, (r, _) in rows.items())
        return run(self, size, width, buffer, filled, rows, *given)

    monkeypatch.setattr(Batches, "_run", noting)
    return found


def check_empty(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert scheduler.idle
    assert scheduler.block_manager.available == scheduler.block_manager.count
    assert not any(scheduler.block_manager.users)
    assert sorted(scheduler._seats) == list(range(scheduler.max_batch_size))


# --- Backends ---


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_of_request_in_one_batch_gives_the_tokens_of_flex_attention_by_the_dense_definition(
    plain, asked, read_later, seed
):
    """`asked` was computed by flex_attention."""
    order = random.Random(seed).sample(range(KINDS), KINDS)
    same = {"arrivals": [seed % 2 * n for n in range(KINDS)], "priorities": [0] * KINDS, "ends": [None] * KINDS}
    check(
        run(
            plain,
            asked,
            {"order": order, **same, "rows": 5 + seed, "pages": 12, "prefill": 512, "ahead": seed > 1, "seed": seed},
        )
    )


def compiled_schedule(engine: Engine, seed: int) -> list[tuple[AnyPrompt, dict, Request]]:
    sampled = {"sampling": Sampling(temperature=0.9, top_p=0.9, seed=seed)}
    window = {"mask": masks.sliding_window(60), "score_mod": scores.softcap(3.0)}
    ids = [random_ids(length, seed) for length in (300, 140, 129, 20, 200)]
    given = [
        (ids[0], {}),
        (ids[0][:256] + ids[1], sampled),
        (ids[1], window),
        (Ensemble([ids[3], ids[4]], "mean"), sampled),
        (ids[4], window),
        (ids[2], {}),
    ]
    requests = []
    for prompt, options in given:
        requests.append((prompt, options, engine.submit(prompt, **NEW, **options)))
        engine.step()
    engine.run()
    return requests


def test_compiled_steps_give_the_tokens_of_eager_ones_and_are_compiled_once_whatever_is_asked(plain):
    engine = Engine(plain.model, compile=True, max_batch_size=2, max_slots=6 * 128, prefill_tokens=128)
    random.Random(0).shuffle(engine.scheduler.block_manager._free)
    # The second finds the window among the rules from its beginning, which is one more combination.
    requests = compiled_schedule(engine, 1) + compiled_schedule(engine, 2)
    count = engine.graphs.count
    assert 0 < count < 40
    for seed in (3, 4, 5):
        requests += compiled_schedule(engine, seed)
    assert engine.graphs.count == count
    for prompt, options, request in requests:
        assert tokens_of(request) == alone(plain, prompt, **NEW, **options).alone
    check_empty(engine)


def test_a_mask_that_comes_leaves_the_recorded_steps_of_requests_without_one(plain, monkeypatch):
    engine = Engine(plain.model, compile=True, max_batch_size=2, max_slots=6 * 128, prefill_tokens=128)
    record, recorded = engine.graphs.record, []

    def noting(*given):
        recorded.append(1)
        return record(*given)

    monkeypatch.setattr(engine.graphs, "record", noting)

    def run(seed: int, **options) -> int:
        before = len(recorded)
        requests = [engine.submit(random_ids(70, seed), **NEW, **options) for _ in range(2)]
        engine.run()
        for request in requests:
            assert tokens_of(request) == alone(plain, random_ids(70, seed), **NEW, **options).alone
        return len(recorded) - before

    with torch.compiler.set_stance("force_eager"):  # what is compiled does not matter here
        assert run(1) > 0
        run(2)
        assert run(3) == 0
        for width in (5, 9):  # the second is one more rule, so what was recorded for the first is gone
            assert run(3, mask=masks.sliding_window(width)) > 0
            assert run(4) == 0
        engine.submit([5], **NEW, mask=masks.sliding_window(3))
        engine.run()
        assert run(5, mask=masks.sliding_window(5)) > 0


def test_compiled_attention_computes_the_blocks_that_are_listed_and_no_others(plain, monkeypatch):
    listed = Pages.listed

    def one_less(self, lists):
        found = listed(self, lists)
        none = None if found.full_kv_num_blocks is None else torch.zeros_like(found.full_kv_num_blocks)
        return masks.BlockLists(found.kv_num_blocks, found.kv_indices, none, found.full_kv_indices)

    monkeypatch.setattr(Pages, "listed", one_less)
    engine = Engine(plain.model, compile=True, max_batch_size=1, max_slots=512, prefill_tokens=128)
    ids = random_ids(300)
    request = engine.submit(ids, **NEW)
    engine.run()
    assert tokens_of(request) != alone(plain, ids, **NEW).alone


# --- Many ---


def soak(plain: Engine, short: list[Asked], preempted: list[Request], count: int) -> None:
    engine = Engine(plain.model, max_batch_size=5, max_slots=4 * 128, prefill_tokens=256)
    scheduler, rng = engine.scheduler, random.Random(count)
    going: dict[int, tuple[Asked, Request, str | None]] = {}
    reasons, objects, memory, tensors, ended = Counter(), [], [], [], 0
    tracemalloc.start()
    for number in range(count):
        one, end = rng.choice(short), rng.choice([None] * 8 + ["cancel", "raise"])
        after = rng.randrange(len(one.alone))

        def callback(step, end=end, after=after):
            if end == "raise" and len(going[step.row][1].steps) > after:
                raise Refused

        request = engine.submit(one.prompt, callback=callback, priority=rng.choice([0, 0, 1]), **one.options)
        assert request.number == number
        going[number] = one, request, end
        while len(scheduler.waiting) > 8 or (number == count - 1 and not scheduler.idle):
            if rng.random() < 0.1:
                _, chosen, end = rng.choice(list(going.values()))
                if end == "cancel":
                    engine.cancel(chosen)
            for done in engine.step():
                one, request, end = going.pop(done.number)  # each ends once
                assert request is done
                assert tokens_of(done) == one.alone[: len(done.steps)]
                reasons[done.finish_reason] += 1
                if done.finish_reason in ("stop", "length"):
                    assert tokens_of(done) == one.alone
                else:
                    assert end is not None
                ended += 1
        if number % (count // 4) == count // 4 - 1:
            request = done = chosen = None
            preempted_now, _ = len(preempted), preempted.clear()
            assert preempted_now > count // 20, preempted_now
            gc.collect()
            objects.append(len(gc.get_objects()))
            memory.append(tracemalloc.get_traced_memory()[0])  # numpy's too
            tensors.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert not going
    assert ended == count
    assert min(reasons[r] for r in ("stop", "length", "cancelled", "error")) > count // 100
    tracemalloc.stop()
    # The last quarter ends idle; the first may not have filled all pages.
    assert objects[2] < objects[0] + 2000, objects
    assert memory[2] < memory[0] + 500_000, memory
    assert max(tensors) < min(tensors) + 20, tensors
    check_empty(engine)


@pytest.mark.usefixtures("dense")
def test_two_hundred_requests_on_few_pages_end_once_and_right(plain, short, preempted):
    soak(plain, short, preempted, 200)


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_two_thousand_requests_on_few_pages_end_once_and_right_in_memory_that_does_not_grow(plain, short, preempted):
    soak(plain, short, preempted, 2000)


# --- asyncio ---


@pytest.mark.usefixtures("dense")
def test_requests_are_read_as_they_come_several_at_once(plain, short):
    engine = Engine(plain.model, max_batch_size=3, max_slots=8 * 128)

    async def read(one: Asked, delay: int) -> list[int]:
        for _ in range(delay):
            await asyncio.sleep(0.002)
        request = engine.submit(one.prompt, **one.options)  # while others run
        return [step.token async for step in request]

    async def main():
        return await asyncio.gather(*(read(one, n) for n, one in enumerate(short[:12])))

    assert asyncio.run(main()) == [one.alone for one in short[:12]]
    assert asyncio.run(main()) == [one.alone for one in short[:12]]  # in another event loop
    check_empty(engine)


@pytest.mark.usefixtures("dense")
def test_who_stops_reading_cancels_and_others_go_on(plain):
    engine = Engine(plain.model, max_batch_size=4, max_slots=8 * 128)
    options = {"max_new_tokens": 40, "stop_token_ids": ()}
    one, other = (alone(plain, random_ids(length), **options) for length in (150, 20))

    async def leave(request: Request) -> list[int]:
        found = []
        async for step in request:
            found.append(step.token)
            if len(found) == 3:
                break
        return found

    async def main():
        left, kept = (engine.submit(x.prompt, **options) for x in (one, other))
        found, rest = await asyncio.gather(leave(left), leave_none(kept))
        assert found == one.alone[:3]
        assert rest == other.alone
        assert left.finish_reason == "cancelled"
        assert tokens_of(left) == one.alone[: len(left.steps)]
        assert len(left.steps) < 40
        late = engine.submit(one.prompt, **options)
        task = asyncio.create_task(leave_none(late))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert late.finish_reason == "cancelled"

    async def leave_none(request: Request) -> list[int]:
        return [step.token async for step in request]

    asyncio.run(main())
    engine.run()
    check_empty(engine)


@pytest.mark.usefixtures("dense")
def test_what_a_callback_raises_comes_out_of_the_loop_after_the_steps(plain, short):
    engine = Engine(plain.model, max_batch_size=4, max_slots=8 * 128)
    one, other = (x for x in short[:4:2])

    def refuse(step):
        raise Refused("no")

    async def main():
        bad, good = (
            engine.submit(one.prompt, callback=refuse, **one.options),
            engine.submit(other.prompt, **other.options),
        )
        reading = aiter(bad)
        assert (await anext(reading)).token == one.alone[0]
        with pytest.raises(Refused, match="no"):
            await anext(reading)
        assert bad.finish_reason == "error"
        assert [step.token async for step in good] == other.alone

    asyncio.run(main())
    check_empty(engine)


@pytest.mark.usefixtures("dense")
def test_a_cancel_from_another_thread_while_a_token_is_taken_in_stays(plain):
    """As the thread that steps is between asking whether the request has ended and saying that it goes on."""
    for last in (False, True):
        engine = Engine(plain.model, max_batch_size=2, max_slots=512)
        request = engine.submit(random_ids(9), **NEW)
        put = request.maker.put

        def cancelled_meanwhile(token, logprob, engine=engine, request=request, put=put, last=last):
            if request.maker.count == (5 if last else 2):
                engine.cancel(request)
            return put(token, logprob)

        request.maker.put = cancelled_meanwhile
        ended = []
        while not engine.scheduler.idle:
            ended += engine.step()
        assert ended == [request]
        assert request.finish_reason == "cancelled"
        check_empty(engine)


# --- Errors amid a step ---


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("fails", [(1,), (2, 3), (4, 9), (6, 7, 20)])
@pytest.mark.parametrize("computed", [False, True])
def test_a_step_that_fails_loses_nothing(plain, short, monkeypatch, error, fails, computed):
    engine = Engine(plain.model, max_batch_size=4, max_slots=6 * 128, prefill_tokens=128)
    step, calls = engine._step, 0

    def failing(*given):
        nonlocal calls
        calls += 1
        found = step(*given) if computed or calls not in fails else None
        if calls in fails:
            raise error
        return found

    monkeypatch.setattr(engine, "_step", failing)
    said = {}
    asked = short[:10]
    requests = [
        engine.submit(x.prompt, callback=lambda step: said.setdefault(step.row, []).append(step.token), **x.options)
        for x in asked
    ]
    for _ in fails:
        with pytest.raises(error):
            engine.run()
    engine.run()
    for one, request in zip(asked, requests, strict=True):
        assert tokens_of(request) == said[request.number] == one.alone
    check_empty(engine)


class Bytes:
    """A tokenizer whose ids are bytes, most of them parts of a character."""

    vocab_size, special_ids = 160, frozenset()

    def __contains__(self, id):
        return id < self.vocab_size

    def stream(self, ids):
        pieces = list(_BYTE_LEVEL)
        return StreamDecoder(lambda id: pieces[id * 7 % 256], Decoding(byte_level=True), frozenset(), ids)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(("again", "ahead"), [(None, False), (None, True), (3, False), (11, True)])
def test_ctrl_c_at_any_line_loses_nothing(plain, read_later, preempted, again, ahead):
    """Nor does another one so many lines later, amid what is done about the first."""
    files = [sys.modules[part.__module__].__file__ for part in (Scheduler, Batches, StreamDecoder)]
    # The first two need two pages each in the end, so the second has to leave for the first.
    prompts, options = [random_ids(length) for length in (126, 127, 20)], {"max_new_tokens": 5, "stop_token_ids": ()}
    expected = Engine(plain.model, Bytes()).generate(prompts, **options)
    assert any(len(c.text.encode()) > 3 for c in expected)

    def interrupted(at: int) -> bool:
        engine = Engine(plain.model, Bytes(), max_batch_size=2, max_slots=3 * 128, prefill_tokens=128)
        engine.scheduler._ahead = ahead
        said = {}
        requests = [
            engine.submit(ids, **options, callback=lambda step: said.setdefault(step.row, []).append(step))
            for ids in prompts
        ]
        left = at
        steps = []

        def trace(frame, event, arg):
            nonlocal left
            # Python raises where it calls something: not, as a trace would in `step`, as a `with` block is left.
            if frame.f_code.co_filename not in files or frame.f_code.co_name == "step":
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        def run():
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                while not engine.scheduler.idle:
                    steps.extend(engine.step())
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(before)
            return False

        hit = run()
        if again is not None and hit:
            left = again
            run()
        left = -1
        assert not run()
        for request, one in zip(requests, expected, strict=True):
            assert replace(request.completion, logprobs=[]) == replace(one, logprobs=[]), at
        for request in requests:
            assert [step for step, _ in itertools.groupby(said[request.number], id)] == list(map(id, request.steps)), at
        assert len(steps) == len(set(steps)) <= 3, at
        assert len(steps) == 3 or hit, at
        check_empty(engine)
        return hit

    at = 1
    while interrupted(at):
        at += 11 if again is None else 17
    assert at > 1000
    assert preempted


# --- Prefixes ---


@pytest.mark.usefixtures("dense")
def test_a_prefix_of_requests_that_come_together_is_computed_once(plain, prefilled):
    shared = random_ids(300)
    asked = [alone(plain, shared + random_ids(5 + n, n), **NEW) for n in range(6)]
    engine = Engine(plain.model, max_batch_size=6, max_slots=30 * 128, prefill_tokens=1024)
    requests = [engine.submit(one.prompt, **NEW) for one in asked]
    engine.run()
    assert [tokens_of(r) for r in requests] == [one.alone for one in asked]
    assert Counter(start for _, start in prefilled) == {0: 1, 64: 1, 128: 1, 192: 1, 256: 6}


@pytest.mark.usefixtures("dense")
def test_a_step_of_prompts_has_little_padding_and_gives_their_first_tokens(plain, monkeypatch):
    steps, run = [], Batches._run

    def noting(self, size, width, *given):
        steps.append((size, width))
        return run(self, size, width, *given)

    monkeypatch.setattr(Batches, "_run", noting)
    prompts = [random_ids(45, seed) for seed in range(8)]
    expected = [alone(plain, ids, **NEW).alone[:1] for ids in prompts]
    engine = Engine(plain.model, max_batch_size=8, max_slots=20 * 128, prefill_tokens=512)
    for sizes in ([(512, 64)], [(8, 1)]):  # what is known but for the last token goes on as if it ran already
        steps.clear()
        requests = [engine.submit(ids, max_new_tokens=1, sampling=Sampling()) for ids in prompts]
        engine.run()
        assert [tokens_of(r) for r in requests] == expected
        assert steps == sizes


def test_explain_is_of_what_ran_last_though_it_gave_one_token(plain):
    engine = Engine(plain.model, max_batch_size=4, max_slots=1024, prefill_tokens=512)
    for width, new in ((9, 3), (19, 1)):
        engine.submit(random_ids(300, width), mask=masks.sliding_window(width), max_new_tokens=new, stop_token_ids=())
        engine.run()
        assert f"mask sliding_window({width})" in engine.explain()


@pytest.mark.usefixtures("dense")
def test_samples_of_one_prompt_share_its_pages_and_have_seeds_of_their_own(plain, prefilled):
    ids, sampling = random_ids(300), Sampling(temperature=1.0, seed=11)
    expected = [alone(plain, ids, **NEW, sampling=replace(sampling, seed=11 + i)).alone for i in range(4)]
    assert len(set(map(tuple, expected))) == 4
    engine = Engine(plain.model, max_batch_size=6, max_slots=7 * 128, prefill_tokens=1024)
    requests = engine.submit_samples(ids, 4, sampling=sampling, **NEW)
    engine.step()
    pages = [r.texts[0].pages for r in requests]
    assert len({tuple(p[:2]) for p in pages}) == 1
    assert [engine.scheduler.block_manager.users[page] for page in pages[0]] == [4, 4, 1]
    assert len({p[2] for p in pages}) == 4
    engine.run()
    assert [tokens_of(r) for r in requests] == expected
    assert Counter(start for _, start in prefilled) == {0: 1, 64: 1, 128: 1, 192: 1, 256: 4}
    check_empty(engine)


@pytest.mark.usefixtures("dense")
def test_requests_with_masks_or_score_functions_of_their_own_share_nothing(plain, prefilled):
    ids = random_ids(300)
    engine = Engine(plain.model, max_batch_size=6, max_slots=30 * 128, prefill_tokens=2048)
    each = [
        {},
        {"mask": masks.sliding_window(50)},
        {"mask": masks.sliding_window(50)},
        {"score_mod": scores.softcap(1)},
    ]
    requests = [engine.submit(ids, **NEW, **options) for options in each]
    engine.run()
    assert [tokens_of(r) for r in requests] == [alone(plain, ids, **NEW, **options).alone for options in each]
    assert Counter(start for _, start in prefilled) == dict.fromkeys(range(0, 300, 64), 4)


@pytest.mark.usefixtures("dense")
def test_what_is_known_of_fused_prompts_is_known_for_their_weights_alone(plain, prefilled):
    prompts = [fuse([[5, 6], [7]], suffix=random_ids(300), weights=w) for w in (None, [1, 9], [9, 1], [9, 1])]
    expected = [alone(plain, prompt, **NEW).alone for prompt in prompts]
    assert len(set(map(tuple, expected))) == 3
    engine = Engine(plain.model, max_batch_size=6, max_slots=30 * 128, prefill_tokens=1024)
    requests = [engine.submit(prompt, **NEW) for prompt in prompts]
    engine.run()
    assert [tokens_of(r) for r in requests] == expected
    assert Counter(start for _, start in prefilled) == {0: 3, 64: 3, 128: 3, 192: 3, 256: 4}


@pytest.mark.usefixtures("dense")
def test_pages_that_nobody_holds_are_used_again_until_they_are_needed_the_oldest_first(plain, prefilled):
    a, b, c = (alone(plain, random_ids(300, n), **NEW) for n in range(3))
    engine = Engine(plain.model, max_batch_size=2, max_slots=8 * 128)
    everything = list(range(0, 300, 64))

    def computed(one: Asked) -> list[int]:
        prefilled.clear()
        request = engine.submit(one.prompt, **NEW)
        engine.run()
        assert tokens_of(request) == one.alone
        check_empty(engine)
        return [start for _, start in prefilled]

    assert computed(a) == everything
    assert computed(a) == []  # its last page is copied
    assert computed(b) == everything
    assert computed(a) == []  # newer than b now
    assert computed(c) == everything  # takes the free ones, and the end of b
    assert computed(b) == [256]
    assert computed(a) == [256]  # b took the end of a, the oldest then
    assert computed(c) == [256]


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    ("length", "starts"), [(5, [0]), (15, [0]), (16, [16]), (128, [128]), (200, [200]), (280, [280])]
)
def test_what_begins_alike_within_a_page_is_copied(plain, prefilled, length, starts):
    first = random_ids(300)
    other = first[:length] + [1 + id % 150 for id in first[length:]][:40]
    assert other[length] != first[length]
    engine = Engine(plain.model, max_batch_size=2, max_slots=6 * 128)
    engine.submit(first, **NEW)
    engine.run()
    prefilled.clear()
    for options in (NEW, NEW | {"sampling": Sampling(temperature=1.0, seed=3)}):
        one = alone(plain, other, **options)
        request = engine.submit(other, **options)
        engine.run()
        assert tokens_of(request) == one.alone
    assert [start for _, start in prefilled] == starts
    check_empty(engine)


def test_a_pool_throws_out_what_was_unused_for_longest():
    pool = Pool(3)
    pages = [pool.take() for _ in range(3)]
    for page, content in zip(pages, "abc", strict=True):
        pool.name(page, content)
        pool.name(page, "other")  # a page holds one thing
    assert pool.find("other") is None
    assert pool.available == 0
    for page in (pages[1], pages[0], pages[2]):
        pool.give_back(page)
    assert pool.find("b") == pages[1]
    pool.give_back(pages[1])
    assert pool.available == 3
    assert pool.take() == pages[0]
    assert pool.find("a") is None
    assert (pool.find("c"), pool.find("c")) == (pages[2], pages[2])
    pool.give_back(pages[2])
    assert pool.available == 1
    pool.give_back(pages[2])
    assert pool.available == 2


@pytest.mark.usefixtures("dense")
def test_a_mask_that_looks_ahead_sees_what_is_appended_in_the_same_step(plain):
    options = NEW | {"mask": masks.prefix_lm(300)}
    one = alone(plain, random_ids(450), **options)  # in a chunk of 512
    engine = Engine(plain.model, max_batch_size=2, max_slots=1024, prefill_tokens=512)
    request = engine.submit(one.prompt, **options)
    engine.run()
    assert tokens_of(request) == one.alone
    assert one.alone != alone(plain, one.prompt, **NEW).alone


@pytest.mark.usefixtures("dense")
def test_a_mask_reads_nothing_of_other_requests(plain):
    """What it looks up by token or by row has no more than its own request needs."""
    table = torch.arange(40) % 3 != 1
    own = Mask(lambda q, kv: (kv.index <= q.index) & (table[kv.index.clamp(min=0)] | (kv.index == q.index)))
    bias = torch.linspace(-3, 3, 40)
    score = scores.ScoreMod(lambda score, q, kv: score + bias[kv.position])
    each = [
        (random_ids(30), {}),
        (random_ids(30), {"mask": own}),
        (random_ids(30), {"mask": masks.sliding_window(torch.tensor([9]))}),
        (random_ids(30), {"score_mod": score}),
        (random_ids(500), {}),
        (Ensemble([random_ids(400), random_ids(200), [5]]), {}),
    ]
    for order in (each, each[::-1]):
        engine = Engine(plain.model, max_batch_size=12, max_slots=20 * 128, prefill_tokens=2048)
        requests = [engine.submit(prompt, **NEW, **options) for prompt, options in order]
        engine.run()
        for (prompt, options), request in zip(order, requests, strict=True):
            expected = engine.generate([prompt], **NEW, **options)[0].tokens
            assert tokens_of(request) == expected


@pytest.mark.usefixtures("dense")
def test_a_mask_reads_nothing_of_requests_that_ran_before(plain):
    """A step's padding has no attributes of those that were in its place."""

    def windows(*widths: int) -> Mask:
        of = torch.tensor(widths)
        return Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < of[q.batch]))

    def of_token(attribute: str, count: int) -> Mask:
        table = torch.ones(count, dtype=torch.bool)
        return Mask(lambda q, kv: (kv.index <= q.index) & table[getattr(q, attribute)])

    long = [(random_ids(250), {}), (fuse([[5, 6], [7]], suffix=random_ids(100)), {})]
    short = [[(random_ids(10), {"mask": of_token(name, n)})] for name, n in (("position", 16), ("segment", 1))]
    several = [(Ensemble([random_ids(n) for n in (70, 80, 90)], "mean"), {"mask": windows(5, 6, 7)})]
    others = [[(random_ids(5), {"mask": masks.sliding_window(10 + n)})] for n in range(PATTERNS - 2)]
    one = [(random_ids(20), {"mask": windows(9)}), (random_ids(10), {})]  # takes the number of the mask of several
    for rounds in ([long, *short], [several, *others, one]):
        engine = Engine(plain.model, max_batch_size=6, max_slots=12 * 128, prefill_tokens=64)
        for each in rounds:
            requests = [engine.submit(prompt, **NEW, **options) for prompt, options in each]
            engine.run()
            expected = [alone(plain, prompt, **NEW, **options).alone for prompt, options in each]
            assert [tokens_of(request) for request in requests] == expected


@pytest.mark.usefixtures("dense")
def test_weights_that_change_between_runs_are_seen():
    model, ids = tiny(), random_ids(300)
    engine = Engine(model, max_batch_size=2, max_slots=1024)
    changes = (
        lambda layer: layer.mlp.down.weight.mul_(1.5),
        lambda layer: setattr(layer.attention.qkv, "weight", torch.nn.Parameter(layer.attention.qkv.weight * 0.5)),
        lambda layer: None,
    )
    for change in changes:
        request = engine.submit(ids, **NEW)
        engine.run()
        assert tokens_of(request) == alone(Engine(model), ids, **NEW).alone
        with torch.no_grad():
            change(model.layers[0])


@pytest.mark.usefixtures("dense")
def test_what_was_computed_with_weights_that_were_written_behind_torch_is_forgotten_when_asked():
    model, ids = tiny(), random_ids(300)
    engine = Engine(model, max_batch_size=2, max_slots=1024)
    before = tokens_of_one(engine, ids, max_new_tokens=6)
    for layer in model.layers:
        layer.attention.qkv.weight.data.mul_(-0.5)
    expected = alone(Engine(model), ids, **NEW).alone
    assert tokens_of_one(engine, ids, max_new_tokens=6) != expected != before  # torch does not count such a change
    engine.forget()
    assert tokens_of_one(engine, ids, max_new_tokens=6) == expected


@pytest.mark.parametrize("compile", [None, False, True])
def test_numbers_that_are_none_stay_in_their_request(compile, monkeypatch):
    """What a request leaves in pages, and what padding leaves, takes part in the products of others."""
    if compile is None:
        attend_densely(monkeypatch)
    model = tiny()
    model.embed.weight[159] = torch.nan
    ids = [id % 159 for id in random_ids(300)]
    engine = Engine(model, compile=bool(compile), max_batch_size=3, max_slots=5 * 128, prefill_tokens=64)

    def check(*requests: Request) -> None:
        engine.run()
        for request in requests:
            assert tokens_of(request) == alone(Engine(model), request.ensemble.prompts[0].ids, **NEW).alone

    short = engine.submit(ids[40:50], **NEW)
    bad = engine.submit([*ids[:100], 159, *ids[101:250]], **NEW)
    engine.step()  # of `bad` 54 tokens, and with 159 those after them
    engine.step()
    assert any(x.isnan().any() for x, _ in engine.scheduler.cache.layers)
    check(short, engine.submit(ids[:50], **NEW))  # with a copy of the page that also has 159
    assert (tokens_of(bad), bad.finish_reason) == ([], "error")
    check(engine.submit(ids[::-1], **NEW))  # in pages that it had
    # Its first tokens came in one step with 159, which they do not see, and are none either.
    bad = engine.submit([*ids[200:240], 159, 5], **NEW)
    engine.run()
    assert bad.finish_reason == "error"
    check(engine.submit(ids[200:240], **NEW))


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("ahead", [False, True])
def test_who_shares_pages_with_a_request_whose_numbers_are_none_gets_its_tokens(ahead, bad, request):
    """Uncompiled attention spreads the NaN to earlier tokens of the step, whose pages others take in that very step."""
    if ahead:
        request.getfixturevalue("read_later")
    model = tiny()
    model.embed.weight[159] = torch.nan
    ids = [id % 159 for id in random_ids(150)]
    engine = Engine(model, max_batch_size=3)
    engine.scheduler._ahead = ahead
    prompts = [[*ids, 159] if n == bad else [*ids, n] for n in range(3)]
    requests = [engine.submit(prompt, **NEW) for prompt in prompts]
    engine.run()
    for n, (done, prompt) in enumerate(zip(requests, prompts, strict=True)):
        if n == bad:
            assert (tokens_of(done), done.finish_reason) == ([], "error")
        else:
            assert tokens_of(done) == alone(Engine(model), prompt, **NEW).alone
    assert engine.scheduler.block_manager.available == engine.scheduler.block_manager.count
    assert len(engine.scheduler._seats) == 3


@pytest.mark.usefixtures("dense", "read_later")
def test_a_number_that_is_none_is_seen_though_its_request_is_cancelled_before_it_is_read():
    model = tiny()
    model.embed.weight[159] = torch.nan
    ids = [id % 159 for id in random_ids(40)]
    engine = Engine(model, max_batch_size=2, max_slots=5 * 128)
    engine.scheduler._ahead = True
    bad = engine.submit([*ids, 159, 5], **NEW)
    engine.step()
    engine.cancel(bad)
    engine.step()
    request = engine.submit(ids, **NEW)
    engine.run()
    assert tokens_of(request) == alone(Engine(model), ids, **NEW).alone


def test_a_table_need_not_have_what_was_in_the_slots_before(plain):
    engine = Engine(plain.model, max_batch_size=2, max_slots=4 * 128)
    engine.submit(random_ids(500), **NEW)
    engine.run()
    bias = torch.linspace(-3, 3, 140)
    options = NEW | {"score_mod": scores.ScoreMod(lambda score, q, kv: score + bias[kv.position])}
    request = engine.submit(random_ids(130), **options)
    engine.run()
    assert tokens_of(request) == alone(plain, random_ids(130), **options).alone


# --- What is refused, and what waits ---


@pytest.mark.usefixtures("dense")
def test_who_came_first_or_has_priority_is_never_overtaken(plain, preempted):
    """Of those that wait, the next to run is always the first; nor does it wait while a later one runs on its pages."""
    engine = Engine(plain.model, max_batch_size=4, max_slots=5 * 128, prefill_tokens=256)
    rng = random.Random(1)
    requests, started = [], []
    while len(requests) < 60 or not engine.scheduler.idle:
        if len(requests) < 60:
            ids = random_ids(rng.choice([100, 120, 127, 250]), len(requests))
            requests.append(
                engine.submit(
                    ids, max_new_tokens=rng.choice([10, 40]), stop_token_ids=(), priority=rng.choice([0, 0, 1])
                )
            )
        before = {r for r in requests if r.texts}
        could = [r for r in requests if not r.texts and not r.finished]  # all that wait
        engine.step()
        for request in [r for r in could if r.texts]:
            started.append(request)
            assert not [r for r in could if r < request and not r.texts and not r.finished]
            # Nobody who had to leave for others comes after one that is taken in.
            assert not [r for r in before if r < request and not r.texts and not r.finished]
    assert len(preempted) > 5
    assert len(started) >= 60
    assert all(r.finish_reason == "length" for r in requests)
    check_empty(engine)


def test_what_cannot_be_is_refused(plain):
    engine = Engine(plain.model, max_batch_size=2, max_slots=2 * 128)
    for prompt, options, match in (
        (random_ids(256), {}, "exceed the slots"),
        (random_ids(250), {"max_new_tokens": 7}, "exceed the slots"),
        (random_ids(2000), {}, "no room in the context"),
        ([], {}, "empty"),
        ([160], {}, "vocabulary"),
        ("abc", {}, "lists of token ids"),
        ([5], {"max_new_tokens": 0}, "at least 1"),
        (Ensemble([[5], [6], [7]]), {}, "max_batch_size is 2"),
        (Ensemble([random_ids(140), [6]]), {"max_new_tokens": 1}, "exceed"),  # three pages
        ([5], {"stop": ["."]}, "need a tokenizer"),
        ([5], {"mask": 7}, "must be a Mask"),
        ([5], {"mask": [None]}, "1 masks for 2 layers"),
        ([5], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ([5], {"max_new_tokens": "3"}, "max_new_tokens must be a whole number, not '3'"),
        ([5], {"sampling": [Sampling()]}, "sampling must be a Sampling"),
        ([5], {"sampling": 0.5}, "sampling must be a Sampling"),
        ([5], {"stop_token_ids": 5}, "stop_token_ids must be token ids, such as .2., not 5"),
        ([5], {"stop_token_ids": ["."]}, "stop_token_ids must be token ids"),
        ([5], {"callback": 5}, "callback must be a function of a Step, not 5"),
        ([5], {"priority": "high"}, "priority must be a whole number, not 'high'"),
        ([5], {"priority": float("nan")}, "priority must be a whole number, not nan"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.submit(prompt, **options)
    check_empty(engine)
    assert len(tokens_of_one(engine, random_ids(250), max_new_tokens=6)) == 6
    assert len(tokens_of_one(engine, random_ids(250))) == 6  # as many as there is room for


@pytest.mark.usefixtures("dense")
def test_a_rule_that_would_fail_within_a_request_is_refused_and_others_go_on(plain):
    table, bias = torch.arange(20) % 3 > 0, torch.zeros(20)
    short = Mask(lambda q, kv: (kv.index <= q.index) & table[kv.index.clamp(min=0)], "short")
    score = scores.ScoreMod(lambda score, q, kv: score + bias[q.position], "biased")
    engine = Engine(plain.model, max_batch_size=4, max_slots=1024)
    other = engine.submit([5, 6], **NEW)
    for options in ({"mask": short}, {"score_mod": score}, {"mask": [None, short]}, {"score_mod": [score, None]}):
        name = "short" if "mask" in options else "biased"
        with pytest.raises(ValueError, match=f"{name}: index 20 into a tensor of 20 in line .*: make it as long"):
            engine.submit(random_ids(15), **NEW, **options)
        fits = engine.submit(random_ids(14), **NEW, **options)
        engine.run()
        assert tokens_of(fits) == alone(plain, random_ids(14), **NEW, **options).alone
    with pytest.raises(ValueError, match="short: index 20"):
        engine.submit(Ensemble([[5], random_ids(15)]), **NEW, mask=short)
    assert tokens_of(other) == alone(plain, [5, 6], **NEW).alone


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Mask(lambda q, kv: kv.index <= q.index.max().item()), "item"),
        (Mask(lambda q, kv: (kv.index <= q.index) if q.index > 5 else kv.index > 1), "data-dependent"),
        (Mask(lambda q, kv: (kv.index <= q.index).expand(2)), r"returned \[2\] for one query and one key"),
        (Mask(lambda q, kv: torch.stack([q.index, kv.index]) > 0), r"returned \[2\] for one query and one key"),
        (scores.ScoreMod(lambda score, q, kv: score if score > 0 else score / 2), "data-dependent"),
        (scores.ScoreMod(lambda score, q, kv: score.expand(3)), r"returned \[3\] for one query and one key"),
    ],
)
def test_a_rule_that_only_fails_in_a_step_is_refused_before(plain, rule, match):
    """As FlexAttention asks it, for a cell alone, or as block lists do, for all at once."""
    engine = Engine(plain.model, max_batch_size=4, max_slots=1024)
    other = engine.submit([5, 6], **NEW)
    with pytest.raises(ValueError, match=match):
        engine.submit([5, 6], **NEW, **{"mask" if isinstance(rule, Mask) else "score_mod": rule})
    engine.run()
    assert tokens_of(other) == alone(plain, [5, 6], **NEW).alone


def test_a_score_of_its_own_needs_no_score(plain):
    engine = Engine(plain.model, max_batch_size=4, max_slots=1024)
    options = {"max_new_tokens": 6, "score_mod": scores.ScoreMod(lambda score, q, kv: (kv.index % 3).float())}
    expected = alone(plain, random_ids(12), stop_token_ids=(), **options).alone
    assert tokens_of_one(engine, random_ids(12), **options) == expected


def test_the_first_requests_may_come_from_several_threads(plain):
    engine = Engine(plain.model, max_batch_size=4, max_slots=1024)
    make, made, found = engine._new_scheduler, [], []

    def slowly() -> Scheduler:
        made.append(1)
        time.sleep(0.2)
        return make()

    engine._new_scheduler = slowly
    threads = [threading.Thread(target=lambda: found.append(engine.submit([5, 6], **NEW))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.run()
    assert [len(request.steps) for request in found] == [NEW["max_new_tokens"]] * 4
    assert len(made) == 1


@pytest.mark.usefixtures("dense")
def test_requests_of_other_engines_and_steps_within_steps_are_refused(plain):
    engine, other = (Engine(plain.model, max_batch_size=2, max_slots=512) for _ in range(2))
    request = engine.submit([5, 6], **NEW)
    other.submit([5], **NEW)
    with pytest.raises(ValueError, match="request 0 is of another engine"):
        other.cancel(request)
    nested = engine.submit([7], **NEW, callback=lambda step: engine.run())
    engine.run()
    assert nested.finish_reason == "error"
    with pytest.raises(ValueError, match="amid a step"):
        raise nested.error
    assert request.finish_reason == "length"
    with pytest.raises(ValueError, match="n must be at least 1, not -1"):
        engine.submit_samples([5], -1, sampling=Sampling())
    seeds = [r.sampling.seed for r in engine.submit_samples([5], 3, sampling=Sampling(seed=2**63 - 2), **NEW)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]


@pytest.mark.usefixtures("dense")
def test_threads_and_event_loops_take_turns(plain, short):
    engine = Engine(plain.model, max_batch_size=3, max_slots=8 * 128)
    asked, found = short[:18], {}

    def run(some: list[Asked]) -> None:
        for one in some:
            request = engine.submit(one.prompt, **one.options)
            engine.run()
            found[id(one)] = tokens_of(request)

    def read(some: list[Asked]) -> None:
        async def each(one: Asked) -> None:
            found[id(one)] = [step.token async for step in engine.submit(one.prompt, **one.options)]

        async def main():
            await asyncio.gather(*map(each, some))

        asyncio.run(main())

    threads = [threading.Thread(target=way, args=(asked[n::4],)) for n, way in enumerate((run, run, read, read))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(id(one)) for one in asked] == [one.alone for one in asked]
    check_empty(engine)


@pytest.mark.parametrize("compile", [False, True])
def test_inference_mode_may_begin_and_end_between_calls(plain, compile):
    engine = Engine(plain.model, compile=compile, max_batch_size=2, max_slots=512)
    options = NEW | {"mask": masks.sliding_window(torch.tensor([40])), "sampling": Sampling(repetition_penalty=1.3)}
    with torch.inference_mode():
        first = engine.submit(random_ids(9), **options)
        engine.step()
    engine.run()
    second = engine.submit(random_ids(9), **options)
    with torch.inference_mode():
        engine.run()
    assert tokens_of(first) == tokens_of(second) == alone(plain, random_ids(9), **options).alone


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        model = tiny()
    assert len(tokens_of_one(Engine(model, max_batch_size=2, max_slots=512), [5, 6], max_new_tokens=3)) == 3


def tokens_of_one(engine: Engine, prompt: AnyPrompt, **options) -> list[int]:
    request = engine.submit(prompt, stop_token_ids=(), **options)
    engine.run()
    return tokens_of(request)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_slots": 0}, "max_slots must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1"),
        ({"memory_fraction": 0}, "memory_fraction"),
        ({"memory_fraction": 2}, "memory_fraction"),
        ({"memory_fraction": 1e-12}, "does not hold a page"),
        ({"max_slots": 2**40}, "more than attention can address"),
    ],
)
def test_sizes_that_cannot_be_are_refused(plain, options, match):
    with pytest.raises(ValueError, match=match):
        Engine(plain.model, **options).submit([5])


def test_offsets_into_the_keys_of_the_largest_pool_are_numbers_of_32_bits(plain):
    """FlexAttention's kernels on CUDA compute them so; beyond, they would read other keys."""
    config = plain.model.config
    most = PagedCache.most_pages(config)
    of_page = 128 * config.num_key_value_heads * config.head_dim
    assert (most + 1) * of_page < 2**31 <= (most + 2) * of_page  # with the page that takes padding


@pytest.mark.usefixtures("dense")
def test_more_masks_than_may_run_at_a_time_wait(plain):
    ids = random_ids(150)
    asked = [alone(plain, ids, **NEW, mask=masks.sliding_window(8 * n + 1)) for n in range(PATTERNS + 4)]
    engine = Engine(plain.model, max_batch_size=16, max_slots=40 * 128, prefill_tokens=4096)
    requests = [engine.submit(ids, **one.options) for one in asked]
    engine.step()
    assert len(engine.scheduler.running) == PATTERNS - 1  # the default has a place
    assert len(engine.scheduler.waiting) == 5
    engine.run()
    assert [tokens_of(r) for r in requests] == [one.alone for one in asked]
    assert len(set(map(tuple, (one.alone for one in asked)))) > PATTERNS
    check_empty(engine)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_of_another_dtype_is_followed(compile):
    model, prompts = tiny(), [random_ids(n) for n in (5, 140, 30)]
    engine = Engine(model, max_batch_size=2, max_length=256, compile=compile)
    options = {"max_new_tokens": 6, "stop_token_ids": ()}

    def all_of(*ids: list[int]) -> list[list[int]]:
        requests = [engine.submit(prompt, **options) for prompt in ids]
        engine.run()
        return [tokens_of(request) for request in requests]

    assert all_of(*prompts) == [c.tokens for c in Engine(model).generate(prompts, **options)]
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        for prompt in prompts[:2]:
            assert all_of(prompt) == [Engine(model).generate([prompt], **options)[0].tokens]
        assert engine.scheduler.cache.layers[0][0].dtype == dtype


@pytest.mark.usefixtures("dense")
def test_a_dtype_that_changes_amid_requests_loses_nothing():
    model = tiny()
    engine, window = Engine(model, max_batch_size=2, max_length=256), masks.sliding_window(9)
    options = {"max_new_tokens": 8, "stop_token_ids": ()}
    under_way = engine.submit(random_ids(140), mask=window, **options)
    for _ in range(4):
        engine.step()
    before = tokens_of(under_way)
    assert 0 < len(before) < 8
    model.to(torch.float64)
    later = engine.submit(random_ids(20), **options)
    engine.run()
    (expected,) = Engine(model).generate([random_ids(140)], mask=window, **options)
    assert tokens_of(under_way)[: len(before)] == before
    assert tokens_of(under_way) == expected.tokens
    assert tokens_of(later) == Engine(model).generate([random_ids(20)], **options)[0].tokens
