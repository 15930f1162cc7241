"""The same claims on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from conftest import TINY, compiled_forward

from llama_flex import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def no_further_from_float64(logits, reference_logits, truth):
    """Mean and largest error no more than a quarter above the reference's own, on the same device and dtype."""
    error, theirs = (logits.cpu() - truth).abs(), (reference_logits.cpu() - truth).abs()
    assert error.mean() <= 1.25 * theirs.mean()
    assert error.max() <= 2 * theirs.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_compiled_chunks_and_steps_equal_the_reference(tiny_pair, name, dtype):
    reference, model = tiny_pair(name)
    ids = torch.randint(model.config.vocab_size, (2, 386), generator=torch.Generator().manual_seed(0))
    truth = copy.deepcopy(model).double()(ids, backend="dense")
    device_reference = copy.deepcopy(reference).to("cuda", dtype)
    device_reference.model.rotary_emb.inv_freq = reference.model.rotary_emb.inv_freq.cuda()  # .to() rounds it
    expected = device_reference(ids.cuda()).logits
    model = copy.deepcopy(model).to("cuda", dtype)
    forward, cache, parts, start = compiled_forward(model), model.new_cache(2, 386), [], 0
    while start < 386:
        size = 128 if start < 256 else 1
        parts.append(forward(ids[:, start : start + size], cache=cache))
        start += size
    no_further_from_float64(torch.cat(parts, dim=1), expected, truth)


@pytest.mark.parametrize("name", ["gqa", "group3"])
def test_compiled_generation_equals_each_prompt_alone_and_the_cpu(tiny_pair, name):
    _, model = tiny_pair(name)
    engine = Engine(copy.deepcopy(model).cuda(), compile=True)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in (1, 60, 127, 128, 300)]
    together = engine.generate(prompts, max_new_tokens=20, stop_token_ids=())
    for prompt, completion in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], max_new_tokens=20, stop_token_ids=())[0]
        on_cpu = Engine(model).generate([prompt], max_new_tokens=20, stop_token_ids=())[0]
        assert completion.tokens == alone.tokens == on_cpu.tokens
    assert len(engine.graphs) == 4  # a chunk of 128 and a step, for batches of 5 and of 1
