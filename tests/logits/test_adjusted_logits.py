"""Biases, penalties, banned tokens, stop tokens that come too early, typical-p: those of transformers and OpenAI."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llama_flex import Sampling, sampling
from llama_flex.logits.parameters import SamplingTensors, stack
from llama_flex.sampling import adjust_logits, filter_logits

CPU, VOCAB, STOPS = torch.device("cpu"), 120, [2, 7]


def random_logits(seed: int, rows: int = 3, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def table(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), VOCAB, dtype=torch.bool).scatter(1, ids, True)


def everything(bias: dict[int, float], banned: list[int], too_early: bool, **parameters) -> SamplingTensors:
    """Return the parameters of three equal rows, with the tables that an engine makes."""
    p, sums = stack([Sampling(temperature=1.0, **parameters)] * 3, CPU), torch.zeros(3, VOCAB)
    for id, value in bias.items():
        sums[:, id] = value
    sums[:, banned] = -torch.inf
    forbidden = torch.zeros(3, VOCAB, dtype=torch.bool)
    forbidden[:, STOPS] = too_early
    return p._replace(bias=sums, forbidden=forbidden)


def check_all(own, seed, bias, banned, penalty, too_early, top, typical_p, scale=3.0) -> None:
    """Check a filter function against transformers: the same tokens kept, the same logits."""
    logits, ids = (
        random_logits(seed, 3, scale),
        torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed)),
    )
    p = everything(bias, banned, too_early, repetition_penalty=penalty, typical_p=typical_p, **top)
    chain = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(penalty),
            MinNewTokensLengthLogitsProcessor(9, int(too_early), STOPS),
            SuppressTokensLogitsProcessor(banned),
            TemperatureLogitsWarper(1.0),
            *([TopKLogitsWarper(top["top_k"])] if "top_k" in top else []),
            *([TopPLogitsWarper(top["top_p"]), MinPLogitsWarper(top["min_p"])] if "top_p" in top else []),
            TypicalLogitsWarper(typical_p),
        ]
    )
    ours, theirs = own(logits, p, table(ids)), chain(ids, logits.clone())
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20), min_size=1, max_size=8),
    banned=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    penalty=st.sampled_from([1.3, 0.7]),
    too_early=st.booleans(),
    top=st.sampled_from([{}, {"top_k": 30}, {"top_p": 0.8, "min_p": 0.01}]),
    typical_p=st.floats(0.05, 0.99),
)
def test_all_parameters_are_transformers_in_its_order(**drawn):
    check_all(filter_logits, **drawn)


def bias_after_the_penalty(logits, p, seen):
    logits = adjust_logits(logits, SamplingTensors(repetition_penalty=p.repetition_penalty), seen)
    return filter_logits(logits, p._replace(repetition_penalty=None))


def typical_before_top_p(logits, p, seen):
    first = filter_logits(logits, p._replace(min_p=None, tail=None), seen)
    return filter_logits(first, SamplingTensors(temperature=p.temperature, tail=p.tail, min_p=p.min_p))


def likely_instead_of_typical(logits, p, seen):
    first = filter_logits(logits, p._replace(typical_p=None), seen)
    return filter_logits(first, SamplingTensors(temperature=p.temperature, tail=1 - p.typical_p))


def stop_tokens_at_any_time(logits, p, seen):
    return filter_logits(logits, p._replace(forbidden=None), seen)


@pytest.mark.parametrize(
    "mutant", [bias_after_the_penalty, typical_before_top_p, likely_instead_of_typical, stop_tokens_at_any_time]
)
def test_comparison_with_transformers_catches(mutant):
    drawn = {"seed": 3, "bias": dict.fromkeys(range(60), 1.0), "banned": [3], "penalty": 1.3, "too_early": True}
    drawn |= {"top": {"top_p": 0.9, "min_p": 0.02}, "typical_p": 0.6, "scale": 1.0}
    check_all(filter_logits, **drawn)
    with pytest.raises(AssertionError):
        check_all(mutant, **drawn)


@pytest.mark.parametrize("typical_p", [1e-6, 0.2, 0.9, 0.9999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_typical_tokens_are_those_of_transformers(typical_p, scale):
    logits = random_logits(1, 8, scale)
    ours = filter_logits(logits, stack([Sampling(temperature=1.0, typical_p=typical_p)] * 8, CPU))
    assert torch.equal(ours, TypicalLogitsWarper(typical_p)(torch.zeros(8, 1), logits))


def test_typical_p_of_1_keeps_all_beside_a_row_that_filters():
    logits = random_logits(2, 2)
    requests = [Sampling(temperature=1.0), Sampling(temperature=1.0, typical_p=0.3)]
    ours = filter_logits(logits, stack(requests, CPU))
    assert torch.equal(ours[0], logits[0])
    assert (ours[1] == -torch.inf).any()


def counted(seed: int) -> tuple[torch.Tensor, SamplingTensors]:
    """Return how often each token was generated, and the parameters of two rows with penalties for it."""
    counts = torch.randint(4, (2, VOCAB), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    presence, frequency = torch.tensor([0.7, -1.0]), torch.tensor([0.4, 1.9])
    return counts, SamplingTensors(counts=counts, presence_penalty=presence, frequency_penalty=frequency)


def by_openai(logits: torch.Tensor, p: SamplingTensors) -> torch.Tensor:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, as OpenAI documents it."""
    count, mu = p.counts.double(), logits.double()
    alphas = p.frequency_penalty.double()[:, None], p.presence_penalty.double()[:, None]
    return mu - count * alphas[0] - (count > 0).double() * alphas[1]


def test_presence_and_frequency_penalties_are_openais():
    for seed in range(5):
        logits, (_, p) = random_logits(seed, 2), counted(seed)
        torch.testing.assert_close(adjust_logits(logits, p).double(), by_openai(logits, p), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mutant", ["presence counts", "swapped", "prompt counts"])
def test_comparison_with_openai_catches(mutant):
    logits, (counts, p) = random_logits(0, 2), counted(0)
    other = {
        "presence counts": p._replace(frequency_penalty=p.frequency_penalty + p.presence_penalty),
        "swapped": p._replace(frequency_penalty=p.presence_penalty, presence_penalty=p.frequency_penalty),
        "prompt counts": p._replace(counts=counts + (torch.arange(VOCAB) < 5)),
    }[mutant]
    assert not torch.allclose(adjust_logits(logits, other).double(), by_openai(logits, p), rtol=1e-6, atol=1e-6)


def test_compiled_as_not_compiled():
    p = everything({5: 2.0}, [1], True, repetition_penalty=1.2, typical_p=0.7)
    counts, _ = counted(1)
    p = p._replace(counts=torch.cat((counts, counts[:1])), presence_penalty=torch.tensor([0.1, 0.0, 1.0]))
    p = p._replace(frequency_penalty=torch.tensor([0.0, 0.5, 1.0]))
    seen, logits = table(torch.arange(30).view(3, 10)), random_logits(5)
    compiled = torch.compile(sampling.filter_logits, fullgraph=True, dynamic=False)(logits, p, seen)
    torch.testing.assert_close(compiled, filter_logits(logits, p, seen), rtol=1e-6, atol=1e-6)
