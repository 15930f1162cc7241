"""Sampling parameters: values, copies, what a checkpoint recommends, and what is left to engines."""

import copy
import dataclasses
import pickle

import pytest
import torch

from llama_flex import GenerationConfig, Grammar, Sampling
from llama_flex.logits.parameters import stack, with_seed


def keep(ids, logits):
    return logits


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("typical_p", v, "above 0") for v in (0, -0.5, 1.1, True, "x")),
        *(("presence_penalty", v, "-2 to 2") for v in (2.1, -3, float("nan"), None)),
        *(("frequency_penalty", v, "-2 to 2") for v in (2.1, -3, float("nan"))),
        *(("no_repeat_ngram_size", v, "whole number") for v in (-1, 1.5, True)),
        *(("min_new_tokens", v, "whole number") for v in (-1, 1.5, "2")),
        *(("top_logprobs", v, "whole number") for v in (-1, 1.5, True)),
        *(("logit_bias", v, "by token id") for v in ([1], {"x": 1.0}, {1: "x"}, {1.5: 2}, {1: float("nan")}, {1: 1e7})),
        *(("banned_tokens", v, "token ids") for v in (5, ["x"], [1.5], "ab")),
        *(("processors", v, "functions") for v in (5, [5], "ab")),
        *(("grammar", v, "Grammar") for v in ("[0-9]", {"type": "object"})),
    ],
)
def test_wrong_values_are_refused_by_name(name, value, said):
    with pytest.raises(ValueError, match=f"^{name} must be .*{said}") as caught:
        Sampling(**{name: value})
    assert len(str(caught.value)) < 220


def test_parameters_are_hashable_copied_and_compared_by_value():
    bias = {5: 1.5}
    given = {"logit_bias": bias, "banned_tokens": [1, 2], "processors": [keep], "grammar": Grammar("x"), "seed": 3}
    one, other = Sampling(**given), Sampling(**given)
    bias[5] = 7.0
    assert one == other == copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == dataclasses.replace(one)
    assert hash(one) == hash(other)
    assert (one.logit_bias, one.banned_tokens, one.processors) == ({5: 1.5}, (1, 2), (keep,))
    assert one != Sampling(**given | {"logit_bias": {5: 2.0}})
    assert with_seed(one, 4) == dataclasses.replace(one, seed=7)
    assert Sampling(logit_bias={}).logit_bias is None
    assert Sampling(processors=keep).processors == (keep,)


def test_parameters_that_need_the_host_are_known():
    assert not Sampling(temperature=1.0, logit_bias={1: 2.0}, min_new_tokens=2, top_logprobs=3).needs_host
    for name, value in {"no_repeat_ngram_size": 2, "processors": [keep], "grammar": Grammar("x")}.items():
        assert Sampling(**{name: value}).needs_host


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {1: 2.0}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("no_repeat_ngram_size", 2),
        ("min_new_tokens", 2),
        ("banned_tokens", [3]),
        ("processors", [keep]),
        ("top_logprobs", 2),
        ("grammar", Grammar("x")),
    ],
)
def test_a_stack_refuses_by_name_the_parameters_that_need_an_engine(name, value):
    with pytest.raises(ValueError, match=f"^{name}: honoured by Engine"):
        stack([Sampling(), Sampling(**{name: value})], torch.device("cpu"))


def test_recommended_are_the_new_settings_that_transformers_applies():
    config = GenerationConfig(typical_p=0.8, no_repeat_ngram_size=3, suppress_tokens=(4, 5), min_new_tokens=2)
    greedy = Sampling(no_repeat_ngram_size=3, banned_tokens=[4, 5], min_new_tokens=2)
    assert Sampling.recommended(config) == greedy
    config = dataclasses.replace(config, do_sample=True)
    assert Sampling.recommended(config) == dataclasses.replace(greedy, temperature=1.0, top_k=50, typical_p=0.8)
    assert Sampling.recommended(config, banned_tokens=[]).banned_tokens == ()
    with pytest.raises(ValueError, match=r"generation_config.json: typical_p must be"):
        Sampling.recommended(dataclasses.replace(config, typical_p=7.0))
