"""Edits hold wherever the model runs: in forwards, chunks, ragged batches and cached decoding, eager and compiled."""

import copy

import pytest
import torch
from helpers import few, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from interp_helpers import NEW, NULL_EDITS, PROMPTS, everything

from llama_flex import Capture, Edit, Engine, edits, masks
from llama_flex.interp.hook_points import ATTENTION, HOOK_POINTS


@pytest.mark.parametrize("point", ["resid_post", "v"])
def test_an_edit_that_is_infinite_for_padding_changes_no_token(pair, point):
    """Check an edit that divides by 0 for padding, whose index is -1.

    Masked values still take part in products, where 0 times infinity is not a number.
    """
    _, model, _ = pair
    edit = Edit(point, lambda x, t: x / (t.index + 1).reshape(*t.index.shape, *[1] * (x.dim() - 2)), layers=0)
    ids, lengths = random_batch(model, 133), torch.tensor([133, 20])
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
    ids, before, beside = random_batch(model, 9), Capture("resid_post"), Capture("resid_post", "resid_pre")

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
    """Return edits of every kind, each of which changes the logits by itself (see the next test)."""
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
    ids = random_batch(model, 20, batch=3)
    for edit in steering(model):
        assert (model(ids, edit=edit) - model(ids)).abs().max() > 0.1, edit


@pytest.mark.parametrize("compile", few([False], [True]))
def test_steering_in_batched_cached_decoding_equals_the_uncached_eager_run(pair, compile):
    _, model, spread = pair
    engine, edit = Engine(model, compile=compile), steering(model)
    capture = everything()
    done = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[], edit=edit, capture=capture)
    assert [d.tokens for d in done] != [
        d.tokens for d in engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[])
    ]
    # All rows at once, because one edit depends on the row; padded on the right.
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


@torch.no_grad()
def test_activation_patching_moves_what_one_run_knows_into_another(pair):
    _, model, _ = pair
    clean, corrupt = random_batch(model, 30, batch=1), random_batch(model, 30, batch=1)
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
    with pytest.raises(ValueError, match="2 rows but this run has 3"):
        model(corrupt.expand(3, -1), edit=edits.patch(two, "resid_post", 0))


@torch.no_grad()
def test_a_source_that_is_shorter_or_has_holes_patches_what_it_has(pair):
    _, model, _ = pair
    ids = random_batch(model, 30, batch=2)
    source = Capture("mlp_post", where=torch.tensor([[3, 9], [5, 28]]), layers=1)
    model(ids, capture=source)
    after = Capture("mlp_post", layers=1)
    model(ids, edit=[edits.replace("mlp_post", 0.0, layers=1), edits.patch(source, "mlp_post", 1)], capture=after)
    there = after["mlp_post", 1].any(-1)
    assert [row.nonzero()[:, 0].tolist() for row in there] == [[3, 9], [5, 28]]


@pytest.mark.exhaustive
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_patching_a_run_with_itself_under_any_mask_and_cut_changes_nothing(pair, data):
    _, model, _ = pair
    length = data.draw(st.sampled_from([1, 2, 17, 127, 128, 129, 140]))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=3)))
    mask = data.draw(st.sampled_from([None, masks.sliding_window(5), masks.causal() & masks.chunked(16)]))
    ids, capture = random_batch(model, length), everything()
    with torch.no_grad():
        logits = model(ids, mask=mask, capture=capture)
        point, layer = data.draw(st.sampled_from(sorted(HOOK_POINTS))), data.draw(st.integers(0, 1))
        cache, parts, again = model.new_cache(2, length), [], Capture(*HOOK_POINTS)
        for part in ids.tensor_split([c for c in cuts if c < length], 1):
            edit = edits.patch(capture, point, layer)
            parts.append(model(part, mask=mask, cache=cache, edit=edit, capture=again))
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=0, atol=1e-3)
    assert again[point, layer].equal(capture[point, layer])
    assert again.tokens.index.equal(capture.tokens.index)


@pytest.mark.exhaustive
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
    ids = random_batch(model, 9)
    wide, narrow = (model(ids, edit=edits.add("resid_post", v, layers=0)) for v in (vector, vector.bfloat16()))
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0.1)
    assert (wide - model(ids)).abs().max() > 0.5


@torch.no_grad()
def test_wrong_edits_are_refused_in_words(pair):
    _, model, _ = pair
    ids, engine = random_batch(model, 5), Engine(model)
    capture = Capture("q")
    model(ids, capture=capture)
    for wrong, words in (
        (lambda: Edit("attention", lambda x, t: x), "'attention' cannot be edited"),
        (lambda: Edit("q", 3), "needs a function"),
        (lambda: edits.ablate([-1]), "heads must be numbers from 0"),
        (lambda: edits.ablate(None), "ablate needs heads"),
        (lambda: model(ids, edit=edits.ablate([99])), "heads 0 to 7, not 99"),
        (lambda: engine.generate([[3]], edit=edits.ablate(8, layers=1)), "heads 0 to 7, not 8"),
        (lambda: edits.patch(capture, "q", [0]), "layer must be a whole number"),
        (
            lambda: engine.generate([[3]], edit=edits.add("q", torch.zeros(7))),
            "edit add at q raises RuntimeError: The size of tensor",
        ),
        (
            lambda: model(ids, edit=[NULL_EDITS[0], edits.add("q", torch.zeros(7))]),
            "edit add at q raises RuntimeError: The size of tensor",
        ),
        (lambda: model(ids, edit=lambda x, t: x), "edit takes one Edit or a list of them, found function"),
        (lambda: model(ids, edit=Edit("z", lambda x, t: None)), "returned NoneType"),
        (
            lambda: model(ids, edit=Edit("z", lambda x, t: x[:, :, :2])),
            r"\[2, 5, 2, 32\]; it must return a tensor of shape \[2, 5, 8, 32\]",
        ),
        (lambda: engine.generate([[3]], edit=Edit("z", lambda x, t: x.sum(1))), "it must return a tensor of shape"),
        (lambda: model(ids, edit=edits.add("q", torch.zeros(8, 32), where=lambda t: t.index)), "that selects tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    assert capture["q", 0].shape[1] == 5  # a refused run leaves what was captured as it was
    model(ids, capture=capture)
    with pytest.raises(ValueError, match="captured a token twice"):
        edits.patch(capture, "q", 0)
