"""Rotary embedding: rotations against transformers' to the bit, and against plain complex numbers; narrow dtypes."""

import cmath

import pytest
import torch
from helpers import TINY
from rope_helpers import (
    CASES,
    CONTEXT,
    LLAMA3,
    PARAMETERS,
    frequencies_by_hand,
    frequencies_of,
    parameters_of,
    reference_rope,
    scale_by_hand,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama_flex import Engine, Llama, LlamaConfig, Tokens, rope
from llama_flex.checkpoint.rope_scaling import RopeParameters
from llama_flex.rope import RotaryEmbedding

# The start, the powers of two around which a narrow dtype loses its grip, and the longest context of Llama 3.
POSITIONS = [0, 1, 2, 3, 127, 128, 129, 255, 256, 257, 258, 259, 1000, 2047, 8191, 8192, 32768, 65537, 131071, 131072]


def tokens_at(positions: torch.Tensor) -> Tokens:
    """Return tokens `[B, T]` at these positions."""
    index = torch.arange(positions.shape[1], dtype=torch.int32).repeat(len(positions), 1)
    return Tokens(index, positions.to(torch.int32), torch.zeros_like(index))


def rotate_by_hand(x: torch.Tensor, positions: list[int], frequencies: list[float]) -> torch.Tensor:
    """Rotate x `[B, H, T, D]`: each pair (d, d + D/2) is a complex number, turned by position * frequency."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x, dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        for d, f in enumerate(frequencies):
            turned = complex(x[b, h, t, d], x[b, h, t, d + half]) * cmath.exp(1j * positions[t] * f)
            out[b, h, t, d], out[b, h, t, d + half] = turned.real, turned.imag
    return out


def rotated(x: torch.Tensor, positions: list[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate x, whose rows all have these positions."""
    return rope.apply_rotary_emb(x, *rope.cos_sin(torch.tensor([positions]).expand(x.shape[0], -1), inv_freq))


def random_heads(head_dim: int, dtype: torch.dtype = torch.float32, tokens: int = len(POSITIONS)) -> torch.Tensor:
    """Return queries or keys `[1, 2, T, D]`."""
    return torch.randn(1, 2, tokens, head_dim, generator=torch.Generator().manual_seed(head_dim), dtype=dtype)


# ---- rotation, and mistakes in it that the checks must notice


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbours (d, d + 1)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def backwards(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the wrong way."""
    return rope.apply_rotary_emb(x, cos, -sin)


def check_rotation_has_the_references_bits(rotate, parameters: dict, head_dim: int) -> None:
    """Check cosine, sine and rotated queries and keys in float32 against transformers'."""
    module = reference_rope(parameters, head_dim)
    q, k = random_heads(head_dim), random_heads(head_dim).flip(0, 1)
    position = torch.tensor([POSITIONS])
    ref_cos, ref_sin = module(q, position)
    cos, sin = RotaryEmbedding(RopeParameters(**parameters), head_dim, CONTEXT)(tokens_at(position))
    for ours, theirs in ((cos, ref_cos), (sin, ref_sin)):
        assert ours.shape == (1, 1, len(POSITIONS), head_dim // 2)
        assert torch.equal(torch.cat((ours, ours), -1)[:, 0], theirs)
    for x, theirs in zip((q, k), apply_rotary_pos_emb(q, k, ref_cos, ref_sin), strict=True):
        assert torch.equal(rotate(x, cos, sin), theirs)


def check_rotation_turns_complex_numbers(rotate, parameters: dict, head_dim: int) -> None:
    """Check a rotation in float64 against its definition with complex numbers."""
    x = random_heads(head_dim, torch.float64)
    by_hand = rotate_by_hand(x, POSITIONS, frequencies_by_hand(parameters, head_dim))
    inv_freq = frequencies_of(RopeParameters(**parameters), head_dim, torch.float64)
    ours = rotate(x, *rope.cos_sin(torch.tensor([POSITIONS]), inv_freq))
    # A frequency's relative error of a few ulps becomes an absolute error of the angle: 131072 * 4 * 2.2e-16.
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_cos_sin_and_rotation_have_the_references_bits_in_float32(name, head_dim):
    check_rotation_has_the_references_bits(rope.apply_rotary_emb, parameters_of(name, head_dim), head_dim)


@pytest.mark.parametrize(("name", "head_dim"), [(name, d) for name in PARAMETERS for d in (4, 16, 64)])
def test_rotation_turns_complex_numbers_in_float64(name, head_dim):
    check_rotation_turns_complex_numbers(rope.apply_rotary_emb, parameters_of(name, head_dim), head_dim)


@pytest.mark.parametrize("name", PARAMETERS)
def test_rotation_in_float32_strays_no_further_than_rounded_frequencies_allow(name):
    x = random_heads(64, torch.float64)
    frequencies = frequencies_by_hand(parameters_of(name, 64), 64)
    by_hand = rotate_by_hand(x, POSITIONS, frequencies)
    ours = rotated(x.float(), POSITIONS, frequencies_of(RopeParameters(**parameters_of(name, 64)), 64)).double()
    angle = torch.tensor(POSITIONS)[:, None] * torch.tensor(frequencies)  # [T, D/2]
    bound = (angle * 8 + 8).repeat(1, 2) * 2.0**-24 * x.abs().max()
    assert ((ours - by_hand).abs() <= bound).all()


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("mutant", [interleaved, backwards])
def test_checks_of_rotation_catch(mutant, name):
    for check in (check_rotation_has_the_references_bits, check_rotation_turns_complex_numbers):
        with pytest.raises(AssertionError):
            check(mutant, parameters_of(name, 16), 16)


@pytest.mark.parametrize("name", PARAMETERS)
def test_scores_depend_on_the_distance_alone(name):
    inv_freq = frequencies_of(RopeParameters(**parameters_of(name, 64)), 64, torch.float64)
    q, k = random_heads(64, torch.float64, 1), random_heads(64, torch.float64, 2)[:, :, 1:]
    scores = [
        (rotated(q, [start + 17], inv_freq) * rotated(k, [start], inv_freq)).sum(-1) for start in (0, 5, 900, 131000)
    ]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=0, atol=1e-8)
    further = (rotated(q, [18], inv_freq) * rotated(k, [0], inv_freq)).sum(-1)
    assert (further - scores[0]).abs().min() > 1e-4


def test_rows_of_a_batch_have_their_own_positions():
    inv_freq = RopeParameters().inverse_frequencies(32)
    position = torch.tensor([[5, 6, 7], [0, 100, 7]])
    x = random_heads(32, tokens=3).expand(2, -1, -1, -1)
    both = rope.apply_rotary_emb(x, *rope.cos_sin(position, inv_freq))
    for row in range(2):
        alone = rope.apply_rotary_emb(x[row : row + 1], *rope.cos_sin(position[row : row + 1], inv_freq))
        assert torch.equal(both[row : row + 1], alone)
    assert torch.equal(both[0, :, 2], both[1, :, 2])
    assert not torch.equal(both[0, :, 1], both[1, :, 1])


def test_positions_may_be_of_any_integer_dtype():
    inv_freq = RopeParameters().inverse_frequencies(32)
    for dtype in (torch.int16, torch.int32, torch.int64):
        cos, _ = rope.cos_sin(torch.tensor([[0, 1, 32767]], dtype=dtype), inv_freq)
        assert torch.equal(cos, rope.cos_sin(torch.tensor([[0, 1, 32767]]), inv_freq)[0])


# ---- lengths at which frequencies change


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 6000, 40000])
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_long_sequence_is_rotated_by_its_own_length(name, length):
    """Check lengths before, at and beyond the trained context, in one batch with a short sequence."""
    parameters = parameters_of(name, 64) | ({"original_max_position_embeddings": 2048} if name == "longrope" else {})
    rotary = RotaryEmbedding(RopeParameters(**parameters), 64, 2048)
    positions = torch.arange(length - 1, length + 2).clamp(min=0)
    tokens = tokens_at(torch.stack((positions, torch.tensor([5, 6, 7]))))
    tokens.index[:, 1:] = -1  # padding, whose positions must not count
    cos, sin = rotary(tokens)
    for row in range(2):
        alone = tokens.position[row : row + 1, :1]
        expected = reference_rope(parameters, 64, 2048)(torch.zeros(1), alone)
        for ours, theirs in zip((cos, sin), expected, strict=True):
            assert torch.equal(ours[row, :, :1].repeat(1, 1, 2), theirs)
    by_hand = torch.tensor(frequencies_by_hand(parameters, 64, length, 2048)) * (length - 1)
    scaled = torch.stack((by_hand.cos(), by_hand.sin())) * scale_by_hand(parameters)
    torch.testing.assert_close(torch.stack((cos[0, 0, 0], sin[0, 0, 0])), scaled, rtol=0, atol=length * 4e-7)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_cache_ends_where_its_keys_would_have_to_turn(name):
    """Check each way to reach that length, and that without a cache there is no limit."""
    parameters = parameters_of(name, 32) | ({"original_max_position_embeddings": 64} if name == "longrope" else {})
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1}
    context = 64 if name == "dynamic" else 512
    rope_parameters = RopeParameters(**parameters)
    model = Llama(
        LlamaConfig(
            **sizes,
            num_attention_heads=4,
            head_dim=32,
            max_position_embeddings=context,
            rope_parameters=rope_parameters,
        )
    )
    model.requires_grad_(False)
    ids = torch.arange(65)[None] % 64
    cache = model.new_cache(1, 128)
    model(ids[:, :63], cache=cache)
    model(ids[:, 63:64], cache=cache)
    reason = f"beyond 64 tokens rope_type '{name}' re-rotates every key"
    for positions in (None, torch.tensor([[64]])):
        with pytest.raises(ValueError, match=reason):
            model(ids[:, 64:], cache=cache, positions=positions)
    assert model(ids[:, 64:], cache=cache, positions=torch.tensor([[9]])).isfinite().all()
    with pytest.raises(ValueError, match=f"unbounded, but {reason}"):
        model.new_rolling_cache(1, 16)
    with pytest.raises(ValueError, match="exceed the context of 64 tokens"):
        Engine(model).generate([[1] * 60], max_new_tokens=5)
    assert model(ids).isfinite().all()


def test_a_longrope_cache_may_be_longer_than_a_context_that_is_shorter_than_the_trained_length():
    parameters = parameters_of("longrope", 32) | {"original_max_position_embeddings": 64}
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1}
    rope_parameters = RopeParameters(**parameters)
    model = Llama(
        LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=48, rope_parameters=rope_parameters)
    )
    model.requires_grad_(False)
    ids, cache = torch.arange(64)[None], model.new_cache(1, 128)
    with pytest.warns(UserWarning, match="50 tokens exceed the 48"):
        parts = [model(ids[:, :50], cache=cache), model(ids[:, 50:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="beyond 64 tokens"):
        model(ids[:, :1], cache=cache)


# ---- narrow dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_queries_are_rotated_in_float32_and_rounded_once(dtype):
    x = random_heads(64, dtype)
    inv_freq = RopeParameters(**LLAMA3).inverse_frequencies(64)
    ours = rotated(x, POSITIONS, inv_freq)
    assert ours.dtype == dtype
    assert torch.equal(ours, rotated(x.float(), POSITIONS, inv_freq).to(dtype))
    exact = rotate_by_hand(x, POSITIONS, frequencies_by_hand(LLAMA3, 64))
    cos, sin = reference_rope(LLAMA3, 64)(x, torch.tensor([POSITIONS]))
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert (ours - exact).abs().mean() < (theirs - exact).abs().mean()


def test_bfloat16_frequencies_would_lose_the_positions():
    """Check the trap that the float32 buffer avoids: in bfloat16, neighbours beyond 256 are one position."""
    right = RopeParameters().inverse_frequencies(64)
    position = torch.tensor([[256, 257, 1000, 1001]])
    cos, _ = rope.cos_sin(position, right)
    assert (cos[0, 0, 0] != cos[0, 0, 1]).any()
    assert (cos[0, 0, 2] != cos[0, 0, 3]).any()
    trapped, _ = rope.cos_sin(position, right.bfloat16())
    assert torch.equal(trapped[0, 0, 0], trapped[0, 0, 1])
    assert torch.equal(trapped[0, 0, 2], trapped[0, 0, 3])


def tiny_model(parameters: dict | None = None) -> Llama:
    """Return a random model with these rope_parameters, default those of Llama 3."""
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, **TINY["gqa"], rope_parameters=RopeParameters(**parameters or LLAMA3))
    torch.manual_seed(0)
    return Llama(config)


CASTS = {
    "bfloat16": (lambda m: m.bfloat16(), torch.float32),
    "half": (lambda m: m.half(), torch.float32),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.float32),
    "bfloat16 and back": (lambda m: m.bfloat16().float(), torch.float32),
    "double and back": (lambda m: m.double().float(), torch.float32),
    "bfloat16 to double": (lambda m: m.bfloat16().double(), torch.float64),
    "through meta": (lambda m: m.to("meta").to_empty(device="cpu"), torch.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_casting_the_model_never_rounds_its_frequencies(name):
    cast, dtype = CASTS[name]
    model = cast(tiny_model())
    head_dim = model.config.head_dim
    assert model.rotary.inv_freq.dtype == dtype
    assert torch.equal(model.rotary.inv_freq, RopeParameters(**LLAMA3).inverse_frequencies(head_dim, dtype=dtype))
    by_hand = torch.tensor(frequencies_by_hand(LLAMA3, head_dim), dtype=torch.float64)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(model.rotary.inv_freq.double(), by_hand, rtol=rtol, atol=0)


def test_the_frequencies_are_no_part_of_the_weights():
    assert "rotary.inv_freq" in dict(tiny_model().named_buffers())
    assert not [name for name in tiny_model().state_dict() if "inv_freq" in name]


def test_a_bfloat16_model_tells_far_positions_apart():
    model = tiny_model({"rope_type": "default", "rope_theta": 10000.0}).bfloat16()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        near = model(ids, positions=torch.arange(8)[None] + torch.tensor([0] * 7 + [993]), backend="dense")
        next_one = model(ids, positions=torch.arange(8)[None] + torch.tensor([0] * 7 + [994]), backend="dense")
        shifted = model(ids, positions=torch.arange(8)[None] + 4096, backend="dense")
        plain = model(ids, backend="dense")
    assert not torch.equal(near[:, -1], next_one[:, -1])
    # A shift of all positions changes nothing but rounding.
    torch.testing.assert_close(shifted.float(), plain.float(), rtol=0.05, atol=0.05)
