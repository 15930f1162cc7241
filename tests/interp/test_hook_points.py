"""Tensors at the hook points equal those of transformers' hooks, and runs without captures and edits compile as before.

The budget of a comparison is twice the reference's own spread: the largest difference, at that hook point, between its
eager and its sdpa attention, and between its full forward and the same fed token by token.
"""

import copy

import pytest
import torch
from helpers import few, random_batch
from interp_helpers import NEW, NULL_EDITS, PROMPTS, assert_equal, everything, hooked, stepped

from llama_flex import Capture, Edit, Engine, edits
from llama_flex.interp.hook_points import ATTENTION, HOOK_POINTS


@torch.no_grad()
def test_every_site_of_a_forward_is_what_the_references_hooks_see(pair):
    reference, model, spread = pair
    ids = random_batch(model, 133)
    for backend in ("flex", "dense"):
        capture = everything()
        logits = model(ids, capture=capture, backend=backend)
        assert logits.equal(model(ids, backend=backend))
        assert_equal(capture, hooked(reference, ids), spread)
    assert capture.tokens.index.equal(torch.arange(133).expand(2, -1))


@torch.no_grad()
def test_a_site_one_off_would_be_seen(pair):
    """Check mutations: layers exchanged, heads in another order."""
    reference, model, spread = pair
    ids = random_batch(model, 133)
    capture, expected = everything(), hooked(reference, ids)
    model(ids, capture=capture)
    for name in expected:
        mistaken = capture[name[0], 1 - name[1]]
        assert (mistaken - expected[name]).abs().max() > 100 * spread[name]
    for name in ("q", "z", ATTENTION):
        assert (capture[name, 0].flip(2) - expected[name, 0]).abs().max() > 100 * spread[name, 0]


@pytest.mark.exhaustive
@torch.no_grad()
def test_chunks_and_single_tokens_add_up_to_the_references(pair):
    reference, model, spread = pair
    ids = random_batch(model, 140)
    capture, cache = everything(), model.new_cache(2, 140)
    for part in (ids[:, :100], ids[:, 100:-NEW], *ids[:, -NEW:].split(1, 1)):
        model(part, cache=cache, capture=capture)
    assert_equal(capture, stepped(reference, ids), spread)


@pytest.mark.exhaustive
@pytest.mark.parametrize("compile", [False, True])
def test_generation_captures_prompts_and_new_tokens_of_ragged_rows(pair, compile):
    reference, model, spread = pair
    engine, capture = Engine(model, compile=compile), everything(device="cpu")
    plain = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[])
    done = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[], capture=capture)
    assert [d.tokens for d in done] == [p.tokens for p in plain]
    assert capture.count.tolist() == [len(p) + NEW - 1 for p in PROMPTS]
    for row, (prompt, d) in enumerate(zip(PROMPTS, done, strict=True)):
        whole = torch.tensor([prompt + d.tokens[:-1]])
        n = whole.shape[1]
        for key, expected in hooked(reference, whole).items():
            found = capture[key][row : row + 1, :n, ..., :n] if key[0] == ATTENTION else capture[key][row : row + 1, :n]
            assert (found - expected).abs().max() <= 2 * spread[key], key
            assert not capture[key][row, n:].any()
        assert capture.tokens.index[row].tolist() == [*range(n), *[-1] * (capture.tokens.index.shape[1] - n)]
        assert capture.tokens.position[row, :n].tolist() == [*range(n)]


@pytest.mark.parametrize("dtype", few([torch.float32], [torch.bfloat16]))
@torch.no_grad()
def test_an_edit_that_changes_nothing_changes_no_bit(pair, dtype):
    model = copy.deepcopy(pair[1]).to(dtype)
    ids = random_batch(model, 133)
    for backend in ("flex", "dense"):
        assert model(ids, edit=NULL_EDITS, backend=backend).equal(model(ids, backend=backend))
    capture = everything()
    model(ids, capture=capture)
    for layer in range(2):
        for point in HOOK_POINTS:
            patch = edits.patch(capture, point, layer)
            assert model(ids, edit=patch).equal(model(ids)), point


@pytest.mark.exhaustive
def test_null_edits_and_captures_change_nothing_in_compiled_generation(pair):
    """Check in float32: `scale` multiplies by 1, which may be fused with what comes before it and round differently."""
    engine = Engine(pair[1], compile=True)
    plain, null, read, scaled = (
        engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **options)
        for options in (
            {},
            {"edit": [Edit(point, lambda x, tokens: x) for point in HOOK_POINTS]},
            {"capture": everything()},
            {"edit": NULL_EDITS},
        )
    )
    assert plain == null == read
    assert [d.tokens for d in plain] == [d.tokens for d in scaled]
    assert all(
        abs(a - b) < 1e-5
        for p, d in zip(plain, scaled, strict=True)
        for a, b in zip(p.logprobs, d.logprobs, strict=True)
    )


def test_a_compiled_run_has_the_captures_and_edits_of_an_eager_one(pair):
    """Check also that edits that differ in their vectors alone share what is compiled."""
    _, model, _ = pair
    engines = [Engine(model, compile=compile) for compile in (False, True)]
    vectors = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    counts, tokens = [], []
    for vector in vectors:
        edit = edits.add("resid_mid", 9 * vector, layers=1)
        captures = [Capture("z", "resid_post", layers=1) for _ in engines]
        eager, compiled = (
            engine.generate(PROMPTS[:1], max_new_tokens=4, stop_token_ids=[], edit=edit, capture=capture)[0].tokens
            for engine, capture in zip(engines, captures, strict=True)
        )
        assert compiled == eager
        for point in ("z", "resid_post"):
            found, expected = (capture[point, 1] for capture in captures)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        counts.append(engines[1].graphs.count)
        tokens.append(eager)
    assert counts[0] == counts[1]
    assert tokens[0] != tokens[1]


@pytest.mark.exhaustive
def test_new_vectors_compile_nothing_and_other_runs_stay_as_they_were(pair):
    _, model, _ = pair
    engine = Engine(model, compile=True)
    plain = engine.generate(PROMPTS, max_new_tokens=NEW)
    count = engine.graphs.count
    # Without captures and edits, nothing of hook points is in the name of a layer's code, nor in what is compiled.
    assert {name for _, name, _ in engine.graphs.parts} == {"prepare_inputs", "block, variant 0", "sample_next"}
    vectors = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    engine.generate(PROMPTS, max_new_tokens=NEW, edit=edits.add("resid_post", vectors[0], layers=1))
    once = engine.graphs.count
    assert once > count
    steered = [
        engine.generate(PROMPTS, max_new_tokens=NEW, edit=edits.add("resid_post", 9 * vector, layers=1))
        for vector in vectors[1:]
    ]
    assert engine.graphs.count == once
    assert steered[0] != steered[1]
    assert engine.generate(PROMPTS, max_new_tokens=NEW) == plain
    assert engine.graphs.count == once
