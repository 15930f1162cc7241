"""The plain loop of `llama_flex.generate` gives the very tokens of the engine."""

import dataclasses

import pytest
import torch
from helpers import random_ids

from llama_flex import Engine, Llama, Sampling, sampling
from llama_flex.generate import plain_loop

PROMPT, NEW = random_ids(140), 12  # more than a block of 128 tokens
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=2.0),
    "sampled": Sampling(temperature=1.2, top_k=100, top_p=0.95, seed=7),
    "sampled with penalty": Sampling(temperature=0.8, min_p=0.01, repetition_penalty=1.3, seed=-3),
}


@pytest.fixture(scope="module")
def model(tiny_pair) -> Llama:
    """A tiny random model in float32."""
    _, model = tiny_pair("gqa")
    assert model.dtype == torch.float32
    return model


@pytest.fixture(scope="module")
def ending_model(model) -> Llama:
    """The same model, with an end-of-text id that it comes to at its fourth token."""
    end = engine_tokens(model, Sampling())[3]
    ending = Llama(dataclasses.replace(model.config, eos_token_id=end)).eval()
    ending.load_state_dict(model.state_dict())
    return ending


def engine_tokens(model: Llama, options: Sampling) -> list[int]:
    """Return what the engine generates."""
    (done,) = Engine(model).generate([PROMPT], max_new_tokens=NEW, sampling=options)
    return done.tokens


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_plain_loop_gives_the_tokens_of_the_engine(model, name):
    tokens = list(plain_loop(model, PROMPT, NEW, SAMPLINGS[name]))
    assert tokens == engine_tokens(model, SAMPLINGS[name])
    assert len(tokens) == NEW


def test_the_plain_loop_stops_at_an_end_of_text_id_as_the_engine_does(ending_model):
    tokens = list(plain_loop(ending_model, PROMPT, NEW, Sampling()))
    assert tokens == engine_tokens(ending_model, Sampling())
    assert len(tokens) == 4
    assert tokens[-1] in ending_model.eos_token_ids


@pytest.mark.exhaustive
def test_the_samplings_above_differ(model):
    """Check that temperature, seed and penalty each change some token; else the comparison above would show nothing."""
    assert len({tuple(plain_loop(model, PROMPT, NEW, options)) for options in SAMPLINGS.values()}) == len(SAMPLINGS)


def noise_of_the_next_step(sample, logits, parameters, step, seen):
    return sample(logits, parameters, step + 1, seen)


def penalty_without_the_prompt(sample, logits, parameters, step, seen):
    return sample(logits, parameters, step, seen.index_fill(1, torch.tensor(PROMPT), False))


@pytest.mark.parametrize(
    ("mutant", "name"), [(noise_of_the_next_step, "sampled"), (penalty_without_the_prompt, "penalty")]
)
def test_the_comparison_catches(model, monkeypatch, mutant, name):
    expected, sample = engine_tokens(model, SAMPLINGS[name]), sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *given: mutant(sample, *given))
    assert list(plain_loop(model, PROMPT, NEW, SAMPLINGS[name])) != expected


def test_the_comparison_catches_a_loop_that_does_not_stop(ending_model, monkeypatch):
    expected = engine_tokens(ending_model, Sampling())
    monkeypatch.setattr(Llama, "eos_token_ids", ())
    assert list(plain_loop(ending_model, PROMPT, NEW, Sampling())) != expected
