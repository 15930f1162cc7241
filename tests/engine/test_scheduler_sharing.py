"""Prefixes: what several prompts begin with is computed once, and pages that nobody holds are used again."""

from collections import Counter
from dataclasses import replace

import pytest
from helpers import few
from request_helpers import (
    NEW,
    Case,
    check_empty,
    make_case,
    new_engine,
    random_ids,
    tokens_alone,
    tokens_of,
)

from llama_flex import Sampling, fuse, masks, scores
from llama_flex.masks.layout import BLOCK


def test_a_prefix_of_requests_that_come_together_is_computed_once(dense, prefilled):
    shared = random_ids(300)
    cases = [make_case(dense, shared + random_ids(5 + n, n), **NEW) for n in range(6)]
    engine = new_engine(dense, max_batch_size=6, max_slots=30 * BLOCK, prefill_tokens=1024)
    requests = [engine.submit(case.prompt, **NEW) for case in cases]
    engine.run()
    assert [tokens_of(r) for r in requests] == [case.expected for case in cases]
    assert Counter(start for _, start in prefilled) == {0: 1, 64: 1, 128: 1, 192: 1, 256: 6}
    assert [r.num_cached_tokens for r in requests] == [0, *[256] * 5]


def test_samples_of_one_prompt_share_its_pages_and_have_seeds_of_their_own(dense, prefilled):
    ids, sampling = random_ids(300), Sampling(temperature=1.0, seed=11)
    expected = [tokens_alone(dense, ids, **NEW, sampling=replace(sampling, seed=11 + i)) for i in range(4)]
    assert len(set(map(tuple, expected))) == 4
    engine = new_engine(dense, max_batch_size=6, max_slots=7 * BLOCK, prefill_tokens=1024)
    requests = engine.submit_samples(ids, 4, sampling=sampling, **NEW)
    engine.step()
    pages = [r.sequences[0].pages for r in requests]
    assert len({tuple(p[:2]) for p in pages}) == 1
    assert [engine.scheduler.block_manager.ref_counts[page] for page in pages[0]] == [4, 4, 1]
    assert len({p[2] for p in pages}) == 4
    engine.run()
    assert [tokens_of(r) for r in requests] == expected
    assert Counter(start for _, start in prefilled) == {0: 1, 64: 1, 128: 1, 192: 1, 256: 4}
    check_empty(engine)


def test_requests_with_masks_or_score_functions_of_their_own_share_nothing(dense, prefilled):
    ids = random_ids(300)
    engine = new_engine(dense, max_batch_size=6, max_slots=30 * BLOCK, prefill_tokens=2048)
    each = [
        {},
        {"mask": masks.sliding_window(50)},
        {"mask": masks.sliding_window(50)},
        {"score_mod": scores.softcap(1)},
    ]
    requests = [engine.submit(ids, **NEW, **options) for options in each]
    engine.run()
    assert [tokens_of(r) for r in requests] == [tokens_alone(dense, ids, **NEW, **options) for options in each]
    assert Counter(start for _, start in prefilled) == dict.fromkeys(range(0, 300, 64), 4)


def test_fused_prompts_share_pages_only_with_equal_weights(dense, prefilled):
    prompts = [fuse([[5, 6], [7]], suffix=random_ids(300), weights=w) for w in (None, [1, 9], [9, 1], [9, 1])]
    expected = [tokens_alone(dense, prompt, **NEW) for prompt in prompts]
    assert len(set(map(tuple, expected))) == 3
    engine = new_engine(dense, max_batch_size=6, max_slots=30 * BLOCK, prefill_tokens=1024)
    requests = [engine.submit(prompt, **NEW) for prompt in prompts]
    engine.run()
    assert [tokens_of(r) for r in requests] == expected
    assert Counter(start for _, start in prefilled) == {0: 3, 64: 3, 128: 3, 192: 3, 256: 4}


def test_pages_that_nobody_holds_are_used_again_until_they_are_needed_the_oldest_first(dense, prefilled):
    a, b, c = (make_case(dense, random_ids(300, n), **NEW) for n in range(3))
    engine = new_engine(dense, max_batch_size=2, max_slots=8 * BLOCK)
    everything = list(range(0, 300, 64))

    def computed(case: Case) -> list[int]:
        prefilled.clear()
        request = engine.submit(case.prompt, **NEW)
        engine.run()
        assert tokens_of(request) == case.expected
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


@pytest.mark.parametrize("length", few([15, 16, 200], [5, 128, 280]))
def test_a_common_beginning_within_a_page_is_copied(dense, prefilled, length):
    first = random_ids(300)
    other = first[:length] + [1 + id % 150 for id in first[length:]][:40]
    assert other[length] != first[length]
    engine = new_engine(dense, max_batch_size=2, max_slots=6 * BLOCK)
    engine.submit(first, **NEW)
    engine.run()
    prefilled.clear()
    for options in (NEW, NEW | {"sampling": Sampling(temperature=1.0, seed=3)}):
        case = make_case(dense, other, **options)
        request = engine.submit(other, **options)
        engine.run()
        assert tokens_of(request) == case.expected
    assert [start for _, start in prefilled] == [length if length >= 16 else 0]  # fewer are not worth a copy
    check_empty(engine)
