"""Gumbel noise: finite, of the right distribution, and uncorrelated between seeds, steps and tokens."""

import math

import pytest
import torch

from llama_flex.kernels.noise import _mix, gumbel


def test_noise_is_finite():
    noise = gumbel(torch.tensor([1049153, 1, 2]), torch.zeros(3, dtype=torch.int64), 1 << 20)
    assert noise.isfinite().all()
    assert -4 < noise.min() < -2.5  # of 3 * 2^20 uniform numbers: -log(log(n)), log(n)
    assert 12 < noise.max() < 25


def correlations(noise: torch.Tensor) -> list[float]:
    """Return the correlations between neighbours along seeds, steps and tokens, and along the diagonals, where two
    counters could cancel."""
    pairs = [
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:, :-1], noise[:-1, 1:]),
        (noise[1:, :, :-1], noise[:-1, :, 1:]),
        (noise[:, 1:, :-1], noise[:, :-1, 1:]),
        (noise[2:], noise[:-2]),
        (noise[:, 32:], noise[:, :-32]),
    ]
    return [float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) for a, b in pairs]


def grid(noise, seeds: torch.Tensor, n: int = 64) -> torch.Tensor:
    """Return noise, `[seeds, steps, tokens]`."""
    return torch.stack([noise(torch.full((n,), s), torch.arange(n), n) for s in seeds.tolist()])


@pytest.mark.parametrize("start", [0, -32, 2**40])
def test_noise_of_neighbouring_seeds_steps_and_tokens_is_uncorrelated(start):
    noise = grid(gumbel, torch.arange(64) + start)
    assert max(map(abs, correlations(noise))) < 5 / math.sqrt(noise.numel())
    # and it is Gumbel: mean 0.5772, variance pi^2 / 6
    assert abs(noise.mean() - 0.57722) < 5 * math.sqrt(math.pi**2 / 6 / noise.numel())
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_the_check_of_correlations_catches_counters_that_are_only_added():
    def added(seed, step, size):
        bits = _mix((seed + step)[:, None] + torch.arange(size)) & 0xFFFFFFFF
        return -(-torch.log1p(-(bits.float() + 0.5) * 2.0**-32)).log()

    assert max(map(abs, correlations(grid(added, torch.arange(64))))) > 0.9
