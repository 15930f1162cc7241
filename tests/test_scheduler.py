"""Continuous batching: every request gets what it would get alone, whatever else runs, comes and goes."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flex import Engine, Llama, LlamaConfig, Mask, Sampling, fuse, masks
from llama_flex.fusion import Prompt
from llama_flex.scheduler import Request


@dataclass
class Asked:
    prompt: list[int] | Prompt
    options: dict
    alone: list[int]


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
        (completion,) = plain.generate([prompt], **options)
        found.append(Asked(prompt, options, completion.tokens))
    assert len({tuple(a.alone) for a in found}) > 20
    return found


schedules = st.fixed_dictionaries(
    {
        "order": st.lists(st.integers(0, 23), min_size=1, max_size=10),
        "arrivals": st.lists(st.integers(0, 4), min_size=10, max_size=10),
        "priorities": st.lists(st.integers(0, 2), min_size=10, max_size=10),
        "ends": st.lists(st.sampled_from([None] * 6 + ["cancel", "raise"]), min_size=10, max_size=10),
        "rows": st.integers(2, 6),
        "pages": st.integers(4, 9),
        "prefill": st.sampled_from([128, 256, 512, 1024]),
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
    rng = random.Random(plan["seed"])
    rng.shuffle(scheduler.pool._free)
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

            request = tested.submit(one.prompt, priority=priority, callback=callback, **one.options)
            going.append((one, request, after if end else None))
            if end == "cancel" and rng.random() < 0.3:
                tested.cancel(request)
        for _, request, after in going:
            if after is not None and len(request.steps) > after:
                tested.cancel(request)
        if not waiting and scheduler.idle:
            break
        ended += tested.step()
        users = scheduler.pool.users
        held = [page for r in scheduler.running for sequence in r._sequences for page in sequence.pages]
        assert [held.count(page) for page in range(len(users))] == users
    assert scheduler.idle
    assert scheduler.pool.available == plan["pages"]
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
        elif request.finish_reason == "error":
            assert isinstance(request.error, Refused)
            assert len(tokens) == after + 1


def schedule_test(cases: int):
    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(schedules)
    def test(plain, asked, plan):
        check(run(plain, asked, plan))

    return test


test_every_request_gets_what_it_gets_alone = schedule_test(100)
test_every_request_gets_what_it_gets_alone_in_many_schedules = pytest.mark.slow(schedule_test(1000))
