"""Streams: computed as far as they are read, left midway, interrupted, and side by side."""

import pytest
import torch
from generation_helpers import ONE, successor_model
from helpers import random_ids

from llama_flex import Completion, Engine


def test_stream_yields_the_steps_that_generate_collects(engine):
    prompts = [random_ids(length, 10) for length in (3, 40)]
    steps = list(engine.stream(prompts, max_new_tokens=5, stop_token_ids=[]))
    assert [step.row for step in steps] == [0, 1] * 5
    collected = [Completion(), Completion()]
    for step in steps:
        assert collected[step.row].finish_reason is None
        collected[step.row].add(step)
    assert collected == engine.generate(prompts, max_new_tokens=5, stop_token_ids=[])
    assert [done.finish_reason for done in collected] == ["length", "length"]
    assert all(isinstance(step.token, int) and isinstance(step.logprob, float) for step in steps)


def test_stream_computes_no_further_than_it_is_asked(engine, monkeypatch):
    calls = []
    step = engine.model.step
    monkeypatch.setattr(engine.model, "step", lambda ids, *rest: calls.append(tuple(ids.shape)) or step(ids, *rest))
    stream = engine.stream([random_ids(200, 11)], max_new_tokens=50)
    assert calls == []
    next(stream)
    assert calls == [(1, 128), (1, 128)]
    next(stream)
    assert calls == [(1, 128), (1, 128), (1, 1)]
    stream.close()


def test_the_last_token_is_not_fed(engine, monkeypatch):
    calls = []
    step = engine.model.step
    monkeypatch.setattr(engine.model, "step", lambda ids, *rest: calls.append(ids.shape[1]) or step(ids, *rest))
    engine.generate([random_ids(5, 12)], max_new_tokens=1)
    assert calls == [128]


def test_closing_a_stream_leaves_the_engine_as_it_was(engine):
    prompt = random_ids(30, 13)
    before = engine.generate([prompt], max_new_tokens=5)
    stream = engine.stream([prompt], max_new_tokens=50)
    next(stream), next(stream)
    stream.close()
    assert torch.is_grad_enabled()
    assert engine.generate([prompt], max_new_tokens=5) == before


def test_streams_side_by_side_do_not_mix(engine):
    prompts = [random_ids(30, 14), random_ids(7, 14)]
    streams = [engine.stream([prompt], max_new_tokens=5, stop_token_ids=[]) for prompt in prompts]
    tokens = [[step.token for step in pair] for pair in zip(*streams, strict=True)]
    alone = [engine.generate([p], max_new_tokens=5, stop_token_ids=[])[0].tokens for p in prompts]
    assert [list(t) for t in zip(*tokens, strict=True)] == alone


def test_an_interrupt_midway_leaves_the_engine_usable(engine, monkeypatch):
    prompt = random_ids(30, 15)
    before = engine.generate([prompt], max_new_tokens=5)
    step, calls = engine.model.step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt], max_new_tokens=5)
    assert torch.is_grad_enabled()
    assert engine.generate([prompt], max_new_tokens=5) == before


def test_gradients_are_neither_computed_nor_switched_off_for_the_caller(engine):
    for _ in engine.stream([random_ids(3, 16)], max_new_tokens=2):
        assert torch.is_grad_enabled()


def test_a_model_that_is_moved_during_a_stream_ends_it_with_one_line(tokenizer):
    model = successor_model(eos=None)
    steps = Engine(model, tokenizer, backend="dense").stream([[ONE]], max_new_tokens=5)
    next(steps)
    model.to(torch.float64)
    with pytest.raises(ValueError, match=r"from torch\.float32 on cpu to torch\.float64 on cpu during a stream"):
        list(steps)


def test_streams_that_are_made_before_a_cache_changes_go_on_after_what_it_holds_then(engine):
    caches, prompts = [engine.new_cache(1, 300) for _ in "ab"], ([5, 6, 7], [8, 9])
    options = {"max_new_tokens": 4, "stop_token_ids": ()}
    made = [engine.stream([prompt], cache=caches[0], **options) for prompt in prompts]
    found = [[step.token for step in stream] for stream in made]
    assert found == [engine.generate([prompt], cache=caches[1], **options)[0].tokens for prompt in prompts]
    assert caches[0].tokens.position.tolist() == caches[1].tokens.position.tolist()


def test_a_stream_that_was_not_begun_is_not_explained(engine):
    engine.stream([[5, 6]])
    with pytest.raises(ValueError, match="nothing has run yet"):
        engine.explain()
