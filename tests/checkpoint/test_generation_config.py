"""generation_config.json: what is read, what is written back, what is ignored with a warning, and what is refused."""

import dataclasses
import warnings

import pytest
import transformers
from config_helpers import write

from llama_flex import GenerationConfig
from llama_flex.checkpoint.config_rules import ConfigError


def generation(folder, raw) -> GenerationConfig:
    """Return what is read of a generation_config.json."""
    return GenerationConfig.from_pretrained(write(folder, raw, "generation_config.json"))


def test_generation_config_is_honoured(tmp_path):
    raw = {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 77,
        "transformers_version": "4.42.3",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = generation(tmp_path, raw)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.do_sample is True
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"):
        assert getattr(config, name) == raw[name]


def test_without_generation_config_nothing_is_recommended(tmp_path):
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config == GenerationConfig()
    assert config.eos_token_ids == ()
    assert config.do_sample is False


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(eos_token_id=5),
        GenerationConfig(eos_token_id=0),
        GenerationConfig(eos_token_id=(0, 3)),
        GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0),
        GenerationConfig(repetition_penalty=1.0, temperature=0.0, max_new_tokens=9),
    ],
    ids=repr,
)
def test_generation_config_round_trip(config, tmp_path):
    written = config.to_dict()
    assert not [key for key in written if key.startswith("_")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation(tmp_path, written) == config
    reference = transformers.GenerationConfig.from_pretrained(tmp_path)
    for f in dataclasses.fields(config):
        value = None if f.name == "other" else getattr(config, f.name)
        if value not in (None, False) or value == 0:
            expected = list(value) if isinstance(value, tuple) else value
            # transformers leaves do_sample unset where the file does not say
            assert getattr(reference, f.name) == expected or (f.name, value) == ("do_sample", False), f.name


def test_generation_config_written_by_the_newest_transformers_is_read_without_warning(tmp_path):
    transformers.GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[3, 4]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.do_sample, config.temperature, config.eos_token_ids) == (True, 0.5, (3, 4))


def test_a_generation_config_survives_a_round_trip(tmp_path):
    raw = {
        "_from_model_config": True,
        "bos_token_id": 1,
        "do_sample": False,
        "eos_token_id": [2, 3],
        "max_length": 4096,
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_k": None,
        "transformers_version": "4.42.3",
        "mine": {"a": [1, None]},
    }
    config = generation(tmp_path, raw)
    assert config.to_dict() == raw
    assert dataclasses.replace(config, temperature=None, top_k=3).to_dict() == {
        key: value for key, value in (raw | {"top_k": 3}).items() if key != "temperature"
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("bad_words_ids", [[3]]),
        ("guidance_scale", 1.5),
        ("top_h", 0.4),
        ("stop_strings", ["###"]),
        ("exponential_decay_length_penalty", [10, 1.2]),
        ("max_time", 2.0),
        ("force_words_ids", [[[3]]]),
        ("constraints", [1]),
        ("watermarking_config", {"bias": 2.5}),
        ("encoder_repetition_penalty", 1.2),
        ("min_length", 9),
        ("token_healing", True),
        ("remove_invalid_values", True),
        ("num_return_sequences", 3),
        ("cache_implementation", "quantized"),
        ("forced_eos_token_id", 2),
        ("begin_suppress_tokens", [1]),
        ("sequence_bias", [[[8], 3.0]]),
        ("dola_layers", "low"),
        ("diversity_penalty", 0.5),
    ],
)
def test_generation_settings_that_cannot_be_honoured_are_named_in_a_warning(key, value, tmp_path):
    with pytest.warns(UserWarning, match=key):
        generation(tmp_path, {key: value})


def test_every_generation_setting_of_transformers_is_known_to_matter_or_not():
    """Check that no setting is unknown: of a new one somebody has to find out whether it changes the text."""
    settings_ = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    ours = {f.name for f in dataclasses.fields(GenerationConfig)} | GenerationConfig.NEUTRAL.keys()
    of_beams = {"early_stopping", "length_penalty"}
    of_the_results = {name for name in settings_ if name.startswith("output_")} | {"return_dict_in_generate"}
    computing_the_same = {
        *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"),
        *("continuous_batching_config", "low_memory", "renormalize_logits", "use_mtp"),
    }
    of_drafts = {name for name in settings_ if "assistant" in name} | {
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "target_lookbehind", "speculation_type")
    }
    notes = {"transformers_version", "pad_token_id", "bos_token_id", "decoder_start_token_id"}
    assert settings_ - ours - of_beams - of_the_results - computing_the_same - of_drafts - notes == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", value) for value in (-1, "x", [1, "x"], 1.5, {"a": 1})),
        ("temperature", "hot"),
        ("top_k", [4]),
        ("top_p", {"p": 0.5}),
        ("max_new_tokens", "many"),
        ("max_new_tokens", -3),
        ("max_new_tokens", True),
        ("max_length", 0),
        ("typical_p", [0.5]),
        ("no_repeat_ngram_size", "two"),
        ("min_new_tokens", {}),
        ("suppress_tokens", ["x"]),
        ("do_sample", "true"),
        ("do_sample", 1),
    ],
)
def test_malformed_generation_settings_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(ConfigError, match=key) as caught:
        generation(tmp_path, {"do_sample": True} | {key: value})
    assert "generation_config.json" in str(caught.value)
