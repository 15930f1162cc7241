"""Reductions over the vocabulary: the kernel against float64, and against torch's operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex.kernels import cpu, reductions


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Load the kernels, whichever test comes first."""
    assert cpu.load(torch.float32)


def check(size: int, rows: int, scale: float, odd: dict[int, float], seed: int) -> None:
    """Compare rows of logits, some of whose values are replaced, with what float64 and Python's max give."""
    x = scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    for at, value in odd.items():
        x[at % rows, at % size] = value
    with torch.no_grad():
        assert (reductions.cpu.summarise(x) is None) is (x.numel() == 0)
        token, total, finite = reductions.argmax(x), reductions.logsumexp(x), reductions.all_finite(x)
    assert finite.tolist() == [all(map(math.isfinite, row)) for row in x.tolist()]
    exact = x.double().logsumexp(-1)
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    for row, found in zip(x.tolist(), token.tolist(), strict=True):
        if not any(map(math.isnan, row)):
            assert found == row.index(max(row))


@given(
    size=st.sampled_from([1, 2, 15, 16, 17, 33, 1000, 4095, 4096, 4097, 8200, 49152]),
    rows=st.integers(1, 5),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    odd=st.dictionaries(st.integers(0, 50000), st.sampled_from([math.inf, -math.inf, math.nan, 3e38, 0.0]), max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_reductions_of_any_row_are_those_of_float64(size, rows, scale, odd, seed):
    check(size, rows, scale, odd, seed)


def test_a_row_of_which_nothing_is_left_has_no_log_probability():
    check(5000, 2, 1.0, {}, 0)
    x = torch.full((1, 5000), -math.inf)
    with torch.no_grad():
        assert reductions.argmax(x).tolist() == [0]
        assert reductions.logsumexp(x).tolist() == [-math.inf]
        assert reductions.all_finite(x).tolist() == [False]


@pytest.mark.parametrize("fault", ["the last of ties", "no last number", "sums of halves", "infinite numbers pass"])
def test_the_check_finds_a_fault(monkeypatch, fault):
    summarise = cpu.summarise

    def faulty(x):
        found = summarise(x[:, :-1] if fault == "no last number" else x)
        if fault == "the last of ties":
            found[:, 0] = x.shape[-1] - 1 - summarise(x.flip(-1))[:, 0]
        elif fault == "sums of halves":
            found[:, 1] = summarise(x[:, : x.shape[-1] // 2])[:, 1]
        elif fault == "infinite numbers pass":
            found[:, 2] = 1
        return found

    monkeypatch.setattr(cpu, "summarise", faulty)
    with pytest.raises(AssertionError):
        check(300, 2, 1.0, {4: 3e38, 200: 3e38, 299: 3e38, 150: math.inf if "infinite" in fault else 0.0}, 0)


def test_other_dtypes_and_gradients_are_left_to_torch():
    x = torch.randn(2, 50)
    assert cpu.summarise(x) is None  # gradients are on
    with torch.no_grad():
        assert cpu.summarise(x.double()) is None
        assert cpu.summarise(x.bfloat16()) is None
        assert cpu.summarise(x[0]) is None
        assert cpu.summarise(x[None]) is None
        plain = [function(x.double()) for function in (reductions.argmax, reductions.logsumexp, reductions.all_finite)]
        assert plain[0].equal(reductions.argmax(x.T.contiguous().T))
        torch.testing.assert_close(plain[1].float(), reductions.logsumexp(x))
        assert plain[2].equal(reductions.all_finite(x))
