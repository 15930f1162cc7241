"""Steps of many requests: how they are padded, and that few of them are compiled and recorded."""

import random

import pytest
import torch
from helpers import few
from request_helpers import (
    NEW,
    check_empty,
    new_engine,
    random_ids,
    tokens_alone,
    tokens_of,
)

from llama_flex import Engine, Ensemble, Sampling, attention, masks, scores
from llama_flex.engine.fusion import AnyPrompt
from llama_flex.engine.paged_batch import PagedBatch
from llama_flex.engine.request import Request
from llama_flex.masks.layout import BLOCK


def test_a_step_of_prompts_has_little_padding_and_gives_their_first_tokens(dense, monkeypatch):
    steps, run = [], PagedBatch._run

    def noting(self, size, width, *given):
        steps.append((size, width))
        return run(self, size, width, *given)

    monkeypatch.setattr(PagedBatch, "_run", noting)
    prompts = [random_ids(45, seed) for seed in range(8)]
    expected = [tokens_alone(dense, ids, **NEW)[:1] for ids in prompts]
    engine = new_engine(dense, max_batch_size=8, max_slots=20 * BLOCK, prefill_tokens=512)
    for sizes in ([(512, 64)], [(8, 1)]):  # what is known but for the last token goes on as if it ran already
        steps.clear()
        requests = [engine.submit(ids, max_new_tokens=1, sampling=Sampling()) for ids in prompts]
        engine.run()
        assert [tokens_of(r) for r in requests] == expected
        assert steps == sizes


def test_compiled_requests_give_the_tokens_of_eager_ones(dense, flex):
    engine = new_engine(flex, compile=True, max_batch_size=2, max_slots=512, prefill_tokens=128)
    prompts = [random_ids(60), random_ids(64)]
    for _ in range(2):  # compiled and recorded, then replayed
        requests = [engine.submit(prompt, **NEW) for prompt in prompts]
        engine.run()
        assert [tokens_of(r) for r in requests] == [tokens_alone(dense, prompt, **NEW) for prompt in prompts]


def run_many_kinds(engine: Engine, seed: int) -> list[tuple[AnyPrompt, dict, Request]]:
    """Run requests with and without masks, score functions, sampling and ensembles, each submitted while others run."""
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


@pytest.mark.exhaustive
def test_compiled_steps_give_the_tokens_of_eager_ones_and_are_compiled_once_whatever_is_asked(flex):
    engine = new_engine(flex, compile=True, max_batch_size=2, max_slots=6 * BLOCK, prefill_tokens=128)
    random.Random(0).shuffle(engine.scheduler.block_manager._free)
    # The second run finds the window among the specs from its beginning, which is one more combination.
    requests = run_many_kinds(engine, 1) + run_many_kinds(engine, 2)
    count = engine.graphs.count
    assert 0 < count < 40
    for seed in (3, 4, 5):
        requests += run_many_kinds(engine, seed)
    assert engine.graphs.count == count
    for prompt, options, request in requests:
        assert tokens_of(request) == tokens_alone(flex, prompt, **NEW, **options)
    check_empty(engine)


@pytest.mark.parametrize("backend", few(["dense"], ["flex"]))
def test_a_mask_that_comes_leaves_the_recorded_steps_of_requests_without_one(backend, request, monkeypatch):
    like = request.getfixturevalue(backend)
    engine = new_engine(like, compile=True, max_batch_size=2, max_slots=6 * BLOCK, prefill_tokens=128)
    record, recorded = engine.graphs.record, []

    def noting(*given):
        recorded.append(1)
        return record(*given)

    monkeypatch.setattr(engine.graphs, "record", noting)

    def run(seed: int, **options) -> int:
        before = len(recorded)
        requests = [engine.submit(random_ids(70, seed), **NEW, **options) for _ in range(2)]
        engine.run()
        for submitted in requests:
            assert tokens_of(submitted) == tokens_alone(like, random_ids(70, seed), **NEW, **options)
        return len(recorded) - before

    with torch.compiler.set_stance("force_eager"):  # what is compiled does not matter here
        assert run(1) > 0
        run(2)
        assert run(3) == 0
        for width in (5, 9):  # the second is one more spec, so what was recorded for the first is gone
            assert run(3, mask=masks.sliding_window(width)) > 0
            assert run(4) == 0
        engine.submit([5], **NEW, mask=masks.sliding_window(3))
        engine.run()
        assert run(5, mask=masks.sliding_window(5)) > 0


@pytest.mark.exhaustive
def test_compiled_attention_computes_the_blocks_that_are_listed_and_no_others(flex, monkeypatch):
    list_pages = attention.list_pages

    def without_full_blocks(lists, pages):
        found = list_pages(lists, pages)
        none = None if found.full_kv_num_blocks is None else torch.zeros_like(found.full_kv_num_blocks)
        return masks.BlockLists(found.kv_num_blocks, found.kv_indices, none, found.full_kv_indices)

    monkeypatch.setattr(attention, "list_pages", without_full_blocks)
    engine = new_engine(flex, compile=True, max_batch_size=1, max_slots=512, prefill_tokens=128)
    ids = random_ids(300)
    request = engine.submit(ids, **NEW)
    engine.run()
    assert tokens_of(request) != tokens_alone(flex, ids, **NEW)
