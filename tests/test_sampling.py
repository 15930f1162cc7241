"""Logits to tokens: the filters of transformers, the right distribution, and draws that a seed and a step determine."""

import math

import pytest
import torch
import transformers
from helpers import few
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_flex import GenerationConfig, Sampling, sampling
from llama_flex.logits.parameters import stack
from llama_flex.sampling import filter_logits, sample

CPU = torch.device("cpu")


def random_logits(seed: int, rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def seen_tokens(seed: int, rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids `[rows, 12]` of earlier tokens, and the same as booleans `[rows, vocab]`."""
    ids = torch.randint(vocab, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return ids, torch.zeros(rows, vocab, dtype=torch.bool).scatter(1, ids, True)


def draw(logits: torch.Tensor, requests: list[Sampling], step=0, seen=None) -> torch.Tensor:
    """Draw the tokens of one step."""
    steps = torch.as_tensor(step, dtype=torch.int32).expand(len(requests))
    return sample(logits, stack(requests, CPU), steps, seen)[0]


# ---- filters


def by_transformers(logits: torch.Tensor, ids: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Filter logits by transformers' own processors, in the order in which its generate applies them."""
    chain = LogitsProcessorList()
    if s.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature != 1:
        chain.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(MinPLogitsWarper(s.min_p))
    return chain(ids, logits.clone())


def check_filters(own, logits: torch.Tensor, ids: torch.Tensor, s: Sampling) -> None:
    """Check a filter function against transformers: the same tokens kept, the same logits, the same most likely one."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    ours = own(logits, stack([s] * len(logits), CPU), seen)
    theirs = by_transformers(logits, ids, s)
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize(
    "settings_",
    [
        *({"temperature": t} for t in (0.1, 0.7, 1.0, 2.5)),
        *({"top_k": k} for k in (1, 2, 50, 199, 200, 10**6)),
        *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
        *({"min_p": p} for p in (1e-6, 0.01, 0.3, 0.999)),
        *({"repetition_penalty": r} for r in (0.5, 1.1, 3.0)),
    ],
    ids=str,
)
def test_each_filter_is_transformers(settings_):
    s = Sampling(**{"temperature": 1.0} | settings_)
    for seed in range(8):
        check_filters(filter_logits, random_logits(seed, 4, 200), seen_tokens(seed, 4, 200)[0], s)


@pytest.mark.parametrize("vocab", few([49152], [128256]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [0, 1000])
@pytest.mark.parametrize("top_p", few([0.9], [0.1, 0.95, 0.999]))
def test_the_nucleus_is_transformers_token_for_token(vocab, dtype, top_k, top_p):
    """Check large vocabularies: in float32 rounding of the sum decides, in bfloat16 many tokens are equally likely."""
    logits = random_logits(1, 12, vocab).to(dtype).float()
    s = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
    check_filters(filter_logits, logits, torch.tensor([[0]] * 12), s)


@pytest.mark.parametrize("top_p", few([0.9], [0.95]))
def test_a_nucleus_summed_from_the_largest_would_be_noticed(top_p):
    logits = random_logits(1, 64, 49152, 2.0)
    probability, order = logits.softmax(-1).sort(-1, descending=True)
    kept = (probability.cumsum(-1) - probability < top_p).scatter(
        1, order, probability.cumsum(-1) - probability < top_p
    )
    ours = filter_logits(logits, stack([Sampling(temperature=1.0, top_p=top_p)] * 64, CPU)) > -torch.inf
    assert not torch.equal(ours, kept)
    assert (ours != kept).sum(-1).max() <= 1


def test_compiled_only_ties_and_the_token_at_the_edge_may_differ():
    logits = random_logits(2, 6, 4000).bfloat16().float()
    parameters = stack(
        [Sampling(temperature=1.0, top_k=k, top_p=p, min_p=0.001) for k in (0, 300) for p in (0.5, 0.9, 1)], CPU
    )
    eager = filter_logits(logits, parameters)
    compiled = torch.compile(filter_logits, fullgraph=True, dynamic=False)(logits, parameters)
    assert ((compiled > -torch.inf).sum(-1) - (eager > -torch.inf).sum(-1)).abs().max() <= 1
    for ours, other in zip(eager, compiled, strict=True):
        least, unlike = ours[ours > -torch.inf].min(), (ours > -torch.inf) != (other > -torch.inf)
        near = logits[0].new_tensor(0.02) + least  # the token at the edge is the next one in the order
        assert (torch.where(unlike, ours.maximum(other), least) <= near).all()


REQUESTS = st.builds(
    Sampling,
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.3, 3)),
    temperature=st.one_of(st.just(1.0), st.floats(0.05, 5)),
    top_k=st.one_of(st.just(0), st.integers(1, 400)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 0.9999)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1)),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 400), scale=st.floats(0.01, 20), s=REQUESTS)
def test_filters_combined_are_transformers_in_its_order(seed, vocab, scale, s):
    logits, (ids, _) = random_logits(seed, 3, vocab, scale), seen_tokens(seed, 3, vocab)
    check_filters(filter_logits, logits, ids, s)


def other_order(logits, p, seen):
    """Filter by probabilities before the temperature: a mutant."""
    kept = filter_logits(logits, p._replace(temperature=torch.ones_like(p.temperature)), seen) > -torch.inf
    only = p._replace(top_k=None, tail=None, min_p=None)
    return filter_logits(logits, only, seen).masked_fill(~kept, -torch.inf)


def penalty_divides_all(logits, p, seen):
    """Make negative logits of seen tokens larger: a mutant."""
    logits = torch.where(seen, logits / p.repetition_penalty[:, None], logits)
    return filter_logits(logits, p._replace(repetition_penalty=None), seen)


def top_p_without_the_token_that_crosses(logits, p, seen):
    """Drop the token with which the mass reaches p: a mutant."""
    out = filter_logits(logits, p, seen)
    least = torch.where(out > -torch.inf, out, torch.inf).argmin(-1, keepdim=True)
    return out.scatter(1, least, -torch.inf)


ALL_FILTERS = Sampling(repetition_penalty=1.3, temperature=2.0, top_k=60, top_p=0.8, min_p=0.02)


@pytest.mark.parametrize(
    ("mutant", "s"),
    [
        (other_order, ALL_FILTERS),
        (penalty_divides_all, Sampling(repetition_penalty=1.3, temperature=2.0)),
        (top_p_without_the_token_that_crosses, ALL_FILTERS),
    ],
)
def test_comparison_of_filters_catches(mutant, s):
    logits, (ids, _) = random_logits(1, 4, 200), seen_tokens(1, 4, 200)
    check_filters(filter_logits, logits, ids, s)
    with pytest.raises(AssertionError):
        check_filters(mutant, logits, ids, s)


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_row_is_filtered_as_if_it_were_alone(requests, seed):
    logits, (_, seen) = random_logits(seed, len(requests), 300), seen_tokens(seed, len(requests), 300)
    together = filter_logits(logits, stack(requests, CPU), seen)
    for i, request in enumerate(requests):
        alone = filter_logits(logits[i : i + 1], stack([request], CPU), seen[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("vocab", [1000, 32000, 128256])
def test_neutral_settings_change_nothing_beside_a_row_that_filters(vocab):
    """Check that a top_p of 1 keeps all tokens, though in float32 their mass reaches 1 long before the last one."""
    logits = random_logits(0, 2, vocab)
    filters = Sampling(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.5)
    seen = torch.ones(2, vocab, dtype=torch.bool)
    out = filter_logits(logits, stack([Sampling(temperature=1.0), filters], CPU), seen)
    assert torch.equal(out[0], logits[0])
    assert (out[1] > -torch.inf).sum() <= 5


def test_ties_at_the_edge_of_top_k_are_kept_as_in_transformers():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    check_filters(filter_logits, logits, torch.tensor([[0]]), Sampling(temperature=1.0, top_k=2))


def test_no_filter_ever_removes_the_most_likely_token():
    s = Sampling(temperature=0.3, top_k=1, top_p=1e-9, min_p=1.0)
    for logits in (random_logits(0, 4, 50), torch.zeros(4, 50), torch.eye(4, 50) * 1e4, -torch.eye(4, 50) * 1e4):
        kept = filter_logits(logits, stack([s] * 4, CPU)) > -torch.inf
        assert (kept & (logits == logits.amax(-1, keepdim=True))).any(-1).all()


def test_tokens_that_a_model_rules_out_stay_out():
    logits = random_logits(0, 4, 50)
    logits[:, 10:] = -torch.inf
    s = Sampling(temperature=2.0, top_k=30, top_p=0.99, min_p=1e-4, repetition_penalty=1.3, seed=0)
    out = filter_logits(logits, stack([s] * 4, CPU), torch.ones(4, 50, dtype=torch.bool))
    assert not out.isnan().any()
    assert (out[:, 10:] == -torch.inf).all()


# ---- greedy


def test_greedy_takes_the_largest_logit_alone_and_beside_sampled_rows():
    logits = random_logits(3, 6, 300)
    greedy = Sampling(top_k=40, top_p=0.3, min_p=0.2)
    assert torch.equal(draw(logits, [greedy] * 6), logits.argmax(-1))
    mixed = draw(logits, [greedy, Sampling(temperature=5.0, seed=1)] * 3)
    assert torch.equal(mixed[::2], logits[::2].argmax(-1))
    assert not torch.equal(mixed[1::2], logits[1::2].argmax(-1))


def test_greedy_takes_the_first_of_ties_whatever_a_neighbour_filters():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]] * 2)
    filters = {"top_k": 2, "top_p": 0.2, "min_p": 0.9}
    greedy, other = Sampling(**filters), Sampling(temperature=1.0, seed=0, **filters)
    assert draw(logits, [greedy, other])[0] == 1


def test_greedy_obeys_the_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, 0.0], [-0.5, -0.4, -0.45]])
    seen = torch.tensor([[True, False, False], [False, True, False]])
    tokens = draw(logits, [Sampling(repetition_penalty=1.5)] * 2, seen=seen)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1e-40, 1e-45, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(4, 8, 100)
    top = logits.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 0.02  # 20 temperatures at the warmest
    for extra in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5}):
        tokens = draw(logits, [Sampling(temperature=temperature, seed=i, **extra) for i in range(8)])
        assert torch.equal(tokens, logits.argmax(-1)), extra


def test_one_remaining_token_is_taken_whatever_the_noise():
    """Check a seed whose noise at token 8 is that of a uniform number that float32 rounds to 1."""
    logits = torch.zeros(1, 64)
    logits[0, 8] = 5.0
    assert draw(logits, [Sampling(temperature=1.0, top_k=1, seed=1049153)]).tolist() == [8]


# ---- distribution


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert expected.min() > 20
    return float(((counts - expected) ** 2 / expected).sum())


EIGHT = torch.tensor([[2.0, 1.5, 0.0, -0.5, 1.0, -2.0, 0.3, -1.0]])
DRAWS = 100_000
# chi-square with 7 degrees of freedom exceeds 40 once in a million; the seeds are fixed besides.
BOUND = 40.0
AXES = {
    "seeds": lambda n: (torch.arange(n), torch.zeros(n, dtype=torch.int64)),
    "steps": lambda n: (torch.full((n,), 7), torch.arange(n)),
    "both": lambda n: (torch.arange(n) % 317, torch.arange(n) // 317),
    "distant seeds": lambda n: (torch.arange(n) * 0x1234567890ABCDE, torch.full((n,), 3)),
}


def counts_of(axis: str, request: Sampling, logits: torch.Tensor = EIGHT) -> torch.Tensor:
    seeds, steps = AXES[axis](DRAWS)
    p = stack([request], CPU)
    p = type(p)(*(None if x is None else x.expand(DRAWS) for x in p))._replace(seed=seeds)
    tokens, _ = sample(logits.expand(DRAWS, -1), p, steps)
    return torch.bincount(tokens, minlength=logits.shape[-1])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("temperature", [0.8, 1.0, 3.0])
def test_samples_are_distributed_as_the_softmax(axis, temperature):
    counts = counts_of(axis, Sampling(temperature=temperature, seed=0))
    assert chi_square(counts, (EIGHT[0] / temperature).softmax(-1)) < BOUND


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.2}], ids=str)
def test_filtered_samples_are_distributed_as_the_softmax_of_what_is_left(axis, filters):
    request = Sampling(temperature=1.3, seed=0, **filters)
    left = filter_logits(EIGHT, stack([request], CPU))[0].softmax(-1)
    counts = counts_of(axis, request)
    assert counts[left == 0].sum() == 0
    assert 2 <= (left > 0).sum() < 8
    assert chi_square(counts[left > 0], left[left > 0]) < BOUND


def test_rare_tokens_come_as_often_as_they_should():
    logits = torch.tensor([[0.0, math.log(1e-3), math.log(3e-3)]])
    assert chi_square(counts_of("both", Sampling(temperature=1.0, seed=0), logits), logits[0].softmax(-1)) < BOUND


def test_the_largest_of_many_equal_logits_is_uniform():
    logits = torch.zeros(1, 4096)
    tokens = torch.cat([draw(logits.expand(512, -1), [Sampling(temperature=1.0, seed=0)] * 512, torch.arange(512))])
    assert chi_square(torch.bincount(tokens // 512, minlength=8), torch.full((8,), 1 / 8)) < BOUND


@pytest.mark.parametrize("mutant", ["uniform noise", "noise too small", "other temperature"])
def test_comparison_of_distributions_catches(mutant, monkeypatch):
    gumbel, temperature = sampling.gumbel, 1.0
    if mutant == "uniform noise":
        monkeypatch.setattr(sampling, "gumbel", lambda *a: (-(-gumbel(*a)).exp()).exp())
    elif mutant == "noise too small":
        monkeypatch.setattr(sampling, "gumbel", lambda *a: gumbel(*a) * 0.97)
    else:
        temperature = 1.03
    counts = counts_of("seeds", Sampling(temperature=temperature, seed=0))
    assert chi_square(counts, EIGHT[0].softmax(-1)) > BOUND


# ---- seeds


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), data=st.data())
def test_a_request_gives_the_same_token_whatever_it_is_batched_with(requests, data):
    n = len(requests)
    logits, (_, seen) = random_logits(n, n, 300), seen_tokens(n, n, 300)
    steps = torch.tensor(data.draw(st.lists(st.integers(0, 10**6), min_size=n, max_size=n)), dtype=torch.int32)
    tokens, logprobs = sample(logits, stack(requests, CPU), steps, seen)
    order = data.draw(st.permutations(range(n)))
    shuffled, _ = sample(logits[order], stack([requests[i] for i in order], CPU), steps[order], seen[order])
    assert torch.equal(shuffled, tokens[order])
    for i, request in enumerate(requests):
        row = slice(i, i + 1)
        token, logprob = sample(logits[row], stack([request], CPU), steps[row], seen[row])
        assert torch.equal(token, tokens[row])
        torch.testing.assert_close(logprob, logprobs[row])


def test_a_request_gives_the_same_token_beside_a_row_that_filters_a_large_vocabulary():
    plain = [Sampling(temperature=1.5, seed=seed) for seed in range(12)]
    logits = random_logits(0, 1, 128256).expand(13, -1)
    alone = draw(logits[:12], plain)
    beside = draw(logits, [*plain, Sampling(temperature=1.0, top_p=0.5, seed=0)])
    assert torch.equal(beside[:12], alone)


def test_the_same_seed_and_step_give_the_same_token_and_others_do_not():
    logits = random_logits(0, 1, 5000, 0.1).expand(64, -1)
    requests = [Sampling(temperature=1.0, seed=s) for s in range(64)]
    first = draw(logits, requests, 5)
    assert torch.equal(first, draw(logits, requests, 5))
    assert len(set(first.tolist())) > 55
    other_step = draw(logits, requests, 6)
    assert (first == other_step).sum() <= 2
    along = draw(logits, [requests[0]] * 64, torch.arange(64))
    assert len(set(along.tolist())) > 55


@pytest.mark.parametrize("seed", [0, -1, 1, 2**63 - 1, -(2**63)])
def test_every_64_bit_seed_is_usable(seed):
    logits = torch.zeros(200, 50)
    tokens = draw(logits, [Sampling(temperature=1.0, seed=seed)] * 200, torch.arange(200))
    assert len(set(tokens.tolist())) > 35


def test_without_a_seed_every_request_draws_its_own():
    logits = torch.zeros(64, 5000)
    tokens = draw(logits, [Sampling(temperature=1.0)] * 64)
    assert len(set(tokens.tolist())) > 50
    assert not torch.equal(tokens, draw(logits, [Sampling(temperature=1.0)] * 64))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawing_a_seed_leaves_torchs_random_state_alone(temperature):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(torch.zeros(2, 8), [Sampling(temperature=temperature)] * 2)
    assert torch.equal(torch.rand(3), expected)


# ---- log-probabilities


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_log_probability_is_the_models_own_before_any_filter(requests, seed):
    logits, (_, seen) = random_logits(seed, len(requests), 100), seen_tokens(seed, len(requests), 100)
    token, logprob = sample(logits, stack(requests, CPU), torch.zeros(len(requests), dtype=torch.int32), seen)
    assert token.dtype == torch.int64
    assert logprob.dtype == torch.float32
    expected = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


def test_log_probability_of_bfloat16_logits_is_computed_in_float32():
    logits = random_logits(0, 3, 1000).bfloat16()
    token, logprob = sample(logits, stack([Sampling()] * 3, CPU), torch.zeros(3))
    expected = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


# ---- values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", v) for v in (-0.1, math.nan, math.inf, -math.inf, True, "hot")),
        *(("top_k", v) for v in (-1, 1.5, math.nan, math.inf, -math.inf)),
        *(("top_p", v) for v in (-0.1, 1.0001, math.nan, math.inf, True)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan, math.inf)),
        *(("repetition_penalty", v) for v in (0, -1, math.nan, math.inf, 1e39, 1e-50)),
        *(("seed", v) for v in (2**63, -(2**63) - 1, 10**30, math.nan, 1.5, True)),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        Sampling(**{name: value})
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_too_large_for_a_float_is_refused_in_a_short_line():
    with pytest.raises(ValueError, match=r"^temperature must be .*, not 10000") as caught:
        Sampling(temperature=10**400)
    assert len(str(caught.value)) < 150


def test_values_at_the_ends_of_their_ranges_are_taken():
    Sampling(temperature=0, top_k=0, top_p=1, min_p=0, seed=-(2**63))
    Sampling(temperature=1, top_p=0)
    Sampling(temperature=100, top_k=10**9, top_p=1e-9, min_p=1, repetition_penalty=1e-3, seed=2**63 - 1)


# ---- what a checkpoint recommends


def test_recommended_is_what_the_checkpoint_says():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2)
    expected = Sampling(temperature=0.6, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2)
    assert Sampling.recommended(config) == expected


def test_recommended_without_do_sample_is_greedy_with_the_penalty_alone():
    config = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9, repetition_penalty=1.2)
    assert Sampling.recommended(config) == Sampling(repetition_penalty=1.2)
    assert Sampling.recommended(GenerationConfig()) == Sampling()


def test_recommended_sampling_alone_is_a_temperature_of_one_and_the_50_most_likely_as_in_transformers():
    assert Sampling.recommended(GenerationConfig(do_sample=True)) == Sampling(temperature=1.0, top_k=50)
    assert Sampling.recommended(GenerationConfig(do_sample=True, top_k=0)) == Sampling(temperature=1.0)
    defaults = transformers.GenerationConfig._get_default_generation_params()
    assert (defaults["temperature"], defaults["top_k"], defaults["top_p"]) == (1.0, 50, 1.0)


def test_recommended_gives_way_to_what_the_caller_says():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert Sampling.recommended(config, temperature=0.0, seed=3) == Sampling(top_k=50, top_p=0.9, seed=3)
    assert Sampling.recommended(config, temperature=None, top_p=None) == Sampling(temperature=0.6, top_k=50, top_p=0.9)
    assert Sampling.recommended(config, top_k=0) == Sampling(temperature=0.6, top_p=0.9)
    assert Sampling.recommended(GenerationConfig(), temperature=1.0, top_k=0) == Sampling(temperature=1.0)


def test_recommended_values_outside_their_range_are_refused_with_their_source():
    config = GenerationConfig(do_sample=True, top_p=1.5)
    with pytest.raises(
        ValueError, match=r"^generation_config.json: top_p must be from 0 to 1, not 1.5; set top_p yourself$"
    ):
        Sampling.recommended(config, temperature=0.5)
    assert Sampling.recommended(config, top_p=0.5).top_p == 0.5
    with pytest.raises(ValueError, match=r"^top_p must be from 0 to 1, not 3.0$"):
        Sampling.recommended(config, top_p=3.0)
    with pytest.raises(ValueError, match=r"^generation_config.json: repetition_penalty must be a positive number"):
        Sampling.recommended(GenerationConfig(repetition_penalty=-1.0))
