"""What the other tests of adapters check on a CPU, on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from adapter_helpers import ADAPTERS, CONFIGS, NAMES, OPTIONS, PROMPTS, peft_adapter
from helpers import random_batch

from llama_flex import Engine, Llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def folder(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        peft_adapter(tiny_pair("gqa")[0], folder / name, seed, **CONFIGS[name])
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_pair, folder) -> Llama:
    """A model with several adapters, on the device."""
    model = copy.deepcopy(tiny_pair("gqa")[1]).cuda()
    for name in NAMES:
        model.adapters.load(folder / name)
    return model


@pytest.fixture(scope="module")
def expected(loaded) -> list[list[int]]:
    """The tokens of each prompt under its adapter, by the plain forward on the CPU."""
    model, found = copy.deepcopy(loaded).cpu(), []
    for prompt, name in zip(PROMPTS, ADAPTERS, strict=True):
        model.adapters.activate(None if name == "__base__" else name)
        ids = list(prompt)
        for _ in range(OPTIONS["max_new_tokens"]):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), logits_to_keep=1, backend="dense").argmax()))
        found.append(ids[len(prompt) :])
    assert len(set(map(tuple, found))) == len(found)
    return found


@pytest.mark.parametrize("compile", [False, True, "auto"])
def test_a_batch_with_an_adapter_each_gets_what_each_gets_alone(loaded, expected, compile):
    """In streams, whose compiled steps are CUDA graphs, and submitted twice: the second time prefixes are shared."""
    engine = Engine(loaded, backend="flex" if compile else "dense", compile=compile, max_slots=4096)
    assert [c.tokens for c in engine.generate(PROMPTS, adapter=ADAPTERS, **OPTIONS)] == expected
    turned = [*ADAPTERS[1:], ADAPTERS[0]]
    assert [c.tokens for c in engine.generate(PROMPTS, adapter=turned, **OPTIONS)] != expected
    assert [c.tokens for c in engine.generate(PROMPTS, adapter=ADAPTERS, **OPTIONS)] == expected
    for _ in range(2):
        requests = [engine.submit(p, adapter=name, **OPTIONS) for p, name in zip(PROMPTS, ADAPTERS, strict=True)]
        engine.run()
        assert [r.error for r in requests] == [None] * 5
        assert [[step.token for step in r.steps] for r in requests] == expected
    assert [r.num_cached_tokens > 0 for r in requests] == [True, True, True, False, True]


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@torch.no_grad()
def test_bfloat16_and_few_bits_with_an_adapter_are_near_float64(tiny_pair, folder, tmp_path, quantize):
    tiny_pair("gqa")[1].save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path, device="cuda", dtype=torch.bfloat16, quantize=quantize)
    exact = Llama.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    for path, module in model.named_modules():  # what it stands for
        if hasattr(module, "matrix") and path != "embed":
            exact.get_submodule(path).weight.copy_(module.matrix.floats().double())
    exact.embed.weight.copy_(model.embed.weight.double())
    ids, errors = random_batch(model, 40), {}
    for active in (None, "patterns"):
        for each in (model, exact):
            if active is not None:
                each.adapters.activate(each.adapters.load(folder / active))
        errors[active] = (model(ids, backend="dense").cpu() - exact(ids, backend="dense")).abs().mean().item()
    assert errors["patterns"] <= 3 * errors[None]
    exact.adapters.activate(None)  # the mutation
    assert (model(ids, backend="dense").cpu() - exact(ids, backend="dense")).abs().mean() > 10 * errors["patterns"]


def test_training_through_flex_attention_moves_the_factors_alone(tiny_pair):
    model = copy.deepcopy(tiny_pair("gqa")[1]).cuda()
    ids = random_batch(model, 128).cuda()
    parameters = model.adapters.train(model.adapters.add("mine"))
    grads = {}
    for name in ("flex", "dense"):
        model.zero_grad()
        model(ids, backend=name).logsumexp(-1).mean().backward()
        grads[name] = [p.grad.clone() for p in parameters]
    for one, other in zip(grads["flex"], grads["dense"], strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()
    assert [p for p in model.parameters() if p.grad is not None] == parameters
