"""Masks and score functions of requests: each is computed as if its request ran alone."""

import pytest
import torch
from helpers import few
from request_helpers import (
    NEW,
    check_empty,
    make_case,
    new_engine,
    random_ids,
    submit_and_run,
    tokens_alone,
    tokens_of,
)

from llama_flex import Ensemble, Mask, fuse, masks, scores
from llama_flex.engine.request_masks import MAX_SPECS
from llama_flex.masks.layout import BLOCK


def test_a_mask_that_looks_ahead_sees_what_is_appended_in_the_same_step(dense):
    options = NEW | {"mask": masks.prefix_lm(300)}
    case = make_case(dense, random_ids(450), **options)  # in a chunk of 512
    engine = new_engine(dense, max_batch_size=2, max_slots=1024, prefill_tokens=512)
    request = engine.submit(case.prompt, **options)
    engine.run()
    assert tokens_of(request) == case.expected
    assert case.expected != tokens_alone(dense, case.prompt, **NEW)


def test_a_mask_reads_nothing_of_other_requests(dense):
    """Check masks and scores that look tokens or rows up in tables no longer than their own request needs."""
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
        engine = new_engine(dense, max_batch_size=12, max_slots=20 * BLOCK, prefill_tokens=2048)
        requests = [engine.submit(prompt, **NEW, **options) for prompt, options in order]
        engine.run()
        for (prompt, options), request in zip(order, requests, strict=True):
            assert tokens_of(request) == tokens_alone(engine, prompt, **NEW, **options)


def test_a_mask_reads_nothing_of_requests_that_ran_before(dense):
    """Check that a step's padding has no attributes of the tokens that were in its place before."""

    def windows(*widths: int) -> Mask:
        of = torch.tensor(widths)
        return Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < of[q.batch]))

    def of_token(attribute: str, count: int) -> Mask:
        table = torch.ones(count, dtype=torch.bool)
        return Mask(lambda q, kv: (kv.index <= q.index) & table[getattr(q, attribute)])

    long = [(random_ids(250), {}), (fuse([[5, 6], [7]], suffix=random_ids(100)), {})]
    short = [[(random_ids(10), {"mask": of_token(name, n)})] for name, n in (("position", 16), ("segment", 1))]
    several = [(Ensemble([random_ids(n) for n in (70, 80, 90)], "mean"), {"mask": windows(5, 6, 7)})]
    others = [[(random_ids(5), {"mask": masks.sliding_window(10 + n)})] for n in range(MAX_SPECS - 2)]
    one = [(random_ids(20), {"mask": windows(9)}), (random_ids(10), {})]  # takes the number of the mask of several
    for rounds in ([long, *short], [several, *others, one]):
        engine = new_engine(dense, max_batch_size=6, max_slots=12 * BLOCK, prefill_tokens=64)
        for each in rounds:
            requests = [engine.submit(prompt, **NEW, **options) for prompt, options in each]
            engine.run()
            expected = [tokens_alone(dense, prompt, **NEW, **options) for prompt, options in each]
            assert [tokens_of(request) for request in requests] == expected


@pytest.mark.parametrize("backend", few(["dense"], ["flex"]))
def test_a_table_need_not_have_what_was_in_the_slots_before(backend, request):
    like = request.getfixturevalue(backend)
    engine = new_engine(like, max_batch_size=2, max_slots=4 * BLOCK)
    engine.submit(random_ids(500), **NEW)
    engine.run()
    bias = torch.linspace(-3, 3, 140)
    options = NEW | {"score_mod": scores.ScoreMod(lambda score, q, kv: score + bias[kv.position])}
    submitted = engine.submit(random_ids(130), **options)
    engine.run()
    assert tokens_of(submitted) == tokens_alone(like, random_ids(130), **options)


@pytest.mark.parametrize("backend", few(["dense"], ["flex"]))
def test_a_score_of_its_own_needs_no_score(backend, request):
    like = request.getfixturevalue(backend)
    engine = new_engine(like, max_batch_size=4, max_slots=1024)
    options = {"max_new_tokens": 6, "score_mod": scores.ScoreMod(lambda score, q, kv: (kv.index % 3).float())}
    expected = tokens_alone(like, random_ids(12), stop_token_ids=(), **options)
    assert submit_and_run(engine, random_ids(12), **options) == expected


def test_more_masks_than_may_run_at_a_time_wait(dense):
    ids = random_ids(150)
    cases = [make_case(dense, ids, **NEW, mask=masks.sliding_window(8 * n + 1)) for n in range(MAX_SPECS + 4)]
    engine = new_engine(dense, max_batch_size=16, max_slots=40 * BLOCK, prefill_tokens=4096)
    requests = [engine.submit(ids, **case.options) for case in cases]
    engine.step()
    assert len(engine.scheduler.running) == MAX_SPECS - 1  # the default has a place
    assert len(engine.scheduler.waiting) == 5
    engine.run()
    assert [tokens_of(r) for r in requests] == [case.expected for case in cases]
    assert len(set(map(tuple, (case.expected for case in cases)))) > MAX_SPECS
    check_empty(engine)
