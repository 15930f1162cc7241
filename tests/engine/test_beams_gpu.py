"""Beam search on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from beam_helpers import by_definition, differ
from helpers import random_ids
from kv_dtype_helpers import rounding, uneven

from llama_flex import Engine, Sampling, masks
from llama_flex.engine import model_runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [random_ids(length, 2) for length in (5, 130, 17)]
OPTIONS = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 40, "stop_token_ids": [125, 212, 346]}


def on_cuda(model, **options) -> Engine:
    return Engine(copy.deepcopy(model).cuda(), **options)


@pytest.mark.parametrize("compile", [True, False, "auto"])
@pytest.mark.parametrize("given", [{}, {"length_penalty": -0.5, "repetition_penalty": 1.3}], ids=str)
def test_beams_are_those_of_full_forwards(tiny_pair, compile, given):
    """Longer than the slots that a row first takes over."""
    model = tiny_pair("gqa")[1]
    expected, engine = by_definition(model, PROMPTS, **OPTIONS, **given), on_cuda(model, compile=compile)
    for _ in range(2):
        assert not differ(engine.beam_search(PROMPTS, **OPTIONS, **given), expected)


@pytest.mark.parametrize("compile", [True, False, "auto"])
def test_beams_under_a_window_for_each_prompt(tiny_pair, compile):
    model, options = tiny_pair("gqa")[1], OPTIONS | {"max_new_tokens": 6}
    engine = on_cuda(model, compile=compile)
    found = engine.beam_search(PROMPTS, mask=masks.sliding_window(torch.tensor([4, 60, 9])), **options)
    mask = masks.sliding_window(torch.tensor([4, 60, 9]))
    assert not differ(found, by_definition(model, PROMPTS, mask=mask, **options))


@pytest.mark.parametrize("compile", [True, False])
def test_beams_over_keys_and_values_in_8_bits(tiny_pair, compile):
    model, options = uneven(tiny_pair("gqa")[1], torch.float32), OPTIONS | {"max_new_tokens": 8}
    found = on_cuda(model, compile=compile, kv_dtype="fp8").beam_search(PROMPTS, **options)
    expected = by_definition(model, PROMPTS, edit=rounding(model), **options)
    assert [[d.tokens for d in each] for each in found] == [[tokens for _, tokens in each] for each in expected]


def test_auto_compiles_what_is_longer_than_the_uncompiled_steps(tiny_pair, monkeypatch):
    model = tiny_pair("gqa")[1]
    engine = on_cuda(model, compile="auto")
    engine.beam_search(PROMPTS, **OPTIONS)
    assert not engine.graphs.count
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 20)
    expected = by_definition(model, PROMPTS, **OPTIONS)
    assert not differ(engine.beam_search(PROMPTS, **OPTIONS), expected)
    assert engine.graphs.count


def test_best_of(tiny_pair):
    model = tiny_pair("gqa")[1]
    engine = on_cuda(model, compile="auto", max_batch_size=4, max_slots=2048)
    sampling, options = Sampling(temperature=1.0, seed=3), {"max_new_tokens": 8, "stop_token_ids": ()}
    found = engine.best_of(PROMPTS, 4, num_return_sequences=2, sampling=sampling, **options)
    cpu = Engine(model, backend="dense", max_batch_size=4, max_slots=2048)
    expected = cpu.best_of(PROMPTS, 4, num_return_sequences=2, sampling=sampling, **options)
    for one, other in zip(found, expected, strict=True):
        assert [done.tokens for done in one] == [done.tokens for done in other]
