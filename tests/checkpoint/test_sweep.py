"""Random config.json and generation_config.json files: what this package makes of each, and what transformers does.

For every file that transformers loads, logits and filtered scores are the same here, or the file is refused by name, or
a warning names what is ignored. `SWEEP_EXAMPLES=2000 python -m pytest tests/checkpoint/test_sweep.py` tries more files.
"""

import dataclasses
import json
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import transformers
from helpers import few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flex import Engine, GenerationConfig, Llama, LlamaConfig, Sampling
from llama_flex.checkpoint.architectures import ARCHITECTURES
from llama_flex.logits.parameters import stack
from llama_flex.logits.processors import RequestProcessors, unpack_bits
from llama_flex.sampling import filter_logits

# How many files are drawn: some in every run, many in exhaustive ones, the same each time unless a number is given.
GIVEN = os.environ.get("SWEEP_EXAMPLES")
EXAMPLES = [int(GIVEN)] if GIVEN else few([20], [120])
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ABSENT = object()
LENGTH, VOCAB = 40, 64
LAYER_TYPES = "full_attention", "full_attention", "sliding_attention", "attention", "chunked_attention"


def sweep(examples: int, *strategies: st.SearchStrategy):
    """Decorate a property to check over so many examples."""

    def decorate(function):
        return settings(
            max_examples=examples, deadline=None, derandomize=GIVEN is None, suppress_health_check=list(HealthCheck)
        )(given(*strategies)(function))

    return decorate


def some(draw, values: dict[str, st.SearchStrategy]) -> dict:
    """Draw an object with some of these keys."""
    drawn = {key: draw(value) for key, value in values.items()}
    return {key: value for key, value in drawn.items() if value is not ABSENT}


def maybe(*strategies: st.SearchStrategy) -> st.SearchStrategy:
    """Return a strategy that is absent as often as all the others together."""
    return st.just(ABSENT) | st.one_of(*strategies)


null, zero = st.none(), st.sampled_from([0, 0.0])


@st.composite
def ropes(draw, pairs: int) -> dict:
    """Draw a rotary type with its own keys, each absent, null, 0 or a number, and sometimes one of another type's."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    factor, trained = st.sampled_from([1, 1.0, 2.5, 4, 8.0]), st.sampled_from([16, 32, 64.0, 200])
    factors = st.lists(st.sampled_from([0.5, 1.0, 1.5, 7.0]), min_size=pairs, max_size=pairs)
    optional = {
        "attention_factor": maybe(null, zero, st.sampled_from([0.5, 1.3, -1.0])),
        "factor": maybe(null, zero, factor, factor),
    }
    keys = {
        "default": {},
        "linear": {"factor": st.one_of(zero, factor, factor, factor)},
        "dynamic": {"factor": st.one_of(null, zero, factor, factor, factor)},
        "yarn": {
            **optional,
            "beta_fast": maybe(null, zero, st.sampled_from([16, 32.0, 0.5])),
            "beta_slow": maybe(null, zero, st.sampled_from([1, 2.0])),
            "mscale": maybe(null, zero, st.sampled_from([0.7, 1, -0.3])),
            "mscale_all_dim": maybe(null, zero, st.sampled_from([1.0, 0.4])),
            "truncate": maybe(null, zero, st.booleans(), st.booleans()),
            "original_max_position_embeddings": maybe(trained, trained, null),
        },
        "longrope": {
            **optional,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": maybe(trained, trained, null),
        },
        "llama3": {
            "factor": factor,
            "low_freq_factor": st.sampled_from([1, 1.0, 4.0, 0.5]),
            "high_freq_factor": st.sampled_from([4.0, 4, 1.0, 8.0]),
            "original_max_position_embeddings": maybe(trained, trained, null),
        },
    }
    rope = {draw(st.sampled_from(["rope_type", "type"])): kind} | some(draw, keys[kind])
    rope |= some(draw, {"rope_theta": maybe(st.sampled_from([10000.0, 500000, 100.0]))})
    if draw(st.integers(0, 9)) == 0:
        rope |= some(draw, {"beta_fast": maybe(factor), "partial_rotary_factor": maybe(null, st.just(1.0))})
    return rope


@st.composite
def configs(draw) -> dict:
    """Draw a config.json of a tiny model."""
    kv, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 16]))
    kind = draw(st.sampled_from(list(ARCHITECTURES)))
    raw = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": kv * group * 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": kv * group,
        "num_key_value_heads": draw(st.just(kv) if group > 1 else st.sampled_from([kv, None])),
        "max_position_embeddings": draw(st.sampled_from([24, 48, 128])),
    }
    raw |= some(
        draw,
        {
            "architectures": maybe(st.just([ARCHITECTURES[kind].name])),
            "head_dim": st.just(head_dim) if head_dim != 8 else maybe(null, st.just(8)),
            "rms_norm_eps": maybe(st.sampled_from([1e-5, 1e-6, 0.5, 0.0, 1.0])),
            "tie_word_embeddings": maybe(st.booleans()),
            "hidden_act": maybe(st.sampled_from(["silu", "swish"] * 4 + ["gelu"])),
            "attention_bias": maybe(st.booleans()),
            "mlp_bias": maybe(st.booleans()),
            "is_causal": maybe(*[st.booleans()] * 8, null, zero),
            "sliding_window": maybe(null) if kind == "llama" else maybe(null, st.sampled_from([1, 7, 100])),
            "layer_types": st.just(ABSENT)
            | maybe(null, st.lists(st.sampled_from(LAYER_TYPES), min_size=2, max_size=2)),
            "eos_token_id": maybe(null, st.integers(0, 5), st.lists(st.integers(0, 5), max_size=2)),
            "pad_token_id": maybe(null, st.integers(0, 5), st.just(-1)),
            "rope_theta": maybe(st.sampled_from([10000.0, 500000])),
            "original_max_position_embeddings": st.just(ABSENT) | st.just(ABSENT) | maybe(st.sampled_from([16, 64])),
            "attention_chunk_size": st.just(ABSENT) | maybe(null, null, null, st.just(8)),
            "use_cache": maybe(st.booleans()),
            "pretraining_tp": maybe(st.sampled_from([1, 2])),
            "temperature": maybe(st.just(0.5)),
        },
    )
    if kind.startswith("qwen"):
        raw |= some(
            draw,
            {
                "use_sliding_window": maybe(st.booleans(), st.just(True), null),
                "max_window_layers": maybe(st.sampled_from([0, 1, 2, 1.0]), null),
            },
        )
    spelling = draw(st.sampled_from([None, "rope_scaling", "rope_parameters"]))
    if spelling:
        raw[spelling] = draw(ropes(head_dim // 2))
    return raw


def quietly(function, *args):
    """Call a function without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def reference_of(folder: Path, raw: dict) -> transformers.PreTrainedModel | None:
    """Return transformers' model of a config, None if it has none; with large weights, so that every token matters."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.25)
        model.save_pretrained(folder)
    except Exception:  # noqa: BLE001  - whatever it raises for a config that it cannot take
        return None
    finally:
        (folder / "config.json").write_text(json.dumps(raw))
    return model


# What is refused though transformers loads it: it computes what nobody can have meant, or depends on how it is run.
REFUSED = (
    "needs a positive number",  # a factor or a length of 0
    "hidden_act",
    "attention_chunk_size",
    "needs a rope_theta above 1",
    "is_causal must be true or false",
    "layer_types has 'sliding_attention', but sliding_window is null",
    "layer_types must name 'full_attention' for each of 2 layers",  # of LLaMA
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_config_means_what_it_means_to_transformers(examples):
    sweep(examples, configs())(check_config)()


@torch.no_grad()
def check_config(raw: dict) -> None:
    """Check that a model of ours gives transformers' logits, unless its config.json is refused for a known reason."""
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory() as name:
        folder = Path(name)
        reference = quietly(reference_of, folder, raw)
        try:
            expected = None if reference is None else quietly(lambda: reference(ids, use_cache=False).logits)
        except Exception:  # noqa: BLE001
            expected = None
        model, refusal = None, ""
        try:
            model = quietly(lambda: Llama.from_pretrained(folder, device="cpu"))
        except ValueError as error:  # of nothing else
            refusal = str(error)
    assert "\n" not in refusal
    if expected is None or not expected.isfinite().all() or any(why in refusal for why in REFUSED):
        return
    assert model is not None, refusal
    ours = quietly(lambda: model(ids))
    # Eager attention and this package's differ by the rounding of float32 alone, which grows with what is normalised.
    assert (ours - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max())
    assert quietly(LlamaConfig.from_dict, model.config.to_dict()) == model.config
    kept = {key for key, value in raw.items() if value is not None and "rope" not in key and "original" not in key}
    assert kept <= model.config.to_dict().keys()


def test_the_sweep_would_notice_a_key_that_is_not_read(tmp_path):
    raw = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "is_causal": False,
    }
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = reference_of(tmp_path, raw)
        expected = reference(ids).logits
        (tmp_path / "config.json").write_text(json.dumps(raw | {"is_causal": True}))
        assert (Llama.from_pretrained(tmp_path, device="cpu")(ids) - expected).abs().max() > 0.1


# ---- generation_config.json

TINY = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
)


@st.composite
def generation_configs(draw) -> dict:
    """Draw a generation_config.json."""
    number, whole = st.floats(0.05, 1.0), st.integers(0, 70)
    ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True)
    return some(
        draw,
        {
            "do_sample": maybe(st.just(True), st.just(True), st.booleans(), null),
            "temperature": maybe(null, st.floats(0.1, 3.0)),
            "top_k": maybe(null, whole),
            "top_p": maybe(null, number, number),
            "min_p": maybe(null, number),
            "repetition_penalty": maybe(null, st.floats(0.5, 2.0)),
            "eos_token_id": maybe(null, st.integers(0, 5), ids),
            "pad_token_id": maybe(st.integers(0, 5)),
            "bos_token_id": maybe(null, st.integers(0, 5)),
            "max_length": maybe(st.integers(30, 5000)),
            "max_new_tokens": maybe(st.integers(1, 50)),
            "transformers_version": maybe(st.just("4.42.3")),
            "a_key_of_ones_own": maybe(st.just({"deep": [1]})),
            **{
                key: st.just(ABSENT) | st.just(ABSENT) | st.just(ABSENT) | maybe(null, *map(st.just, values))
                for key, values in {
                    "num_beams": [1],
                    "no_repeat_ngram_size": [0, 2],
                    "encoder_repetition_penalty": [1.0, 1.5],
                    "typical_p": [1.0, 0.5],
                    "epsilon_cutoff": [0.0, 0.02],
                    "eta_cutoff": [0.0, 0.02],
                    "top_h": [0.4],
                    "min_length": [0, 30],
                    "min_new_tokens": [0, 5],
                    "bad_words_ids": [[[3]]],
                    "suppress_tokens": [[], [4]],
                    "begin_suppress_tokens": [[], [5]],
                    "forced_bos_token_id": [6],
                    "forced_eos_token_id": [7],
                    "sequence_bias": [[[[8], 3.0]]],
                    "exponential_decay_length_penalty": [[2, 1.5]],
                    "renormalize_logits": [True],
                    "early_stopping": [True],
                    "length_penalty": [2.0],
                    "output_scores": [True],
                }.items()
            },
        },
    )


def processed_by_transformers(folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | None:
    """Return what transformers' processors make of logits, as in `generate`; None if it refuses the settings."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder)
        config, _ = TINY._prepare_generation_config(config)
        TINY._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=torch.device("cpu"))
        config.max_length = config.max_length or 10**6
        processors = TINY._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            device="cpu",
            model_kwargs={"attention_mask": torch.ones_like(ids)},
        )
        return processors(ids, logits.clone())
    except Exception:  # noqa: BLE001
        return None


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_generation_config_filters_as_in_transformers_or_warns(examples):
    strategies = generation_configs(), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16])
    sweep(examples, *strategies)(check_generation_config)()


def filtered(logits: torch.Tensor, ids: torch.Tensor, s: Sampling, stop_ids: tuple[int, ...]) -> torch.Tensor:
    """Filter the logits `[1, V]` of a first new token after ids `[1, T]`, with the parameters that engines add, too."""
    plain = dataclasses.replace(s, no_repeat_ngram_size=0, min_new_tokens=0, banned_tokens=())
    forbidden = torch.zeros(1, VOCAB, dtype=torch.bool)
    forbidden[:, [*s.banned_tokens, *(stop_ids if s.min_new_tokens else ())]] = True
    if s.no_repeat_ngram_size:
        bits = np.full((1, VOCAB // 32 + 1), -1, np.int32)
        RequestProcessors(ids[0].tolist(), ngram_size=s.no_repeat_ngram_size).complete([], bits[0])
        forbidden |= ~unpack_bits(torch.from_numpy(bits))[:, :VOCAB]
    seen = torch.zeros(1, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    return filter_logits(logits, stack([plain], torch.device("cpu"))._replace(forbidden=forbidden), seen)


def check_generation_config(raw: dict, seed: int, dtype: torch.dtype) -> None:
    """Check that scores are filtered as by transformers, unless a warning says that a setting is ignored."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (1, 9), generator=draws)
    logits = (3 * torch.randn(1, VOCAB, generator=draws)).to(dtype).float()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "generation_config.json").write_text(json.dumps(raw))
        expected = quietly(processed_by_transformers, folder, ids, logits)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = GenerationConfig.from_pretrained(folder)
    assert config.to_dict() == raw
    sampling = Sampling.recommended(config)
    ours = filtered(logits, ids, sampling, config.eos_token_ids or (TINY.config.eos_token_id,))
    if expected is None or any("not supported and ignored" in str(warning.message) for warning in caught):
        return
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.71}])
def test_the_sweep_would_notice_another_setting(wrong, tmp_path):
    raw = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    ids, logits = torch.zeros(1, 3, dtype=torch.long), torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = processed_by_transformers(tmp_path, ids, logits)
    recommended = Sampling.recommended(GenerationConfig.from_pretrained(tmp_path))
    ours, others = (
        filter_logits(logits, stack([sampling], torch.device("cpu")))
        for sampling in (recommended, Sampling(**{**recommended.__dict__, **wrong}))
    )
    assert torch.equal(ours, expected)
    assert not torch.equal(others, expected)


@pytest.mark.parametrize("length", [1, 11, 12, 13])
def test_max_length_leaves_as_many_new_tokens_as_in_transformers_or_none(length, tmp_path):
    TINY.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_length": 12}')
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    engine = Engine(Llama.from_pretrained(tmp_path, device="cpu"))
    ids = [5] * length
    try:
        expected = reference.generate(torch.tensor([ids]))[0, length:].tolist()
    except ValueError:
        with pytest.raises(ValueError, match="max_length of"):
            engine.generate([ids])
    else:
        assert engine.generate([ids], stop_token_ids=())[0].tokens == expected  # as there, where no id ends a text
