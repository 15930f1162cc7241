"""The same claims on a CUDA device: python -m pytest -m gpu"""

import copy

import pytest
import torch
from conftest import TINY, compiled_forward

from llama_flex import Engine, Ensemble, Mask, ScoreMod, fuse, masks, scores

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


TABLE = torch.randn(8, 65, generator=torch.Generator().manual_seed(0))
WIDTHS = torch.tensor([5, 40, 130, 300, 1000, 20, 7, 64])


def per_head(q, kv, widths=WIDTHS):
    return q.index - kv.index < widths[q.head]


def tabled(score, q, kv, table=TABLE):
    return score + table[q.head, (q.index - kv.index).clamp(0, 64)]


PATTERNS = {
    "window and sinks": (masks.sliding_window(100) | masks.sink(3), None),
    "windows by row": (masks.sliding_window(torch.tensor([50, 200])), None),
    "per head": (masks.causal() & Mask(per_head), None),
    "tree": (masks.tree([-1, 0, 0, 1, 1, 2], start=140), None),
    "documents": (masks.causal() & masks.document(), None),
    "per layer": ([masks.sliding_window(30), masks.causal()], None),
    "alibi, softcap": (masks.causal(), scores.alibi(8) >> scores.softcap(5.0)),
    "own table": (masks.causal(), ScoreMod(tabled)),
    "weights": (masks.fused(), scores.segment_weights(torch.tensor([0.0, 1.0, -1.0]))),
}


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_masks_and_score_functions_hold_compiled_in_chunks_and_steps(tiny_pair, name):
    _, model = tiny_pair("gqa")
    mask, score_mod = PATTERNS[name]
    ids = torch.randint(model.config.vocab_size, (2, 260), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(260) // 90).expand(2, -1).clone()
    segments[:, 255:] = masks.GENERATED
    truth = copy.deepcopy(model).double()(ids, segments=segments, mask=mask, score_mod=score_mod, backend="dense")
    model = copy.deepcopy(model).cuda()
    dense = model(ids, segments=segments, mask=mask, score_mod=score_mod, backend="dense")
    forward, cache, parts = compiled_forward(model), model.new_cache(2, 260), []
    for a, b in ((0, 128), (128, 256), *((i, i + 1) for i in range(256, 260))):
        parts.append(forward(ids[:, a:b], segments=segments[:, a:b], cache=cache, mask=mask, score_mod=score_mod))
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)
    assert len(forward.graphs) == 2


@torch.no_grad()
def test_a_rolling_cache_holds_its_window(tiny_pair):
    _, model = tiny_pair("gqa")
    ids = torch.randint(model.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(0))
    mask = masks.sliding_window(100) | masks.sink(3)
    truth = copy.deepcopy(model).double()(ids, mask=mask, backend="dense")
    model = copy.deepcopy(model).cuda()
    dense = model(ids, mask=mask, backend="dense")
    cache, forward, parts = model.new_rolling_cache(2, 100, 3, largest_append=128), compiled_forward(model), []
    for a, b in (*((i, i + 128) for i in range(0, 640, 128)), *((i, i + 1) for i in range(640, 700))):
        parts.append(forward(ids[:, a:b], cache=cache))
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)


def test_fused_questions_and_ensembles_are_those_of_the_cpu(tiny_pair):
    _, model = tiny_pair("gqa")
    prompts = [torch.randint(3, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 130, 9)]
    requests = [
        fuse(prompts, prefix=[5, 6], suffix=[7, 8], positions="parallel"),
        fuse(prompts[:2], suffix=[7], weights=[2.0, 0.5]),
        Ensemble(prompts, "mean"),
        prompts[0],
    ]
    options = {"max_new_tokens": 12, "stop_token_ids": ()}
    found = Engine(copy.deepcopy(model).cuda(), compile=True).generate(requests, **options)
    assert [f.tokens for f in found] == [e.tokens for e in Engine(model).generate(requests, **options)]


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
