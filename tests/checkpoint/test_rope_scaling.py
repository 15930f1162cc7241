"""RopeParameters: the frequencies of every scaling type, and the rotary keys of config.json read as by transformers."""

import dataclasses
import warnings

import pytest
import torch
from config_helpers import assert_same_mathematics, read, reference_of
from families import LLAMA, LLAMA_31_ROPE
from rope_helpers import (
    CASES,
    PARAMETERS,
    frequencies_by_hand,
    frequencies_of,
    parameters_of,
    reference_rope,
    scale_by_hand,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_flex import LlamaConfig
from llama_flex.checkpoint import rope_scaling
from llama_flex.checkpoint.rope_scaling import RopeParameters

# ---- frequencies, and mistakes in them that the checks must notice


def wrong_theta(parameters: RopeParameters, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return frequencies of a base that is off by a millionth."""
    theta = parameters.rope_theta * (1 + 1e-6)
    return frequencies_of(dataclasses.replace(parameters, rope_theta=theta), head_dim, dtype)


def ignored_scaling(parameters: RopeParameters, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return frequencies of the type "default"."""
    return RopeParameters(rope_theta=parameters.rope_theta).inverse_frequencies(head_dim, dtype=dtype)


def inverted_ramp(parameters: RopeParameters, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return frequencies that are stretched more where they should be less, between those kept and those stretched."""
    plain, right = ignored_scaling(parameters, head_dim, dtype), frequencies_of(parameters, head_dim, dtype)
    between = (right != plain) & (right != plain / parameters.factor)
    return torch.where(between, plain + plain / parameters.factor - right, right)


def check_frequencies_have_the_references_bits(make, parameters: dict, head_dim: int) -> None:
    """Check frequencies in float32 against transformers'."""
    ours = make(RopeParameters(**parameters), head_dim)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, reference_rope(parameters, head_dim).inv_freq)


def check_frequencies_are_the_definition(make, parameters: dict, head_dim: int) -> None:
    """Check frequencies in float64 and float32 against their definition."""
    by_hand = torch.tensor(frequencies_by_hand(parameters, head_dim), dtype=torch.float64)
    # In float32 the blend of llama3 cancels some digits, in the reference as here.
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 4e-6)):
        ours = make(RopeParameters(**parameters), head_dim, dtype)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), by_hand, rtol=rtol, atol=0)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_frequencies_have_the_references_bits_in_float32(name, head_dim):
    check_frequencies_have_the_references_bits(frequencies_of, parameters_of(name, head_dim), head_dim)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_frequencies_are_the_definition_in_python_arithmetic(name, head_dim):
    check_frequencies_are_the_definition(frequencies_of, parameters_of(name, head_dim), head_dim)


def mutated(*types: str) -> list[str]:
    """Return the names of the parameters of these types."""
    return [name for name in PARAMETERS if PARAMETERS[name]["rope_type"] in types]


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        *((wrong_theta, name) for name in PARAMETERS),
        *((ignored_scaling, name) for name in mutated("linear", "llama3", "yarn", "longrope")),
        *((inverted_ramp, name) for name in mutated("llama3", "yarn")),
    ],
)
def test_checks_of_frequencies_catch(mutant, name):
    for check in (check_frequencies_have_the_references_bits, check_frequencies_are_the_definition):
        with pytest.raises(AssertionError):
            check(mutant, parameters_of(name, 128), 128)


def test_every_supported_type_is_tested_here():
    assert {p["rope_type"] for p in PARAMETERS.values()} == set(rope_scaling._TYPES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_cosine_and_sine_are_scaled_as_defined(name):
    parameters = parameters_of(name, 64)
    assert RopeParameters(**parameters).attention_scale == pytest.approx(scale_by_hand(parameters), rel=1e-12)
    assert RopeParameters(**parameters).attention_scale == reference_rope(parameters, 64).attention_scaling


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1, 1.0, 1.5])
@pytest.mark.parametrize("trained", [1, 2])
def test_a_longrope_that_stretches_nothing_scales_nothing_whatever_it_was_trained_for(factor, trained):
    parameters = parameters_of("longrope", 64) | {"factor": factor, "original_max_position_embeddings": trained}
    if factor > 1 == trained:
        with pytest.raises(ZeroDivisionError):
            reference_rope(parameters, 64)
        with pytest.raises(ValueError, match=r"original_max_position_embeddings above 1, .* found 1$"):
            RopeParameters(**parameters)
        parameters["attention_factor"] = 1.2
    assert RopeParameters(**parameters).attention_scale == reference_rope(parameters, 64).attention_scaling


# ---- keys of config.json


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("scaling", [{"factor": 4.0, "rope_type": "linear"}, LLAMA_31_ROPE], ids=["linear", "llama3"])
def test_every_spelling_of_the_rotary_keys_is_the_same_config(type_key, scaling):
    values = {k: v for k, v in scaling.items() if k != "rope_type"} | {type_key: scaling["rope_type"]}
    spellings = [
        {"rope_theta": 500000.0, "rope_scaling": values},
        {"rope_parameters": values | {"rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_parameters": values},
        {"rope_theta": 1.5, "rope_parameters": values | {"rope_theta": 500000.0}},
        {"rope_scaling": values | {"rope_theta": 500000.0}, "rope_parameters": {"rope_type": "default"}},
    ]
    configs = [read(LLAMA | {"max_position_embeddings": 131072} | spelling) for spelling in spellings]
    assert configs == [configs[0]] * len(spellings)
    for spelling in spellings:
        assert_same_mathematics(configs[0], reference_of({"max_position_embeddings": 131072} | spelling))


def test_both_type_keys_at_once_mean_rope_type_as_in_transformers():
    raw = {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}
    with pytest.warns(UserWarning, match="factor"):
        config = LlamaConfig.from_dict(raw)
    assert config.rope_parameters.rope_type == "default"
    assert reference_of(raw).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("beside", [None, 4096], ids=["inside", "beside"])
def test_original_length_of_llama3_is_found_where_transformers_finds_it(beside):
    scaling = {k: v for k, v in LLAMA_31_ROPE.items() if k != "original_max_position_embeddings"}
    raw = {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 65536}
    if beside:
        raw["original_max_position_embeddings"] = beside
    config = read(raw)
    assert config.rope_parameters.original_max_position_embeddings == (beside or 65536)
    assert_same_mathematics(config, reference_of(raw))


UNSET = {
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale_all_dim"), (None, 0, 0.0)),
    "mscale": (None, 0, 0.0, -0.3),
    "attention_factor": (None, 0, 0.0, -0.5),
    "truncate": (None, 0, 1, True, False),
    "factor": (None,),
}


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *(("yarn", key, value) for key in UNSET for value in UNSET[key]),
        *(("longrope", key, value) for key in ("attention_factor", "factor") for value in UNSET[key]),
    ],
)
def test_an_optional_rotary_key_given_as_null_or_0_means_what_it_means_to_transformers(kind, key, value):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 512}
    if kind == "yarn":
        scaling |= {"mscale": 0.7, "mscale_all_dim": 1.0}
    else:
        scaling |= {"short_factor": [1.5] * 16, "long_factor": [3.0] * 16}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 2048}
    raw = sizes | {"rope_scaling": scaling | {key: value}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = LlamaConfig.from_dict(raw), LlamaRotaryEmbedding(reference_of(raw))
    rope = ours.rope_parameters
    assert torch.equal(rope.inverse_frequencies(ours.head_dim), theirs.inv_freq)
    assert rope.attention_scale == theirs.attention_scaling
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = LlamaConfig.from_dict(ours.to_dict()).rope_parameters
    assert (again.attention_scale, again.truncate) == (rope.attention_scale, rope.truncate)


def test_frequencies_of_yarn_depend_on_truncate():
    """Check that the comparison above can tell the values of `truncate` apart."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    kept, cut = (read({"rope_scaling": scaling | {"truncate": t}, "head_dim": 32}) for t in (None, True))
    assert kept.rope_parameters.truncate is False
    frequencies = [c.rope_parameters.inverse_frequencies(32) for c in (kept, cut)]
    assert (frequencies[0] - frequencies[1]).abs().max() > 1e-3


@pytest.mark.parametrize("low", [4.0, 5.0, 100.0])
def test_bounds_of_llama3_in_the_wrong_order_are_warned_of_and_mean_what_they_mean_to_transformers(low):
    raw = {"rope_scaling": LLAMA_31_ROPE | {"low_freq_factor": low}, "max_position_embeddings": 65536, "head_dim": 64}
    with pytest.warns(UserWarning, match=rf"low_freq_factor={low} is not below high_freq_factor=4.0"):
        ours = LlamaConfig.from_dict(raw)
    expected = LlamaRotaryEmbedding(reference_of(raw)).inv_freq
    assert torch.equal(ours.rope_parameters.inverse_frequencies(64), expected)
