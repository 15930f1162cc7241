"""What other tests check on a CPU, on a CUDA device: python -m pytest -m gpu"""

import copy
import dataclasses

import pytest
import torch
from helpers import TINY, compiled_forward, random_batch, random_ids, tokens_without_waiting
from kv_dtype_helpers import (
    FP8,
    break_it,
    in_8_bits,
    is_near,
    rounding,
    scales_given,
    uneven,
    with_scales,
    without_scales,
)
from training_helpers import compare_in_bfloat16, gradients, loss_of, reference_gradients, relative

from llama_flex import Capture, Engine, Ensemble, Llama, Mask, Sampling, ScoreMod, edits, fuse, masks, score, scores
from llama_flex.engine import model_runner
from llama_flex.engine.output import NonFiniteLogitsError
from llama_flex.engine.scheduler import _pages_that_fit
from llama_flex.kernels.flex_attention import kernel_options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def no_further_from_float64(logits, reference_logits, truth):
    """Check that the mean error is at most 1.25 times, and the largest error at most twice, the error of the reference
    on the same device and in the same dtype."""
    error, theirs = (logits.cpu() - truth).abs(), (reference_logits.cpu() - truth).abs()
    assert error.mean() <= 1.25 * theirs.mean()
    assert error.max() <= 2 * theirs.max()


@torch.no_grad()
def on_cuda(model, ids, dtype=torch.float32, **options):
    """Return a copy of a model on the device, its dense logits there, and those of float64."""
    model = copy.deepcopy(model).to(dtype)
    truth = copy.deepcopy(model).double()(ids, backend="dense", **options)
    model = model.cuda()
    return model, model(ids, backend="dense", **options), truth


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


FAMILIES_AND_SHAPES = [
    "Mistral 7B v0.1",
    "YaRN Llama 2 7B 64k",
    "Llama with dynamic NTK",
    "Llama with LongRoPE",
    "Yi 34B",
]
FAMILIES_AND_SHAPES += [
    "head_dim 36",
    "head_dim 80",
    "head_dim 96",
    "head_dim 192",
    "head_dim 256",
    "groups of 32",
    "odd sizes",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES_AND_SHAPES)
@torch.no_grad()
def test_families_and_shapes_hold_compiled_in_chunks_and_steps(twins, name, dtype):
    _, model = twins(name)
    length = min(260, model.context)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    model, dense, truth = on_cuda(model, ids, dtype)
    forward, cache, parts = compiled_forward(model), model.new_cache(2, length), []
    half = length // 2 - 2
    for a, b in ((0, half), (half, 2 * half), *((i, i + 1) for i in range(2 * half, length))):
        parts.append(forward(ids[:, a:b], cache=cache))
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mha", "gqa"])
@torch.no_grad()
def test_compiled_chunks_of_any_size_hold(tiny_pair, name, dtype):
    _, model = tiny_pair(name)
    ids = torch.randint(model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    model, dense, truth = on_cuda(model, ids, dtype)
    forward, cache = compiled_forward(model), model.new_cache(2, 300)
    parts = [forward(part, cache=cache) for part in ids.split([5, 62, 33, 127, 73], dim=1)]
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)


TABLE = torch.randn(8, 65, generator=torch.Generator().manual_seed(0))
WIDTHS = torch.tensor([5, 40, 130, 300, 1000, 20, 7, 64])


def per_head(q, kv, widths=WIDTHS):
    return q.index - kv.index < widths[q.head]


def tabled(score, q, kv, table=TABLE):
    return score + table[q.head, (q.index - kv.index).clamp(0, 64)]


MASKS_AND_SCORES = {
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


@pytest.mark.parametrize("name", MASKS_AND_SCORES)
@torch.no_grad()
def test_masks_and_score_functions_hold_compiled_in_chunks_and_steps(tiny_pair, name):
    _, model = tiny_pair("gqa")
    mask, score_mod = MASKS_AND_SCORES[name]
    ids = torch.randint(model.config.vocab_size, (2, 260), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(260) // 90).expand(2, -1).clone()
    segments[:, 255:] = masks.GENERATED
    model, dense, truth = on_cuda(model, ids, segments=segments, mask=mask, score_mod=score_mod)
    forward, cache, parts = compiled_forward(model), model.new_cache(2, 260), []
    for a, b in ((0, 128), (128, 256), *((i, i + 1) for i in range(256, 260))):
        parts.append(forward(ids[:, a:b], segments=segments[:, a:b], cache=cache, mask=mask, score_mod=score_mod))
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)
    assert len(forward.steps) == 2


@torch.no_grad()
def test_a_rolling_cache_holds_its_window(tiny_pair):
    _, model = tiny_pair("gqa")
    ids = torch.randint(model.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(0))
    mask = masks.sliding_window(100) | masks.sink(3)
    model, dense, truth = on_cuda(model, ids, mask=mask)
    cache, forward, parts = model.new_rolling_cache(2, 100, 3, largest_append=128), compiled_forward(model), []
    for a, b in (*((i, i + 128) for i in range(0, 640, 128)), *((i, i + 1) for i in range(640, 700))):
        parts.append(forward(ids[:, a:b], cache=cache))
    no_further_from_float64(torch.cat(parts, dim=1), dense, truth)


def test_fused_questions_and_ensembles_are_those_of_the_cpu(tiny_pair):
    _, model = tiny_pair("gqa")
    prompts = [random_ids(n) for n in (40, 130, 9)]
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
    assert len(engine.runner.shapes) == 4  # a chunk of 128 and a step, for batches of 5 and of 1


def test_few_graphs_serve_prompts_of_every_length_and_long_texts(tiny_pair):
    _, model = tiny_pair("gqa")
    config = dataclasses.replace(model.config, max_position_embeddings=8192)
    long = Llama(config).cuda().requires_grad_(False)
    long.load_state_dict(model.state_dict())
    engine, options = Engine(long, compile=True), {"stop_token_ids": ()}
    ids = torch.randint(3, 500, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.generate([ids], max_new_tokens=3, **options)
    engine.generate([ids[:600]], max_new_tokens=3, **options)
    steps, graphs = len(engine.runner.shapes), engine.graphs.count
    assert steps == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1, 7, 127, 128, 129, 512, 513, 2047, 2049):
            engine.generate([ids[:length]], max_new_tokens=3, **options)
        (text,) = engine.generate([ids], max_new_tokens=2000, **options)
    assert (len(text.tokens), len(engine.runner.shapes), engine.graphs.count) == (2000, steps, graphs)
    assert "0 of them again" in engine.explain()


def test_a_stream_that_runs_ahead_is_the_stream_that_does_not(tiny_pair):
    """Compare with a cache of the caller's, where the next step waits until the caller has seen the token."""
    _, model = tiny_pair("gqa")
    engine = Engine(copy.deepcopy(model).cuda(), compile=True)
    prompts = [random_ids(n) for n in (5, 140)]
    first = engine.generate(prompts, max_new_tokens=30, stop_token_ids=())
    stop_ids = {first[0].tokens[7], first[1].tokens[12]}
    for options in ({"stop_token_ids": ()}, {"stop_token_ids": stop_ids}):
        options |= {"max_new_tokens": 30, "sampling": [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3)]}
        ahead = engine.generate(prompts, **options)
        behind = engine.generate(prompts, cache=engine.new_cache(2, 200), **options)
        assert ahead == behind
    for tokens in engine.stream(prompts, max_new_tokens=30):
        if tokens.row == 1:
            break  # leaves a step under way
    assert engine.generate(prompts, max_new_tokens=30, stop_token_ids=()) == first


def requests_of_many_kinds():
    """Return prompts with options: lengths around a block, masks, scores, fusion, ensembles, sampling, penalties."""
    lengths = (1, 2, 127, 128, 129, 255, 300, 384, 40, 130)
    ids = [random_ids(n) for n in lengths]
    sampled = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=3)
    return [
        *((prompt, {}) for prompt in ids),
        *((ids[7][:n], {"sampling": sampled}) for n in (383, 260, 140)),
        (ids[6], {"mask": masks.sliding_window(70) | masks.sink(2)}),
        (ids[6], {"mask": masks.causal() & Mask(per_head)}),
        (ids[5], {"score_mod": scores.alibi(8) >> scores.softcap(5.0)}),
        (ids[5], {"sampling": Sampling(temperature=0.7, repetition_penalty=1.3, seed=9)}),
        (fuse([ids[8], ids[4]], prefix=[5, 6], suffix=[7], positions="parallel"), {}),
        (fuse([ids[8], ids[9]], suffix=[7], weights=[2.0, 0.5]), {}),
        (Ensemble([ids[8], ids[9], ids[1]], "mean"), {}),
    ]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["gqa", "group3"])
def test_requests_of_many_kinds_get_what_they_get_alone_on_the_cpu(tiny_pair, name, compile):
    _, model = tiny_pair(name)
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    requests = [(prompt, options | own) for prompt, own in requests_of_many_kinds()]
    if name == "group3":
        requests = [r for r in requests if not {"mask", "score_mod"} & set(r[1])]  # of 8 heads
    alone = [Engine(model).generate([prompt], **options)[0] for prompt, options in requests]
    tight = {"max_batch_size": 5, "max_slots": 1152}
    for sizes in ({"max_batch_size": 16, "max_slots": 8192}, tight) if compile else (tight,):
        engine = Engine(copy.deepcopy(model).cuda(), compile=compile, max_length=512, **sizes)
        for _ in range(2 if compile else 1):  # recorded, then replayed
            submitted = [engine.submit(prompt, **options) for prompt, options in requests]
            gone = engine.submit(requests[0][0], max_new_tokens=50)
            engine.step()
            engine.step()
            engine.cancel(gone)
            engine.run()
            for request, expected in zip(submitted, alone, strict=True):
                assert request.completion.tokens == expected.tokens
                assert request.completion.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            assert engine.scheduler.block_manager.available == engine.scheduler.block_manager.num_pages


def test_requests_in_bfloat16_are_no_further_from_float64_than_dense_ones(tiny_pair):
    _, model = tiny_pair("gqa")
    engine = Engine(copy.deepcopy(model).bfloat16().cuda(), compile=True, max_batch_size=8, max_slots=8192)
    lengths, found = range(1, 400, 57), []
    prompts = [random_ids(n) for n in lengths]
    requests = [engine.submit(prompt, max_new_tokens=60, stop_token_ids=()) for prompt in prompts]
    engine.run()
    for prompt, request in zip(prompts, requests, strict=True):
        new = torch.tensor(request.completion.tokens)
        _, dense, truth = on_cuda(model, torch.tensor([prompt + new.tolist()]), torch.bfloat16)
        told = (x[0, len(prompt) - 1 : -1].cpu().double().log_softmax(-1) for x in (dense, truth))
        logprobs = torch.tensor(request.completion.logprobs, dtype=torch.float64)
        found.append([logprobs, *(x.gather(1, new[:, None])[:, 0] for x in told)])
    no_further_from_float64(*map(torch.cat, zip(*found, strict=True)))


def test_a_rule_that_reads_out_of_bounds_is_refused_and_the_device_stays_whole(tiny_pair):
    _, model = tiny_pair("gqa")
    table = (torch.arange(20) % 3 > 0).cuda()
    short = Mask(lambda q, kv: (kv.index <= q.index) & table[kv.index.clamp(min=0)])
    engine = Engine(copy.deepcopy(model).cuda(), max_batch_size=4, max_slots=1024)
    with pytest.raises(ValueError, match="index 20 into a tensor of 20"):
        engine.submit([5] * 15, max_new_tokens=6, mask=short)
    fits = engine.submit([5] * 14, max_new_tokens=6, stop_token_ids=(), mask=short)
    engine.run()
    alone = Engine(model).generate([[5] * 14], max_new_tokens=6, stop_token_ids=(), mask=short)
    assert fits.completion.tokens == alone[0].tokens


def test_steps_of_many_requests_wait_for_nothing(tiny_pair):
    _, model = tiny_pair("gqa")
    engine = Engine(copy.deepcopy(model).cuda(), compile=True, max_batch_size=8, max_slots=4096)
    prompts = [random_ids(n) for n in (9, 140, 300)]
    options = {"max_new_tokens": 150, "stop_token_ids": ()}
    tokens = tokens_without_waiting(engine, lambda: [engine.submit(prompt, **options) for prompt in prompts])
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("compile", [False, True])
def test_a_request_that_shares_pages_with_one_whose_logits_are_nan_gets_its_tokens(tiny_pair, compile):
    _, model = tiny_pair("gqa")
    model = copy.deepcopy(model)
    model.embed.weight[5] = torch.nan
    begin = torch.randint(6, 500, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(copy.deepcopy(model).cuda(), compile=compile, max_batch_size=4, max_slots=4096)
    prompts = [[*begin, last] for last in (6, 5, 7)]
    requests = [engine.submit(prompt, max_new_tokens=6, stop_token_ids=()) for prompt in prompts]
    engine.run()
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    for request, prompt in zip(requests[::2], prompts[::2], strict=True):
        (alone,) = Engine(model).generate([prompt], max_new_tokens=6, stop_token_ids=())
        assert request.completion.tokens == alone.tokens


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_device_that_is_not_the_current_one(tiny_pair, compile):
    _, model = tiny_pair("gqa")
    prompts = [random_ids(n) for n in (5, 140)]
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    for device in ("cuda:1", "cuda:0"):
        engine = Engine(copy.deepcopy(model).to(device), compile=compile)
        for some in (prompts, prompts[:1]):
            found, expected = (e.generate(some, **options) for e in (engine, Engine(model)))
            assert [f.tokens for f in found] == [e.tokens for e in expected]
        assert device in engine.explain()
        requests = [engine.submit(prompt, **options) for prompt in prompts]
        engine.run()
        assert [r.completion.tokens for r in requests] == [e.tokens for e in Engine(model).generate(prompts, **options)]


@pytest.mark.parametrize("way", ["eager", "compiled", "recomputed"])
@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_gradients_through_flex_attention_are_the_references(tiny_pair, name, way):
    reference, model = (copy.deepcopy(x).cuda() for x in tiny_pair(name))
    model.requires_grad_()
    for block in model.layers if way != "eager" else ():
        block.compile(fullgraph=True, dynamic=False)
    for length in (130, 300):
        ids = random_batch(model, length).cuda()
        expected, other = (reference_gradients(reference, ids, kind) for kind in ("eager", "sdpa"))
        budget = 4 * max(relative(other[key], expected[key]) for key in expected)
        found = gradients(model, loss_of(model(ids, recompute=way == "recomputed"), ids))
        for key, gradient in expected.items():
            assert relative(found[key], gradient) <= budget, key


@pytest.mark.parametrize("compile", [False, True])
def test_packed_documents_train_on_cuda_as_alone_densely(tiny_pair, compile):
    model = copy.deepcopy(tiny_pair("gqa")[1]).cuda().requires_grad_()
    texts = [random_batch(model, n, batch=1).cuda() for n in (60, 7, 130, 300)]
    expected = gradients(model, sum(loss_of(model(text, backend="dense"), text) for text in texts))
    segments = torch.cat([torch.full_like(text, n) for n, text in enumerate(texts)], 1)
    positions = torch.cat([torch.arange(text.shape[1], device="cuda")[None] for text in texts], 1)
    for block in model.layers if compile else ():
        block.compile(fullgraph=True, dynamic=False)
    for mask in (masks.causal() & masks.document(), masks.causal()):
        packed = model(torch.cat(texts, 1), segments=segments, positions=positions, mask=mask)
        parts = packed.split([text.shape[1] for text in texts], 1)
        found = gradients(model, sum(loss_of(logits, text) for logits, text in zip(parts, texts, strict=True)))
        error = max(relative(found[key], expected[key]) for key in expected)
        assert error < 1e-4 if "document" in str(mask) else error > 0.1


def test_bfloat16_gradients_are_no_further_from_float64_than_the_references(tiny_pair):
    compare_in_bfloat16(tiny_pair("gqa"), "cuda", "flex")


def test_captures_and_edits_of_replayed_steps_are_those_of_the_cpu(tiny_pair):
    _, model = tiny_pair("gqa")
    prompts = [random_ids(n) for n in (5, 140)]
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    points = ("resid_pre", "q", "k", "v", "z", "resid_mid", "mlp_post", "resid_post", "attention")
    for edit in (None, [edits.add("resid_post", 2 * vector, layers=0), edits.ablate([1], layers=1)]):
        found = []
        for where in ("cpu", "cuda"):
            engine = Engine(copy.deepcopy(model).to(where), compile=where == "cuda")
            capture = Capture(*points, where=range(1000), device="cpu")
            options = {"max_new_tokens": 12, "stop_token_ids": (), "edit": edit}
            done = engine.generate(prompts, capture=capture, **options)
            assert [d.tokens for d in done] == [d.tokens for d in engine.generate(prompts, **options)]
            found.append((capture, [d.tokens for d in done]))
        (expected, tokens), (capture, others) = found
        assert tokens == others
        for point in points:
            for layer in range(2):
                scale = expected[point, layer].abs().max()
                assert (capture[point, layer] - expected[point, layer]).abs().max() < 1e-4 * scale, (point, layer)
        assert capture.tokens.position.equal(expected.tokens.position)


@pytest.mark.parametrize("compile", [False, True])
def test_requests_with_captures_edits_and_caches_get_what_they_get_alone(tiny_pair, compile):
    _, model = tiny_pair("gqa")
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    prompts = [random_ids(5), random_ids(400) + random_ids(200)]  # the second is split into chunks
    model = Llama(dataclasses.replace(model.config, max_position_embeddings=1024)).eval().requires_grad_(False)
    model.load_state_dict(tiny_pair("gqa")[1].state_dict())
    engine = Engine(copy.deepcopy(model).cuda(), compile=compile, max_batch_size=12, max_slots=8192)
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    for scale in (0.5, 2.0) if compile else (2.0,):
        given = [
            {"edit": edits.add("resid_post", scale * vector, layers=0), "sampling": Sampling(temperature=0.9, seed=4)},
            {"edit": edits.scale("z", scale), "mask": masks.sliding_window(60), "score_mod": scores.softcap(3.0)},
        ]
        expected, found, alone = [], [], Engine(model, backend="dense")
        for prompt in prompts:
            for own in given:
                captures = [Capture("resid_post", "k", "attention", where=range(1000), device="cpu") for _ in "ab"]
                expected.append((alone.generate([prompt], **options, **own, capture=captures[0])[0], captures[0]))
                found.append((engine.submit(prompt, **options, **own, capture=captures[1]), captures[1]))
            cache = engine.new_cache(1, 700)
            expected.append((alone.generate([prompt], **options)[0], None))
            found.append((engine.submit(prompt, **options, cache=cache), None))
        engine.run()
        for (request, capture), (completion, reference) in zip(found, expected, strict=True):
            assert request.completion.tokens == completion.tokens
            for site in ("resid_post", "k", "attention") if capture is not None else ():
                error = (capture[site, 1] - reference[site, 1]).abs().max()
                assert error < 1e-4 * reference[site, 1].abs().max(), site
        assert engine.scheduler.block_manager.available == engine.scheduler.block_manager.num_pages


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_compiled_steps_take_over_from_recorded_uncompiled_ones(tiny_pair, name, monkeypatch):
    """Check tokens with the compiler beside graph captures: every 128 slots are a new recording."""
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 200)
    _, model = tiny_pair(name)
    prompts, engine = [random_ids(5), random_ids(120)], Engine(copy.deepcopy(model).cuda(), compile="auto")
    for sampling in (Sampling(), Sampling(temperature=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, seed=3)):
        options = {"max_new_tokens": 300, "stop_token_ids": (), "sampling": sampling}
        expected = [done.tokens for done in Engine(model, compile="auto").generate(prompts, **options)]
        assert [done.tokens for done in engine.generate(prompts, **options)] == expected
    assert sorted(engine.runner.uncompiled.steps.values()) == [200, 200]
    assert len(engine.runner.shapes) == 1
    texts = []
    for _ in "ab":
        other = Engine(copy.deepcopy(model).cuda().bfloat16(), compile="auto")
        texts.append([done.tokens for done in other.generate(prompts, max_new_tokens=150)])
        assert other.graphs.count == 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize("compile", [True, "auto"])
@pytest.mark.parametrize("way", ["int8+int8", "int8+fp8", "int4+int4", "int8+int4-32-symmetric"])
@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_compiled_steps_with_a_quantised_vocabulary_give_the_tokens_of_the_cpu(tiny_pair, tmp_path, name, way, compile):
    tiny_pair(name)[1].save_pretrained(tmp_path)
    model, on_cpu = (Llama.from_pretrained(tmp_path, device=d, quantize=way) for d in ("cuda", "cpu"))
    prompts, options = [random_ids(5), random_ids(140)], {"max_new_tokens": 20, "stop_token_ids": ()}
    for some in (prompts[:1], prompts):
        expected = [done.tokens for done in Engine(on_cpu, backend="dense").generate(some, **options)]
        assert [done.tokens for done in Engine(model, compile=compile).generate(some, **options)] == expected
    half = model.bfloat16() if "fp8" not in way else None
    if half is not None:
        tokens = [done.tokens for done in Engine(half, compile=compile).generate(prompts, **options)]
        assert all(len(each) == 20 for each in tokens)


def test_scores_on_cuda_are_those_of_the_cpu(tiny_pair):
    _, model = tiny_pair("gqa")
    draws = torch.Generator().manual_seed(0)
    prefix, *texts = (torch.randint(3, 500, (n,), generator=draws).tolist() for n in (200, 1, 5, 140, 3))
    engine = Engine(copy.deepcopy(model).cuda(), compile=True)
    for found, expected in zip(score(engine, prefix, texts), score(model, prefix, texts), strict=True):
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-3)


# ---- keys and values in 8 bits


@torch.no_grad()
def rounded_on_cuda(model, dtype, ids, **options):
    """Return a model whose caches are in 8 bits, on the device, and three logits: of rounded keys and values there and
    in float64, and of others in float64."""
    wide, options = uneven(model), options | {"backend": "dense"}
    model, edits = uneven(model, dtype).cuda(), rounding(wide)
    expected = model(ids, **options, edit=edits), wide(ids, **options, edit=edits), wide(ids, **options)
    return in_8_bits(model), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mha", "gqa", "group3", "head_dim"])
@pytest.mark.parametrize("fault", [None, "no scale of keys", "no scale of values"])
@torch.no_grad()
def test_compiled_steps_read_keys_and_values_in_8_bits(tiny_pair, name, dtype, fault, monkeypatch):
    ids = torch.randint(512, (2, 262), generator=torch.Generator().manual_seed(0))
    model, expected = rounded_on_cuda(tiny_pair(name)[1], dtype, ids)
    if fault is not None:
        break_it(monkeypatch, fault)
    forward, cache = compiled_forward(model), model.new_cache(2, 262)
    assert cache.layers[0].k.dtype == FP8
    found = torch.cat([forward(part, cache=cache) for part in ids.split([128, 128, 1, 1, 1, 1, 1, 1], 1)], 1)
    assert is_near(found, *expected) == (fault is None)


@pytest.mark.parametrize("name", MASKS_AND_SCORES)
@torch.no_grad()
def test_masks_and_score_functions_over_8_bits(tiny_pair, name):
    mask, score_mod = MASKS_AND_SCORES[name]
    ids = torch.randint(512, (2, 260), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(260) // 90).expand(2, -1).clone()
    segments[:, 255:] = masks.GENERATED
    given = {"mask": mask, "score_mod": score_mod}
    model, expected = rounded_on_cuda(tiny_pair("gqa")[1], torch.float32, ids, segments=segments, **given)
    for forward in (compiled_forward(model), model):
        cache, found = model.new_cache(2, 260), []
        for a, b in ((0, 128), (128, 256), *((i, i + 1) for i in range(256, 260))):
            found.append(forward(ids[:, a:b], segments=segments[:, a:b], cache=cache, **given))
        assert is_near(torch.cat(found, 1), *expected)


@torch.no_grad()
def test_a_rolling_cache_in_8_bits(tiny_pair):
    ids = torch.randint(512, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = masks.sliding_window(100) | masks.sink(3)
    model, expected = rounded_on_cuda(tiny_pair("gqa")[1], torch.float32, ids, mask=mask)
    for forward in (compiled_forward(model), model):
        cache = model.new_rolling_cache(2, 100, 3, largest_append=128)
        found = [forward(part, cache=cache) for part in ids.split([128, 128, 128, *[1] * 16], 1)]
        assert is_near(torch.cat(found, 1), *expected)


@torch.no_grad()
def test_rows_of_a_cache_in_8_bits_are_copied_and_exchanged(tiny_pair):
    ids = torch.randint(512, (2, 90), generator=torch.Generator().manual_seed(0))
    model, expected = rounded_on_cuda(tiny_pair("gqa")[1], torch.float32, ids)
    cache = model.new_cache(2, 128)
    model(ids[:, :60], cache=cache)
    fork, wide = cache.fork(), cache.expand(2)
    model(ids[:, 70:90], cache=fork)
    cache.reorder([1, 0])
    wide.truncate(50)
    found = model(ids[[1, 0], 60:], cache=cache), model(ids[[0, 0, 1, 1], 50:], cache=wide)
    assert is_near(found[0], *(x[[1, 0], 60:] for x in expected))
    assert is_near(found[1], *(x[[0, 0, 1, 1], 50:] for x in expected))


@pytest.mark.parametrize("compile", [True, False, "auto"])
def test_streams_and_requests_in_8_bits_give_the_tokens_of_the_cpu(tiny_pair, compile, monkeypatch):
    """Requests share prefixes, and copies of pages within one; "auto" begins uncompiled and is compiled ahead."""
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 3)
    model = uneven(tiny_pair("gqa")[1], torch.float32)
    prompts = [random_ids(n) for n in (300, 20, 129)]
    prompts += [prompts[0][:280] + random_ids(30, 1), prompts[0][:256] + random_ids(5, 2)]
    options = {"max_new_tokens": 8, "stop_token_ids": ()}
    cpu, edits = Engine(model, backend="dense"), rounding(model)
    expected = [cpu.generate([ids], edit=edits, **options)[0].tokens for ids in prompts]
    engine = Engine(copy.deepcopy(model).cuda(), compile=compile, kv_dtype="fp8", max_batch_size=4, max_slots=2048)
    for _ in range(2):
        assert [engine.generate([ids], **options)[0].tokens for ids in prompts] == expected
        requests = [engine.submit(ids, **options) for ids in prompts]
        engine.run()
        assert [request.completion.tokens for request in requests] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_scales_of_a_checkpoint_round_keys_and_values_with_a_cache_or_without(tiny_pair, cached, dtype):
    ids = torch.randint(512, (2, 262), generator=torch.Generator().manual_seed(0))
    wide, model = (with_scales(tiny_pair("gqa")[1], per_head=True, dtype=each) for each in (torch.float64, dtype))
    plain, edits, given = without_scales(wide), rounding(wide, scales_given(wide)), {"backend": "dense"}
    expected = (
        without_scales(model).cuda()(ids, **given, edit=edits),
        plain(ids, **given, edit=edits),
        plain(ids, **given),
    )
    model = model.cuda()
    forward, cache = compiled_forward(model), model.new_cache(2, 262) if cached else None
    assert is_near(forward(ids, cache=cache), *expected)
    assert is_near(model(ids), *expected)
    for block in model.blocks():
        block.attention.k_scale, block.attention.v_scale = block.attention.v_scale, block.attention.k_scale
    assert not is_near(model(ids), *expected)


@pytest.mark.parametrize("compile", [True, False, "auto"])
def test_streams_and_requests_with_scales_of_a_checkpoint_give_the_tokens_of_the_cpu(tiny_pair, compile, monkeypatch):
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 3)
    model = with_scales(tiny_pair("gqa")[1], per_head=True, dtype=torch.float32)
    prompts, options = [random_ids(n) for n in (300, 20, 129)], {"max_new_tokens": 8, "stop_token_ids": ()}
    cpu = Engine(model, backend="dense")
    expected = [cpu.generate([ids], **options)[0].tokens for ids in prompts]
    engine = Engine(copy.deepcopy(model).cuda(), compile=compile, max_batch_size=4, max_slots=2048)
    for _ in range(2):
        assert [engine.generate([ids], **options)[0].tokens for ids in prompts] == expected
        requests = [engine.submit(ids, **options) for ids in prompts]
        engine.run()
        assert [request.completion.tokens for request in requests] == expected


def test_pages_in_8_bits_are_zeroed_after_nan(tiny_pair):
    model = copy.deepcopy(tiny_pair("gqa")[1]).cuda()
    model.embed.weight[5] = torch.nan
    engine = Engine(model, kv_dtype="fp8", max_batch_size=1, max_slots=128)
    poisoned = engine.submit([3, 5, 4], max_new_tokens=1)
    engine.run()
    assert isinstance(poisoned.error, NonFiniteLogitsError)
    request = engine.submit([3], max_new_tokens=1)
    engine.run()
    assert request.error is None


@torch.no_grad()
def test_long_chunks_over_8_bits_use_the_kernel_that_reads_them():
    q = torch.empty(1, 8, 8192, 128, dtype=torch.bfloat16, device="cuda")
    k = q[:, :2]
    assert kernel_options(q, k, paged=False, plain=True, flash=False)["fwd_USE_TMA"]
    assert kernel_options(q, k, paged=False, plain=True, flash=True)["BACKEND"] == "FLASH"
    options = kernel_options(q, k.to(FP8), paged=False, plain=True, flash=True)
    assert not {"fwd_USE_TMA", "BACKEND"} & set(options)


def test_twice_as_many_pages_of_8_bits_fit(tiny_pair):
    model = copy.deepcopy(tiny_pair("gqa")[1]).to("cuda", torch.bfloat16)
    plain, found = (_pages_that_fit(model, kv_dtype, 0.1) for kv_dtype in (None, "fp8"))
    assert 1.8 * plain < found < 2.1 * plain
