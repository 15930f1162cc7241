"""What is captured inside the layers equals transformers' hooks, and edits hold wherever the model runs.

The budget of a comparison is twice the reference's own spread: what its eager and its sdpa attention differ by at any
of the sites, and what it differs by from itself where it feeds token by token, as in `test_model`.
"""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Capture, Edit, Engine, ScoreMod, edits, fuse, masks
from llama_flex.interp.hook_points import ATTENTION, HOOK_POINTS

PROMPTS = [[5, 9, 3, 77, 20], [8] * 130, [4, 100]]
NEW = 6


@torch.no_grad()
def hooked(reference, ids, cache=None, kind="eager") -> dict:
    """All sites of transformers' model, as `Capture` names and lays them out; with a cache its keys and values."""
    found = {}

    def put(layer, name, x):
        found[name, layer] = x

    # Rotated queries are in no module's input or output; the attention function gets them.
    attend = transformers.models.llama.modeling_llama.eager_attention_forward
    if kind != "eager":
        attend = transformers.AttentionInterface()[kind]

    def attention(module, q, k, v, *rest, **more):
        i, t = module.layer_idx, q.shape[2]
        for name, x in (("q", q), ("k", k[:, :, -t:]), ("v", v[:, :, -t:])):
            put(i, name, x.transpose(1, 2))
        out, weights = attend(module, q, k, v, *rest, **more)
        put(i, "z", out)
        if weights is not None:
            put(i, ATTENTION, weights.transpose(1, 2))
        return out, weights

    transformers.AttentionInterface.register("spied", attention)
    transformers.AttentionMaskInterface.register("spied", transformers.AttentionMaskInterface()[kind])
    reference.set_attn_implementation("spied")
    with ExitStack() as hooks:

        def before(module, layer, name):
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args: put(layer, name, args[0])))

        for i, layer in enumerate(reference.model.layers):
            before(layer, i, "resid_pre")
            before(layer.post_attention_layernorm, i, "resid_mid")
            before(layer.mlp.down_proj, i, "mlp_post")
            hooks.enter_context(layer.register_forward_hook(lambda _, args, out, i=i: put(i, "resid_post", out)))
        reference(ids, past_key_values=cache, use_cache=cache is not None)
    reference.set_attn_implementation("eager")
    return found


def stepped(reference, ids) -> dict:
    """The same, fed in a chunk and then token by token."""
    cache = transformers.DynamicCache(config=reference.config)
    steps = [hooked(reference, part, cache) for part in (ids[:, :-NEW], *ids[:, -NEW:].split(1, 1))]
    most = ids.shape[1]
    whole = {}
    for key in steps[0]:
        parts = [step[key] for step in steps]
        if key[0] == ATTENTION:
            parts = [torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in parts]
        whole[key] = torch.cat(parts, 1)
    return whole


def random_ids(model, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def pair(tiny_pair):
    """(reference, model, what both are compared by: site and layer to the reference's spread)."""
    reference, model = tiny_pair("gqa")
    ids = random_ids(model, 140)
    eager, others = hooked(reference, ids), (hooked(reference, ids, kind="sdpa"), stepped(reference, ids))
    spread = {
        key: max((eager[key] - other[key]).abs().max().item() for other in others if key in other) for key in eager
    }
    return reference, model, spread


def assert_equal(capture, expected, spread, tokens=slice(None)) -> None:
    assert expected.keys() == spread.keys()
    for key, reference in expected.items():
        found = capture[key][:, tokens]
        assert found.shape == reference.shape
        assert (found - reference).abs().max() <= 2 * spread[key], key


def everything(**options) -> Capture:
    return Capture(*HOOK_POINTS, ATTENTION, where=range(10**6), **options)


@torch.no_grad()
def test_every_site_of_a_forward_is_what_the_references_hooks_see(pair):
    reference, model, spread = pair
    ids = random_ids(model, 133)
    for backend in ("flex", "dense"):
        capture = everything()
        logits = model(ids, capture=capture, backend=backend)
        assert logits.equal(model(ids, backend=backend))
        assert_equal(capture, hooked(reference, ids), spread)
    assert capture.tokens.index.equal(torch.arange(133).expand(2, -1))


@torch.no_grad()
def test_a_site_one_off_would_be_seen(pair):
    """The mutation: layers exchanged, keys not rotated, heads in another order."""
    reference, model, spread = pair
    ids = random_ids(model, 133)
    capture, expected = everything(), hooked(reference, ids)
    model(ids, capture=capture)
    for name in expected:
        mistaken = capture[name[0], 1 - name[1]]
        assert (mistaken - expected[name]).abs().max() > 100 * spread[name]
    for name in ("q", "z", ATTENTION):
        assert (capture[name, 0].flip(2) - expected[name, 0]).abs().max() > 100 * spread[name, 0]


@torch.no_grad()
def test_chunks_and_single_tokens_add_up_to_the_references(pair):
    reference, model, spread = pair
    ids = random_ids(model, 140)
    capture, cache = everything(), model.new_cache(2, 140)
    for part in (ids[:, :100], ids[:, 100:-NEW], *ids[:, -NEW:].split(1, 1)):
        model(part, cache=cache, capture=capture)
    assert_equal(capture, stepped(reference, ids), spread)


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


def test_rows_that_end_early_are_captured_to_their_end(pair):
    _, model, _ = pair
    engine, capture = Engine(model), Capture("resid_post", layers=1)
    stop = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[])[0].tokens[2]
    done = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop], capture=capture)
    assert len(done[0].tokens) < NEW == len(done[1].tokens)
    assert capture.count.tolist() == [len(p) + len(d.tokens) - 1 for p, d in zip(PROMPTS, done, strict=True)]


@torch.no_grad()
def test_what_is_kept_is_what_was_asked_for(pair):
    _, model, _ = pair
    ids, whole = random_ids(model, 40), everything()
    some = Capture("q", ATTENTION, layers=1, heads=[5, 2], where=[3, 39])
    per_row = Capture("resid_mid", where=torch.tensor([[1, 2], [4, 39]]), layers=[0])
    by_rule = Capture("v", where=lambda t: t.segment == 2)
    segments = torch.arange(40).div(10, rounding_mode="floor").expand(2, -1)
    lengths = torch.tensor([40, 25])
    model(ids, capture=[whole, some, per_row, by_rule], segments=segments, lengths=lengths)
    assert some["q", 1].shape == (2, 2, 8, 32)
    assert some["q", 1][0].equal(whole["q", 1][0, [3, 39]])
    assert some["q", 1][1, :1].equal(whole["q", 1][1, [3]])
    assert not some["q", 1][1, 1].any()  # row 1 has 25 tokens
    assert some[ATTENTION, 1][0].allclose(whole[ATTENTION, 1][0, [3, 39]][:, [5, 2]], atol=1e-6)
    assert some.count.tolist() == [2, 1]
    assert per_row["resid_mid", 0][0].equal(whole["resid_mid", 0][0, [1, 2]])
    assert per_row["resid_mid", 0][1, :1].equal(whole["resid_mid", 0][1, [4]])
    assert by_rule["v", 0].shape[1] == 10
    assert by_rule.count.tolist() == [10, 5]
    assert by_rule.tokens.segment[0].tolist() == [2] * 10
    for missing in (("q", 0), ("z", 1)):
        with pytest.raises(KeyError, match="nothing captured there"):
            some[missing]
    some.clear()
    with pytest.raises(ValueError, match="nothing was captured: there was no run yet"):
        some.tokens  # noqa: B018
    nothing = Capture("q", where=lambda t: t.segment == 7)
    model(ids, capture=nothing)
    with pytest.raises(ValueError, match="`where` chose none of its tokens"):
        nothing.count  # noqa: B018
    with pytest.raises(KeyError, match="`where` chose none of its tokens"):
        nothing["q", 0]


@torch.no_grad()
def test_attention_rows_are_those_of_the_mask_and_score_function_of_their_layer(pair):
    """Checked by what they make of the values: z of every head, under patterns that differ by layer, with a cache from
    which tokens were evicted."""
    _, model, _ = pair
    ids = random_ids(model, 150)
    mask = [masks.sliding_window(9) | masks.sink(2), masks.causal()]
    score_mod = [None, ScoreMod(lambda score, q, kv: score - 0.1 * q.head * (q.index - kv.index))]
    capture, cache = everything(), model.new_cache(2, 150)
    model(ids[:, :100], cache=cache, mask=mask, score_mod=score_mod, capture=capture)
    cache.evict(range(20, 90))
    model(ids[:, 100:], cache=cache, mask=mask, score_mod=score_mod, capture=capture)
    for layer in range(2):
        rows, v = capture[ATTENTION, layer], capture["v", layer].repeat_interleave(4, 2)
        # 70 keys are gone for those that came later, whose indices go on from the highest that is held.
        z = torch.einsum("bnhs,bshd->bnhd", rows, v[:, : rows.shape[-1]])
        torch.testing.assert_close(z, capture["z", layer], rtol=0, atol=1e-4)
    assert not capture[ATTENTION, 0][:, 140, :, 20:90].any()
    assert capture[ATTENTION, 0][:, 149, :, :2].all()


@torch.no_grad()
def test_attention_rows_take_memory_for_the_queries_that_are_asked_for(pair, monkeypatch):
    _, model, _ = pair
    sizes = []
    weights = torch.softmax

    def spy(x, dim):
        sizes.append(x.numel())
        return weights(x, dim=dim)

    monkeypatch.setattr(torch, "softmax", spy)
    ids = random_ids(model, 1000, batch=1)
    capture = Capture(ATTENTION, layers=0, heads=3, where=range(500))
    model(ids, capture=capture)
    assert capture[ATTENTION, 0].shape == (1, 500, 1, 1000)
    assert max(sizes[-4:]) == 128 * 1000  # heads x queries at once x keys
    with pytest.raises(ValueError, match="say of which queries"):
        Capture(ATTENTION)


def test_captures_of_fused_prompts_and_ensembles_have_their_rows(pair):
    _, model, _ = pair
    question = fuse([[5, 6, 7], [8, 9, 10, 11]], suffix=[12], positions="parallel")
    capture = Capture("resid_post", layers=0)
    Engine(model).generate([question], max_new_tokens=3, capture=capture)
    assert capture.tokens.position[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert capture.tokens.segment[0].tolist() == [1, 1, 1, 2, 2, 2, 2, -1, -1, -1]


NULLS = [edits.scale(site, 1.0) for site in HOOK_POINTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_edit_that_changes_nothing_changes_no_bit(pair, dtype):
    model = copy.deepcopy(pair[1]).to(dtype)
    ids = random_ids(model, 133)
    for backend in ("flex", "dense"):
        assert model(ids, edit=NULLS, backend=backend).equal(model(ids, backend=backend))
    capture = everything()
    model(ids, capture=capture)
    for layer in range(2):
        for site in HOOK_POINTS:
            patch = edits.patch(capture, site, layer)
            assert model(ids, edit=patch).equal(model(ids)), site


def test_nor_does_it_in_compiled_generation_nor_does_a_capture(pair):
    """In float32; a product by 1, as `scale` computes, may be fused with what comes before it and round differently."""
    engine = Engine(pair[1], compile=True)
    plain, null, read, scaled = (
        engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[], **options)
        for options in (
            {},
            {"edit": [Edit(site, lambda x, tokens: x) for site in HOOK_POINTS]},
            {"capture": everything()},
            {"edit": NULLS},
        )
    )
    assert plain == null == read
    assert [d.tokens for d in plain] == [d.tokens for d in scaled]
    assert all(
        abs(a - b) < 1e-5
        for p, d in zip(plain, scaled, strict=True)
        for a, b in zip(p.logprobs, d.logprobs, strict=True)
    )


@pytest.mark.parametrize("site", ["resid_post", "v"])
def test_an_edit_that_is_infinite_for_padding_changes_no_token(pair, site):
    """Padding has index -1, and what is masked still takes part in products, where 0 times infinity is none."""
    _, model, _ = pair
    edit = Edit(site, lambda x, t: x / (t.index + 1).reshape(*t.index.shape, *[1] * (x.dim() - 2)), layers=0)
    ids, lengths = random_ids(model, 133), torch.tensor([133, 20])
    with torch.no_grad():
        short = model(ids[1:, :20], edit=edit, backend="dense")
        for backend in ("flex", "dense"):
            ragged = model(ids, lengths=lengths, edit=edit, backend=backend)
            torch.testing.assert_close(ragged[1:, :20], short, rtol=0, atol=1e-4)
            assert (ragged[1:, :20] - model(ids, lengths=lengths, backend=backend)[1:, :20]).abs().max() > 1e-2
        texts = [ids[1, :20].tolist(), ids[0, :131].tolist()]
        for prompt, done in zip(texts, Engine(model).generate(texts, max_new_tokens=6, edit=edit), strict=True):
            predicted = model(torch.tensor([prompt + done.tokens]), edit=edit, backend="dense")[0, len(prompt) - 1 : -1]
            assert done.tokens == predicted.argmax(-1).tolist()


@torch.no_grad()
def test_an_edit_may_work_in_place_and_what_was_read_before_stays(pair):
    _, model, _ = pair
    ids, before, beside = random_ids(model, 9), Capture("resid_post"), Capture("resid_post", "resid_pre")

    def zero(x, tokens):
        x[..., 3] = 0
        return x

    model(ids, capture=before)
    logits = model(ids, capture=beside, edit=Edit("resid_pre", zero, layers=1))
    assert beside["resid_post", 0].equal(before["resid_post", 0])
    assert not beside["resid_pre", 1][..., 3].any()
    column = torch.arange(model.config.hidden_size)
    assert logits.equal(model(ids, edit=Edit("resid_pre", lambda x, t: x.masked_fill(column == 3, 0), layers=1)))


def steering(model) -> list[Edit]:
    """A bit of everything, each of which changes the tokens by itself (see the next test)."""
    g = torch.Generator().manual_seed(5)
    vector, rows = torch.randn(model.config.hidden_size, generator=g), torch.tensor([0.5, 1.5, 2.0])
    return [
        edits.add("resid_post", 2 * vector, layers=0),
        edits.scale("z", torch.linspace(0, 2, 8)[:, None], layers=1, where=lambda t: t.index % 3 == 0),
        edits.ablate([1, 6], layers=0),
        edits.replace("mlp_post", 0.3, where=[2, 6, 7], layers=1),
        Edit("v", lambda x, tokens: x * (1 + 0.1 * tokens.position[:, :, None, None]), layers=[0, 1]),
        Edit("q", lambda x, tokens: x * rows[: len(x), None, None, None]),
    ]


@torch.no_grad()
def test_each_edit_matters(pair):
    _, model, _ = pair
    ids = random_ids(model, 20, batch=3)
    for edit in steering(model):
        assert (model(ids, edit=edit) - model(ids)).abs().max() > 0.1, edit


@pytest.mark.parametrize("compile", [False, True])
def test_steering_in_batched_cached_decoding_equals_the_uncached_eager_run(pair, compile):
    _, model, spread = pair
    engine, edit = Engine(model, compile=compile), steering(model)
    capture = everything()
    done = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[], edit=edit, capture=capture)
    assert [d.tokens for d in done] != [
        d.tokens for d in engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[])
    ]
    # All rows at once, since one edit reads its row; padded on the right.
    texts = [prompt + d.tokens[:-1] for prompt, d in zip(PROMPTS, done, strict=True)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [3] * (longest - len(text)) for text in texts])
    lengths, full = torch.tensor([len(text) for text in texts]), everything()
    with torch.no_grad():
        logits = model(ids, lengths=lengths, edit=edit, capture=full, backend="dense").log_softmax(-1)
    for row, (prompt, d) in enumerate(zip(PROMPTS, done, strict=True)):
        new = logits[row, len(prompt) - 1 : len(prompt) - 1 + NEW]
        assert new.argmax(-1).tolist() == d.tokens
        torch.testing.assert_close(new.amax(-1), torch.tensor(d.logprobs), rtol=0, atol=1e-4)
        for key in spread:
            n = len(texts[row])
            found, expected = capture[key][row, :n], full[key][row, :n]
            if key[0] == ATTENTION:
                expected = expected[..., : found.shape[-1]]
            scale = expected.abs().max()
            assert (found - expected).abs().max() <= max(1e-4 * scale, 2 * spread[key]), key


def test_new_vectors_compile_nothing_and_other_runs_stay_as_they_were(pair):
    _, model, _ = pair
    engine = Engine(model, compile=True)
    plain = engine.generate(PROMPTS, max_new_tokens=NEW)
    count = engine.graphs.count
    # Where nobody looks, the code of a layer is what it was: nothing of sites is in its name, nor in what is compiled.
    assert {name for *_, name in engine.graphs.parts} == {"enter", "block, pattern 0", "choose"}
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


@torch.no_grad()
def test_activation_patching_moves_what_one_run_knows_into_another(pair):
    _, model, _ = pair
    clean, corrupt = random_ids(model, 30, batch=1), random_ids(model, 30, batch=1)
    corrupt[0, 4] = (corrupt[0, 4] + 7) % model.config.vocab_size
    source = Capture("resid_post", "z")
    logits = model(clean, capture=source)
    assert not model(corrupt).equal(logits)
    whole = model(corrupt, edit=edits.patch(source, "resid_post", 1))
    assert whole.equal(logits)  # the last layer decides all
    assert model(corrupt, edit=edits.patch(source, "resid_post", 0, where=range(4, 30))).allclose(logits, atol=1e-5)
    one = model(corrupt.expand(3, -1), edit=edits.patch(source, "resid_post", 0, where=[4]))
    by_hand = Edit(
        "resid_post",
        lambda x, t, new=source["resid_post", 0][:, 4]: torch.where((t.index == 4)[:, :, None], new[:, None], x),
        layers=0,
    )
    assert one.equal(model(corrupt.expand(3, -1), edit=by_hand))
    assert not one.equal(model(corrupt.expand(3, -1)))
    two = Capture("resid_post")
    model(clean.expand(2, -1), capture=two)
    with pytest.raises(ValueError, match="2 rows, this run 3"):
        model(corrupt.expand(3, -1), edit=edits.patch(two, "resid_post", 0))


@torch.no_grad()
def test_a_source_that_is_shorter_or_has_holes_patches_what_it_has(pair):
    _, model, _ = pair
    ids = random_ids(model, 30, batch=2)
    source = Capture("mlp_post", where=torch.tensor([[3, 9], [5, 28]]), layers=1)
    model(ids, capture=source)
    after = Capture("mlp_post", layers=1)
    model(ids, edit=[edits.replace("mlp_post", 0.0, layers=1), edits.patch(source, "mlp_post", 1)], capture=after)
    there = after["mlp_post", 1].any(-1)
    assert [row.nonzero()[:, 0].tolist() for row in there] == [[3, 9], [5, 28]]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_patching_a_run_with_itself_under_any_mask_and_cut_changes_nothing(pair, data):
    _, model, _ = pair
    length = data.draw(st.sampled_from([1, 2, 17, 127, 128, 129, 140]))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=3)))
    mask = data.draw(st.sampled_from([None, masks.sliding_window(5), masks.causal() & masks.chunked(16)]))
    ids, capture = random_ids(model, length), everything()
    with torch.no_grad():
        logits = model(ids, mask=mask, capture=capture)
        site, layer = data.draw(st.sampled_from(sorted(HOOK_POINTS))), data.draw(st.integers(0, 1))
        cache, parts, again = model.new_cache(2, length), [], Capture(*HOOK_POINTS)
        for part in ids.tensor_split([c for c in cuts if c < length], 1):
            edit = edits.patch(capture, site, layer)
            parts.append(model(part, mask=mask, cache=cache, edit=edit, capture=again))
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=0, atol=1e-3)
    assert again[site, layer].equal(capture[site, layer])
    assert again.tokens.index.equal(capture.tokens.index)


@torch.no_grad()
def test_wrong_questions_are_answered_in_words(pair):
    _, model, _ = pair
    ids, engine = random_ids(model, 5), Engine(model)
    capture = Capture("q")
    model(ids, capture=capture)
    for wrong, words in (
        (lambda: Capture("residual"), "capture needs some of resid_pre, q, k, v, z.*'residual'"),
        (lambda: Capture(), "found none"),
        (lambda: Capture("q", layers=[]), "layers are numbers"),
        (lambda: Capture("q", layers="all"), "layers are numbers"),
        (lambda: Capture("q", where=[0.5]), "chosen by indices"),
        (lambda: Edit("attention", lambda x, t: x), "'attention' cannot be changed"),
        (lambda: Edit("q", 3), "needs a function"),
        (lambda: edits.ablate([-1]), "heads are numbers from 0"),
        (lambda: edits.ablate(None), "ablate needs heads"),
        (lambda: model(ids, edit=edits.ablate([99])), "heads 0 to 7, not 99"),
        (lambda: engine.generate([[3]], edit=edits.ablate(8, layers=1)), "heads 0 to 7, not 8"),
        (lambda: Capture("q", layers=3.5), "layers are numbers from 0, such as 3 or .3, 4., not .3.5."),
        (lambda: Capture("attention", heads=[], where=[1]), "heads are numbers"),
        (lambda: Capture("q", heads=1), "heads are of 'attention'"),
        (lambda: Capture("q", where=[-1]), "chosen by indices from 0.* not -1"),
        (lambda: Capture("q", where="all"), "chosen by indices.* not 'all'"),
        (lambda: Capture("q", where=slice(3)), "chosen by indices"),
        (lambda: Capture("q", device="nope"), "device 'nope' is not known"),
        (lambda: edits.patch(capture, "q", [0]), "layer must be a whole number"),
        (
            lambda: engine.generate([[3]], edit=edits.add("q", torch.zeros(7))),
            "edit add at q raises RuntimeError: The size of tensor",
        ),
        (
            lambda: model(ids, edit=[NULLS[0], edits.add("q", torch.zeros(7))]),
            "edit add at q raises RuntimeError: The size of tensor",
        ),
        (lambda: model(ids, capture=[Capture("k"), capture, capture]), "given twice"),
        (lambda: Capture("q", device="cuda:99"), "device 'cuda:99' is not there"),
        (lambda: engine.generate([[3], [4], [5]], capture=capture), "holds 2 rows, the run has 3"),
        (lambda: engine.generate([[3]], capture=Capture("q", where=lambda t: t.index)), "that chooses tokens"),
        (lambda: engine.generate([[3]], capture=[Capture("q"), 5]), "capture takes one Capture or a list of them"),
        (lambda: model(ids, capture=Capture("q", layers=2)), r"layers 0 to 1, not \[2\]"),
        (lambda: model(ids, capture=Capture("attention", heads=8, where=[1])), "heads 0 to 7"),
        (lambda: model(ids, capture="q"), "capture takes one Capture or a list of them, found str"),
        (lambda: model(ids, edit=lambda x, t: x), "edit takes one Edit or a list of them, found function"),
        (lambda: model(ids, edit=Edit("z", lambda x, t: None)), "returned NoneType"),
        (lambda: model(ids, edit=Edit("z", lambda x, t: x[:, :, :2])), r"\[2, 5, 2, 32\] of \[2, 5, 8, 32\]"),
        (lambda: engine.generate([[3]], edit=Edit("z", lambda x, t: x.sum(1))), "it returns what it got, changed"),
        (lambda: model(ids, edit=edits.add("q", torch.zeros(8, 32), where=lambda t: t.index)), "that chooses tokens"),
        (lambda: model(ids, capture=Capture("q", where=torch.zeros(3, 1).long())), r"\[N\] or \[2, N\]"),
        (lambda: model(ids[:1], capture=capture), "holds 2 rows, the run has 1"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    assert capture["q", 0].shape[1] == 5  # and what was captured is as it was
    first, second = Capture("k"), Capture("k", where=torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match=r"\[N\] or \[2, N\]"):
        model(ids, capture=[first, second])
    with pytest.raises(ValueError, match="nothing was captured"):  # nor half of it
        first.count  # noqa: B018
    model(ids, capture=capture)
    with pytest.raises(ValueError, match="captured a token twice"):
        edits.patch(capture, "q", 0)
    assert Capture("q", layers=np.int64(1)).layers == (1,)


@torch.no_grad()
def test_a_capture_keeps_no_more_memory_than_it_shows_and_where_it_is_told(pair):
    _, model, _ = pair
    capture, elsewhere = Capture(*HOOK_POINTS), Capture("q", "resid_post", device="meta")
    model(random_ids(model, 9), capture=[capture, elsewhere])
    for site in HOOK_POINTS:
        kept = capture[site, 0]
        assert kept.untyped_storage().nbytes() == kept.nbytes, site
    assert [part.device.type for _, found in elsewhere._parts for part in found.values()] == ["meta"] * 4


def test_numbers_of_edits_are_no_part_of_what_is_compiled(pair):
    engine = Engine(pair[1], compile=True)
    counts, tokens = [], []
    for number in (0.5, 2.0, 3):
        options = {"edit": [edits.scale("z", number), edits.replace("mlp_post", number, where=[2, 6])]}
        (done,) = engine.generate([[5, 6, 7]], max_new_tokens=8, stop_token_ids=(), **options)
        counts.append(engine.graphs.count)
        tokens.append(done.tokens)
        (expected,) = Engine(pair[1]).generate([[5, 6, 7]], max_new_tokens=8, stop_token_ids=(), **options)
        assert done.tokens == expected.tokens
    assert counts[0] == counts[1] == counts[2]
    assert len(set(map(tuple, tokens))) == 3


@torch.no_grad()
def test_a_wide_vector_changes_a_narrow_model_as_a_narrow_one_does(pair):
    model = copy.deepcopy(pair[1]).bfloat16()
    vector = torch.linspace(-2, 2, model.config.hidden_size)
    ids = random_ids(model, 9)
    wide, narrow = (model(ids, edit=edits.add("resid_post", v, layers=0)) for v in (vector, vector.bfloat16()))
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0.1)
    assert (wide - model(ids)).abs().max() > 0.5
