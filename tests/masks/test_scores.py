"""Score functions: against biases in plain Python, against FlexAttention, and whatever they capture or return."""

import math

import pytest
import torch
from attn_gym import mods as gym
from helpers import TINY, compiled_forward, few
from torch.nn.attention.flex_attention import flex_attention

from llama_flex import ScoreMod, masks, scores
from llama_flex.tokens import Token, Tokens, take

H, T = 4, 40
HEADS = TINY["gqa"]["num_attention_heads"]
POSITIONS = [[3 * i for i in range(T)], [i % 11 for i in range(T)]]  # with gaps; starting anew every 11 tokens
SEGMENTS = [[i // 9 for i in range(T)], [i // 13 - 1 for i in range(T)]]  # without and with generated tokens (-1)
SCORES = torch.randn(2, H, T, T, generator=torch.Generator().manual_seed(0)) * 3


def some_tokens() -> Tokens:
    """Return two rows of tokens with the positions and segments above."""
    index = torch.arange(T, dtype=torch.int32).expand(2, -1)
    return Tokens(index, torch.tensor(POSITIONS, dtype=torch.int32), torch.tensor(SEGMENTS, dtype=torch.int32))


def applied(score_mod: ScoreMod, scored: torch.Tensor = SCORES) -> torch.Tensor:
    """Change the scores of these tokens with each other."""
    tokens = some_tokens()
    return score_mod.dense(scored, tokens, tokens)


def check(score_mod: ScoreMod, rule) -> None:
    """Compare a score function to a rule over plain numbers: the score, row b, head h, query i, key j."""
    given = SCORES.tolist()
    expected = [
        [[[rule(given[b][h][i][j], b, h, i, j) for j in range(T)] for i in range(T)] for h in range(H)]
        for b in range(2)
    ]
    torch.testing.assert_close(applied(score_mod), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def normal(*shape: int) -> torch.Tensor:
    """Draw normal numbers, the same ones each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def paper_slopes(heads: int) -> list[float]:
    """Compute ALiBi's slopes as https://github.com/ofirpress/attention_with_linear_biases does in get_slopes."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return paper_slopes(lower) + paper_slopes(2 * lower)[0::2][: heads - lower]


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_has_the_slopes_of_the_paper(heads):
    token = Tokens(*(torch.tensor([[x]], dtype=torch.int32) for x in (1, 1, 0)))
    before = Tokens(*(torch.zeros(1, 1, dtype=torch.int32) for _ in range(3)))
    penalty = scores.alibi(heads).dense(torch.zeros(1, heads, 1, 1), token, before)
    torch.testing.assert_close(-penalty.flatten(), torch.tensor(paper_slopes(heads)), rtol=1e-6, atol=0)


def test_alibi_is_a_penalty_by_distance_of_positions():
    slopes = paper_slopes(H)
    rule = lambda s, b, h, i, j: s - slopes[h] * abs(POSITIONS[b][i] - POSITIONS[b][j])  # noqa: E731
    check(scores.alibi(H), rule)
    check(scores.alibi(torch.tensor(slopes)), rule)


@pytest.mark.parametrize("cap", [0.5, 30])
def test_softcap(cap):
    check(scores.softcap(cap), lambda s, b, h, i, j: cap * math.tanh(s / cap))
    assert applied(scores.softcap(cap), SCORES * 1000).abs().max() <= cap


@pytest.mark.parametrize("reach", [0, 2, 60, 200])
def test_relative_bias_has_an_entry_for_each_distance_and_its_ends_for_all_beyond(reach):
    for table in (normal(2 * reach + 1), normal(H, 2 * reach + 1)):
        entries = table.expand(H, -1).tolist()

        def rule(s, b, h, i, j, entries=entries):
            distance = POSITIONS[b][i] - POSITIONS[b][j]
            return s + entries[h][max(-reach, min(reach, distance)) + reach]

        check(scores.relative_bias(table), rule)


@pytest.mark.parametrize("count", [1, 20, 200])
def test_temperature_is_by_position_and_the_last_for_all_beyond(count):
    for factors in (normal(count), normal(2, count)):
        each = factors.expand(2, -1).tolist()
        check(scores.temperature(factors), lambda s, b, h, i, j, e=each: s * e[b][min(POSITIONS[b][i], count - 1)])


@pytest.mark.parametrize("count", [1, 3, 16])
def test_segment_weights_are_what_generated_tokens_see(count):
    for weights in (normal(count), normal(2, count)):
        each = weights.expand(2, -1).tolist()

        def rule(s, b, h, i, j, each=each):
            q, kv = SEGMENTS[b][i], SEGMENTS[b][j]
            return s + (each[b][kv] if q == masks.GENERATED and 0 <= kv < count else 0)

        check(scores.segment_weights(weights), rule)
        assert not torch.equal(applied(scores.segment_weights(weights)), SCORES)


def test_a_weight_of_two_is_a_segment_given_twice():
    twice = scores.segment_weights(torch.tensor([0.0, math.log(2)]))
    q = Tokens(*(torch.tensor([[x]]) for x in (3, 3, masks.GENERATED)))
    kv = Tokens(torch.arange(3)[None], torch.arange(3)[None], torch.tensor([[0, 1, 2]]))
    found = twice.dense(torch.zeros(1, 1, 1, 3), q, kv).softmax(-1)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.25, 0.5, 0.25]))


def test_score_functions_are_applied_from_left_to_right():
    cap, bias = scores.softcap(1.0), scores.alibi(H)
    slopes = paper_slopes(H)
    check(cap >> bias, lambda s, b, h, i, j: math.tanh(s) - slopes[h] * abs(POSITIONS[b][i] - POSITIONS[b][j]))
    check(bias >> cap, lambda s, b, h, i, j: math.tanh(s - slopes[h] * abs(POSITIONS[b][i] - POSITIONS[b][j])))
    three = cap >> bias >> ScoreMod(lambda score, q, kv: score * 2, "double")
    assert repr(three) == "((softcap(1.0) >> alibi(4)) >> double)"
    torch.testing.assert_close(applied(three), 2 * applied(cap >> bias))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scores.alibi(0), "number of heads, at least 1, not 0"),
        (lambda: scores.alibi(-2), "not -2"),
        (lambda: scores.softcap(0), "positive number, not 0"),
        (lambda: scores.softcap(-1.5), "not -1.5"),
        (lambda: scores.softcap(math.nan), "not nan"),
        (lambda: scores.relative_bias(torch.zeros(4)), r"not \[4\]"),
        (lambda: scores.relative_bias(torch.zeros(2, 0)), r"not \[2, 0\]"),
        (lambda: scores.relative_bias(torch.zeros(1, 1, 3)), r"not \[1, 1, 3\]"),
        (lambda: scores.temperature(torch.ones(3).int()), r"not torch.int32 \[3\]"),
        (lambda: scores.temperature(torch.tensor(2.0)), r"not torch.float32 \[\]"),
        (lambda: scores.segment_weights(torch.ones(1, 1, 3)), r"not torch.float32 \[1, 1, 3\]"),
        (lambda: scores.segment_weights(torch.ones(3).long()), r"not torch.int64 \[3\]"),
        (lambda: ScoreMod(3), "needs a function of a query and a key token, found 3"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("answer", [1.0, None, True, torch.ones((), dtype=torch.int32), torch.ones(()) > 0])
def test_an_answer_that_is_no_score_is_named(answer, tiny_pair):
    kind = answer.dtype if isinstance(answer, torch.Tensor) else type(answer).__name__
    score_mod = ScoreMod(lambda score, q, kv: answer, "odd")
    with pytest.raises(ValueError, match=f"score function odd returned {kind}; a score function must return the score"):
        applied(score_mod)
    with pytest.raises(ValueError, match="score function odd returned"):
        tiny_pair("gqa")[1](torch.tensor([[1, 2]]), score_mod=score_mod)


@pytest.mark.parametrize(
    "function",
    few(
        [lambda s, q, kv: by_head[q.head]],
        [lambda s, q, kv: (kv.index % 5).float(), lambda s, q, kv: s * 0],
    ),
)
@torch.no_grad()
def test_an_answer_that_does_not_look_at_scores_is_for_all(tiny_pair, function):
    """Then attention depends on places alone, or is the same for all keys."""
    _, model = tiny_pair("gqa")
    ids = torch.randint(512, (2, 130), generator=torch.Generator().manual_seed(0))
    dense, eager = (model(ids, score_mod=ScoreMod(function), backend=way) for way in ("dense", "flex"))
    torch.testing.assert_close(eager, dense, rtol=0, atol=ATOL)
    assert (dense - model(ids)).abs().max() > 1e-2


def test_an_answer_of_several_numbers_is_named(tiny_pair):
    _, model = tiny_pair("gqa")
    with pytest.raises(ValueError, match=r"returned \[3\] for one query and one key, not one value"):
        model(torch.tensor([[1, 2]]), score_mod=ScoreMod(lambda s, q, kv: s + torch.zeros(3)), backend="dense")


def test_answers_keep_the_precision_of_scores():
    doubled = ScoreMod(lambda score, q, kv: score.double() * 2)
    assert applied(doubled).dtype == torch.float32
    assert repr(ScoreMod(lambda score, q, kv: score)) == "<lambda>"


def test_captured_tensors_follow_the_device():
    table = normal(H, 9)

    class Bias:
        def __init__(self) -> None:
            self.table = table

        def __call__(self, score, q, kv):
            return score + self.table[q.head, 0]

    meta = Tokens(*(x.to("meta") for x in some_tokens()))
    for score_mod in (
        scores.alibi(H),
        scores.relative_bias(table),
        scores.temperature(normal(2, 9)),
        scores.segment_weights(normal(2, 9)),
        scores.softcap(2.0) >> scores.alibi(H),
        ScoreMod(Bias()),
        ScoreMod.from_score_mod(lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx % 9]),
    ):
        moved = score_mod.to("meta")
        assert moved.dense(SCORES.to("meta"), meta, meta).device.type == "meta"
        assert repr(moved) == repr(score_mod)
        assert score_mod.to("cpu") is score_mod
        assert applied(score_mod).device.type == "cpu"
    cap = scores.softcap(2.0)
    assert cap.to("meta") is cap  # it captures nothing


def ring_of(nodes: int) -> torch.Tensor:
    """Return the adjacency matrices of two rings."""
    step = torch.eye(nodes).roll(1, 0)
    return (step + step.T).expand(2, -1, -1)


N = 130
DISTANCES = gym.shortest_path_distances(ring_of(N), 20)
EDGE_TYPES = torch.randint(3, (2, N, N), generator=torch.Generator().manual_seed(2))
GYM = {
    "alibi": gym.generate_alibi_bias(HEADS),
    "tanh_softcap": gym.generate_tanh_softcap(5),
    "sandwich": gym.generate_sandwich_bias(HEADS, N, d_bar=16),
    "graphormer, spatial": gym.generate_graphormer_spatial_bias(normal(HEADS, 22), DISTANCES),
    "graphormer, edges": gym.generate_graphormer_edge_bias(
        normal(HEADS, 2, 3), *gym.shortest_path_edge_types(ring_of(N), EDGE_TYPES, 2)
    ),
    "activation": gym.generate_activation_score_mod(torch.nn.functional.gelu),
    "multi-head latent attention": gym.generate_mla_rope_score_mod(normal(2, HEADS, N, 8), normal(2, 1, N, 8), HEADS),
}  # all but the approximate tanh, which is an instruction of CUDA devices


@pytest.mark.parametrize("name", few(["alibi"], [name for name in GYM if name != "alibi"]))
def test_score_mods_of_attn_gym_mean_what_flex_attention_means(name):
    q, k, v = (torch.randn(2, HEADS, N, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = flex_attention(q, k, v, score_mod=GYM[name])
    tokens = Tokens.arriving(N, batch=2)
    scored = q @ k.transpose(-1, -2) / 4
    changed = ScoreMod.from_score_mod(GYM[name]).dense(scored, tokens, tokens)
    torch.testing.assert_close(changed.softmax(-1) @ v, expected, rtol=0, atol=5e-6)
    assert ((scored.softmax(-1) @ v) - expected).abs().max() > 1e-2
    assert repr(ScoreMod.from_score_mod(GYM[name])) == GYM[name].__name__


# Twice what the reference (eager, float32) differs by between 140 tokens at once and one by one: 7.3e-5.
ATOL = 1.5e-4


@pytest.mark.parametrize("name", few(["alibi"], [name for name in GYM if name != "alibi"]))
@torch.no_grad()
def test_score_mods_of_attn_gym_hold_in_cached_decoding(tiny_pair, name):
    _, model = tiny_pair("gqa")
    score_mod = ScoreMod.from_score_mod(GYM[name])
    ids = torch.randint(512, (2, N), generator=torch.Generator().manual_seed(0))
    full = model(ids, score_mod=score_mod, backend="dense")
    cache = model.new_cache(2, N)
    parts = [model(part, score_mod=score_mod, cache=cache) for part in ids.split([100, 28, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=ATOL)


by_head, by_distance = normal(HEADS), normal(128)


def indexing(score, q, kv):
    return score + by_head[q.head] + by_distance[(q.index - kv.index).clamp(0, 127)] * by_head[1]


def taking(score: torch.Tensor, q: Token, kv: Token) -> torch.Tensor:
    return score + take(by_head, q.head) + take(by_distance, (q.index - kv.index).clamp(0, 127))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("both", marks=pytest.mark.exhaustive),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("indexing", "taking", *GYM)),
    ],
)
@torch.no_grad()
def test_compiled_equals_dense_however_tables_are_read(tiny_pair, name):
    _, model = tiny_pair("gqa")
    ids = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(0))
    own = {"indexing": ScoreMod(indexing), "taking": ScoreMod(taking)}
    if name == "both":
        score_mod = list(own.values())
    else:
        score_mod = own[name] if name in own else ScoreMod.from_score_mod(GYM[name])
    found = compiled_forward(model)(ids, score_mod=score_mod)
    torch.testing.assert_close(found, model(ids, score_mod=score_mod, backend="dense"), rtol=0, atol=ATOL)
    assert (found - model(ids, backend="dense")).abs().max() > 1e-2
