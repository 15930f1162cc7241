"""Every family of docs/coverage.md: its config.json is read, and a tiny twin computed, as transformers does it."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from families import CONTEXT, FAMILIES, SHAPES, TRAINED, WINDOW, tiny
from helpers import ROOT, compiled_forward, few

from llama_flex import Engine, Llama, LlamaConfig, fuse, masks
from llama_flex.engine.explain import bytes_per_step
from llama_flex.kernels import cpu
from llama_flex.rope import RotaryEmbedding

LENGTHS = (1, 127, 128, 129, 300)
FAR = 40_000  # beyond 32,768
# The families that every run of the tests computes: each rotary type, a sliding window, tied embeddings, groups of
# several sizes, a head_dim that is padded.
FIRST = (
    *("Llama 1 7B", "Llama 3.2 3B", "OpenLLaMA 3B", "Vicuna 13B v1.5 16k", "Llama with dynamic NTK"),
    *("YaRN Llama 2 7B 64k", "Llama with LongRoPE", "Mistral 7B v0.1"),
    *("Qwen2 0.5B", "Qwen2 with a window above", "Qwen3 0.6B", "Qwen3 with a window in some layers"),
)
COMPUTED = few(FIRST, [name for name in FAMILIES if name not in FIRST])


def token_ids(vocab_size: int, length: int, batch: int = 2) -> torch.Tensor:
    """Return random ids, others for each length."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits_of(reference, ids: torch.Tensor, start: int = 0, attention: str = "eager") -> torch.Tensor:
    """Return the reference's logits of tokens at positions from `start` on.

    Its rotary embedding remembers the lengths that it has seen, so it gets a new one.
    """
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)
    reference.set_attn_implementation(attention)
    positions = torch.arange(start, start + ids.shape[1])[None]
    logits = reference(ids, position_ids=positions).logits
    reference.set_attn_implementation("eager")
    return logits


def budget(reference, ids: torch.Tensor, start: int = 0) -> float:
    """Return twice the difference between the reference's own kernels, at least that of a few roundings.

    Those kernels share their products. Products of few rows are not computed as there: then it is at least twice the
    reference's distance from float64.
    """
    eager, others = logits_of(reference, ids, start), [logits_of(reference, ids, start, "sdpa")]
    if ids.numel() <= cpu.ROWS:
        others.append(logits_of(copy.deepcopy(reference).double(), ids, start))
    spread = max((eager - other).abs().max().item() for other in others)
    return 2 * max(spread, 4 * torch.finfo(eager.dtype).eps * eager.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_its_config_is_read_as_the_reference_reads_it(name, tmp_path):
    raw = FAMILIES[name][1]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    reference = transformers.AutoConfig.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LlamaConfig.from_pretrained(tmp_path)
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    ):
        assert getattr(ours, key) == getattr(reference, key), key
    derived = reference.hidden_size // reference.num_attention_heads
    assert ours.head_dim == getattr(reference, "head_dim", derived)
    assert ours.sliding_window == getattr(reference, "sliding_window", None)
    types = getattr(reference, "layer_types", None) or ["sliding_attention"] * ours.num_hidden_layers
    assert list(ours.windows) == [ours.sliding_window if kind == "sliding_attention" else None for kind in types]
    rotary = RotaryEmbedding(ours.rope_parameters, ours.head_dim, ours.max_position_embeddings)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(reference)
    assert torch.equal(rotary.inv_freq, module.inv_freq)
    assert ours.rope_parameters.attention_scale == module.attention_scaling
    assert LlamaConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_logits_equal_the_reference(twins, name):
    """Check lengths before, at and beyond the trained one and the window, and far positions."""
    reference, model = twins(name)
    for length, start in (*((n, 0) for n in LENGTHS), (CONTEXT + 100, 0), (129, FAR)):
        ids = token_ids(model.config.vocab_size, length)
        expected = logits_of(reference, ids, start)
        positions = torch.arange(start, start + length).expand(2, -1)
        for backend in ("flex", "dense"):
            found = model(ids, positions=positions, backend=backend)
            torch.testing.assert_close(found, expected, rtol=0, atol=budget(reference, ids, start))


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_chunks_steps_and_ragged_batches_equal_the_reference(twins, name):
    reference, model = twins(name)
    length = min(180, model.context)
    ids = token_ids(model.config.vocab_size, length)
    expected, atol = logits_of(reference, ids), 2 * budget(reference, ids)
    cache = model.new_cache(2, length)
    parts = [model(ids[:, i : i + 60], cache=cache) for i in range(0, length - 4, 60)]
    if sum(p.shape[1] for p in parts) > length - 4:
        cache.truncate(length - 4)
    parts = [torch.cat(parts, 1)[:, : length - 4]]
    parts += [model(ids[:, i : i + 1], cache=cache) for i in range(length - 4, length)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=atol)
    lengths = torch.tensor([length, 50])
    ragged = model(ids, lengths=lengths)
    torch.testing.assert_close(ragged[0], expected[0], rtol=0, atol=atol)
    torch.testing.assert_close(ragged[1, :50], logits_of(reference, ids[1:, :50])[0], rtol=0, atol=atol)


@pytest.mark.parametrize("name", few([n for n in SHAPES if n != "groups of 32"], ["groups of 32"]))
@torch.no_grad()
def test_logits_of_every_shape_equal_the_reference(twins, name):
    reference, model = twins(name)
    ids = token_ids(model.config.vocab_size, 140)
    expected, atol = logits_of(reference, ids), 2 * budget(reference, ids)
    for backend in ("flex", "dense"):
        torch.testing.assert_close(model(ids, backend=backend), expected, rtol=0, atol=atol)
    cache = model.new_cache(2, 140)
    parts = [model(part, cache=cache) for part in ids.split([100, 38, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", few(["Llama 3.2 3B", "YaRN Llama 2 7B 64k"], ["Mistral 7B v0.1"]))
@torch.no_grad()
def test_in_16_bits_it_is_no_further_from_float64_than_the_reference(twins, tmp_path, name, dtype):
    """Check a float32 checkpoint loaded in 16 bits; the truth is computed with the same rounded weights in float64."""
    reference, model = twins(name)
    model.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    theirs = copy.deepcopy(reference).to(dtype)
    ids = token_ids(model.config.vocab_size, 200)
    truth = copy.deepcopy(ours).double()(ids, backend="dense")
    error = (ours(ids).double() - truth).abs().mean()
    assert error <= 1.1 * (logits_of(theirs, ids).double() - truth).abs().mean()
    assert error > 0


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(twins, name):
    reference, model = twins(name)
    prompt = token_ids(model.config.vocab_size, TRAINED - 20, 1)[0].tolist()
    (found,) = Engine(model).generate([prompt], max_new_tokens=12, stop_token_ids=())
    logits = logits_of(reference, torch.tensor([prompt + found.tokens]))[0, len(prompt) - 1 : -1]
    assert found.tokens == logits.argmax(-1).tolist()


COMPILED = few(
    ["Mistral 7B v0.1", "Qwen3 with a window in some layers"],
    ["YaRN Llama 2 7B 64k", "Llama with dynamic NTK", "Yi 34B", "Qwen2 0.5B"],
)
COMPILED += [pytest.param(name, marks=pytest.mark.slow) for name in ("head_dim 80", "odd sizes")]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_chunks_and_steps_are_no_further_from_float64_than_the_reference(twins, name):
    """Compare both with float64: the reference's own spread is that of its attention alone, while products of a chunk
    round in other places than those of a whole prompt."""
    reference, model = twins(name)
    ids = token_ids(model.config.vocab_size, 260)
    forward = compiled_forward(model)
    with torch.no_grad():
        cache = model.new_cache(2, 260)
        parts = [forward(ids[:, :128], cache=cache), forward(ids[:, 128:256], cache=cache)]
        parts += [forward(ids[:, i : i + 1], cache=cache) for i in range(256, 260)]
    exact = logits_of(copy.deepcopy(reference).double(), ids)
    error, theirs = ((x - exact).abs() for x in (torch.cat(parts, 1), logits_of(reference, ids)))
    assert error.mean() <= 1.1 * theirs.mean()
    assert error.max() <= 1.5 * theirs.max()  # the largest of 130,000: 0.5 to 1.3 times theirs


FAULTS = {
    "Mistral 7B v0.1": {"sliding_window": WINDOW + 1},
    "Mistral 7B v0.2": {"rope_theta": 1000001.0},
    "YaRN Llama 2 7B 64k": {
        "rope_scaling": {"type": "yarn", "factor": 16.1, "original_max_position_embeddings": TRAINED}
    },
    "Llama with dynamic NTK": {"rope_scaling": {"type": "dynamic", "factor": 2.01}},
    "Vicuna 13B v1.5 16k": {"rope_scaling": {"type": "linear", "factor": 4.001}},
    "Llama with LongRoPE": {"original_max_position_embeddings": CONTEXT + 100},
    "Llama 3.1 8B": {"rope_scaling": {"rope_type": "default"}},
    "OpenLLaMA 3B": {"rms_norm_eps": 1e-5},
    "Qwen2 with a window above": {"max_window_layers": 0},
    "Qwen3 with a window in some layers": {"layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("name", FAULTS)
@torch.no_grad()
def test_a_config_that_is_slightly_wrong_is_caught(twins, name):
    reference, model = twins(name)
    wrong = Llama(LlamaConfig.from_dict(tiny(name) | FAULTS[name])).eval()
    wrong.load_state_dict(model.state_dict())
    ids = token_ids(model.config.vocab_size, CONTEXT + 100)
    assert (wrong(ids) - logits_of(reference, ids)).abs().max() > 3 * budget(reference, ids)


@pytest.mark.parametrize(("name", "part"), [("Qwen2 0.5B", "bias"), ("Qwen3 0.6B", "q_norm"), ("Qwen3 0.6B", "k_norm")])
@torch.no_grad()
def test_a_part_that_is_left_out_is_caught(twins, name, part):
    reference, model = twins(name)
    wrong = copy.deepcopy(model)
    for block in wrong.blocks():
        setattr(block.attention.qkv if part == "bias" else block.attention, part, None)
    ids = token_ids(model.config.vocab_size, 140)
    assert (wrong(ids) - logits_of(reference, ids)).abs().max() > 3 * budget(reference, ids)


@torch.no_grad()
def test_a_sliding_window_is_the_default_and_a_mask_takes_its_place(twins):
    _, model = twins("Mistral 7B v0.1")
    ids = token_ids(model.config.vocab_size, 200)
    by_default = model(ids)
    assert torch.equal(by_default, model(ids, mask=masks.sliding_window(WINDOW)))
    assert not torch.allclose(by_default, model(ids, mask=masks.causal()))
    assert torch.equal(by_default[:, :WINDOW], model(ids, mask=masks.causal())[:, :WINDOW])


@pytest.mark.parametrize(
    ("name", "of_layer"),
    [
        ("Mistral 7B v0.1", [masks.sliding_window(WINDOW)] * 2),
        ("Qwen3 with a window in some layers", [masks.sliding_window(WINDOW), masks.causal()]),
    ],
)
@torch.no_grad()
def test_fused_prompts_keep_the_window(twins, name, of_layer):
    _, model = twins(name)
    prompts = token_ids(model.config.vocab_size, 90).tolist()
    engine = Engine(model, max_batch_size=2, max_length=256)
    options = {"max_new_tokens": 5, "stop_token_ids": ()}
    (fused,) = engine.generate([fuse(prompts)], **options)
    (same,) = engine.generate([fuse(prompts)], mask=[masks.fused() & mask for mask in of_layer], **options)
    (without,) = engine.generate([fuse(prompts)], mask=masks.fused(), **options)
    assert fused.logprobs == same.logprobs != without.logprobs
    request = engine.submit(fuse(prompts), **options)
    engine.run()
    assert request.completion.tokens == fused.tokens
    torch.testing.assert_close(torch.tensor(request.completion.logprobs), torch.tensor(fused.logprobs))


@pytest.mark.parametrize("name", ["Qwen2 with a window above", "Qwen3 with a window in some layers"])
def test_requests_at_a_time_get_the_tokens_that_each_gets_alone(twins, name):
    _, model = twins(name)
    prompts = [token_ids(model.config.vocab_size, n, 1)[0].tolist() for n in (5, 90, 200)]
    engine = Engine(model, max_batch_size=2, max_length=256)
    options = {"max_new_tokens": 12, "stop_token_ids": ()}
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    engine.run()
    assert [r.completion.tokens for r in requests] == [done.tokens for done in engine.generate(prompts, **options)]


def test_a_step_reads_no_more_than_the_window(twins):
    _, model = twins("Mistral 7B v0.1")
    assert bytes_per_step(model, [WINDOW - 1]) < bytes_per_step(model, [WINDOW]) == bytes_per_step(model, [400])
    _, model = twins("Qwen3 with a window in some layers")
    short, at, long = (bytes_per_step(model, [n]) for n in (WINDOW - 1, WINDOW, WINDOW + 1))
    assert at - short == 2 * (long - at) > 0  # in one of two layers


@pytest.mark.parametrize("name", COMPUTED)
def test_a_saved_model_is_read_by_both(twins, name, tmp_path):
    reference, model = twins(name)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(reference)
    ids = token_ids(model.config.vocab_size, 140)
    assert torch.equal(logits_of(again, ids), logits_of(reference, ids))
    assert Llama.from_pretrained(tmp_path, device="cpu").config == replace(model.config, dtype="float32")


def test_the_table_of_coverage_names_every_family():
    text = (ROOT / "docs" / "coverage.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    for name, (special, _) in FAMILIES.items():
        assert special in rows[name], name
