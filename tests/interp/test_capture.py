"""Captures: which tokens, heads and layers they keep, of which runs, in how much memory; wrong ones are refused."""

import numpy as np
import pytest
import torch
from helpers import random_batch
from interp_helpers import NEW, PROMPTS, everything

from llama_flex import Capture, Engine, ScoreMod, fuse, masks
from llama_flex.interp.hook_points import ATTENTION, HOOK_POINTS


def test_rows_that_end_early_are_captured_to_their_end(pair):
    _, model, _ = pair
    engine, capture = Engine(model), Capture("resid_post", layers=1)
    stop = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[])[0].tokens[2]
    done = engine.generate(PROMPTS, max_new_tokens=NEW, stop_token_ids=[stop], capture=capture)
    assert len(done[0].tokens) < NEW == len(done[1].tokens)
    assert capture.count.tolist() == [len(p) + len(d.tokens) - 1 for p, d in zip(PROMPTS, done, strict=True)]


@torch.no_grad()
def test_a_capture_holds_what_was_requested(pair):
    _, model, _ = pair
    ids, whole = random_batch(model, 40), everything()
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
        with pytest.raises(KeyError, match="was not captured; these were"):
            some[missing]
    some.clear()
    with pytest.raises(ValueError, match="nothing was captured: nothing has run yet"):
        some.tokens  # noqa: B018
    nothing = Capture("q", where=lambda t: t.segment == 7)
    model(ids, capture=nothing)
    with pytest.raises(ValueError, match="`where` selected no token"):
        nothing.count  # noqa: B018
    with pytest.raises(KeyError, match="`where` selected no token"):
        nothing["q", 0]


@pytest.mark.exhaustive
@torch.no_grad()
def test_attention_rows_are_those_of_the_mask_and_score_function_of_their_layer(pair):
    """Check that the rows, multiplied with the values, give z of every head: under masks and score functions that
    differ by layer, with a cache from which tokens were evicted."""
    _, model, _ = pair
    ids = random_batch(model, 150)
    mask = [masks.sliding_window(9) | masks.sink(2), masks.causal()]
    score_mod = [None, ScoreMod(lambda score, q, kv: score - 0.1 * q.head * (q.index - kv.index))]
    capture, cache = everything(), model.new_cache(2, 150)
    model(ids[:, :100], cache=cache, mask=mask, score_mod=score_mod, capture=capture)
    cache.evict(range(20, 90))
    model(ids[:, 100:], cache=cache, mask=mask, score_mod=score_mod, capture=capture)
    for layer in range(2):
        rows, v = capture[ATTENTION, layer], capture["v", layer].repeat_interleave(4, 2)
        # Tokens that came after the eviction do not see the 70 keys; their indices continue from the highest held.
        z = torch.einsum("bnhs,bshd->bnhd", rows, v[:, : rows.shape[-1]])
        torch.testing.assert_close(z, capture["z", layer], rtol=0, atol=1e-4)
    assert not capture[ATTENTION, 0][:, 140, :, 20:90].any()
    assert capture[ATTENTION, 0][:, 149, :, :2].all()


@pytest.mark.exhaustive
@torch.no_grad()
def test_attention_rows_take_memory_for_the_queries_that_are_asked_for(pair, monkeypatch):
    _, model, _ = pair
    sizes = []
    weights = torch.softmax

    def spy(x, dim):
        sizes.append(x.numel())
        return weights(x, dim=dim)

    monkeypatch.setattr(torch, "softmax", spy)
    ids = random_batch(model, 1000, batch=1)
    capture = Capture(ATTENTION, layers=0, heads=3, where=range(500))
    model(ids, capture=capture)
    assert capture[ATTENTION, 0].shape == (1, 500, 1, 1000)
    assert max(sizes[-4:]) == 128 * 1000  # queries at a time x keys, of one head
    with pytest.raises(ValueError, match="select the queries"):
        Capture(ATTENTION)


def test_captures_of_fused_prompts_and_ensembles_have_their_rows(pair):
    _, model, _ = pair
    question = fuse([[5, 6, 7], [8, 9, 10, 11]], suffix=[12], positions="parallel")
    capture = Capture("resid_post", layers=0)
    Engine(model).generate([question], max_new_tokens=3, capture=capture)
    assert capture.tokens.position[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert capture.tokens.segment[0].tolist() == [1, 1, 1, 2, 2, 2, 2, -1, -1, -1]


@torch.no_grad()
def test_a_capture_keeps_no_more_memory_than_it_shows_and_where_it_is_told(pair):
    _, model, _ = pair
    capture, elsewhere = Capture(*HOOK_POINTS), Capture("q", "resid_post", device="meta")
    model(random_batch(model, 9), capture=[capture, elsewhere])
    for point in HOOK_POINTS:
        kept = capture[point, 0]
        assert kept.untyped_storage().nbytes() == kept.nbytes, point
    assert [part.device.type for _, found in elsewhere._parts for part in found.values()] == ["meta"] * 4


@torch.no_grad()
def test_wrong_captures_are_refused_in_words(pair):
    _, model, _ = pair
    ids, engine = random_batch(model, 5), Engine(model)
    capture = Capture("q")
    model(ids, capture=capture)
    for wrong, words in (
        (lambda: Capture("residual"), "capture needs some of resid_pre, q, k, v, z.*'residual'"),
        (lambda: Capture(), "found none"),
        (lambda: Capture("q", layers=[]), "layers must be numbers"),
        (lambda: Capture("q", layers="all"), "layers must be numbers"),
        (lambda: Capture("q", where=[0.5]), "selected by indices"),
        (lambda: Capture("q", layers=3.5), "layers must be numbers from 0, such as 3 or .3, 4., not .3.5."),
        (lambda: Capture("attention", heads=[], where=[1]), "heads must be numbers"),
        (lambda: Capture("q", heads=1), "heads selects heads of 'attention'"),
        (lambda: Capture("q", where=[-1]), "selected by indices from 0.* not -1"),
        (lambda: Capture("q", where="all"), "selected by indices.* not 'all'"),
        (lambda: Capture("q", where=slice(3)), "selected by indices"),
        (lambda: Capture("q", device="nope"), "device 'nope' is not known"),
        (lambda: model(ids, capture=[Capture("k"), capture, capture]), "passed twice"),
        (lambda: Capture("q", device="cuda:99"), "device 'cuda:99' does not exist"),
        (lambda: engine.generate([[3], [4], [5]], capture=capture), "holds 2 rows but the run has 3"),
        (lambda: engine.generate([[3]], capture=Capture("q", where=lambda t: t.index)), "that selects tokens"),
        (lambda: engine.generate([[3]], capture=[Capture("q"), 5]), "capture takes one Capture or a list of them"),
        (lambda: model(ids, capture=Capture("q", layers=2)), r"layers 0 to 1, not \[2\]"),
        (lambda: model(ids, capture=Capture("attention", heads=8, where=[1])), "heads 0 to 7"),
        (lambda: model(ids, capture="q"), "capture takes one Capture or a list of them, found str"),
        (lambda: model(ids, capture=Capture("q", where=torch.zeros(3, 1).long())), r"\[N\] or \[2, N\]"),
        (lambda: model(ids[:1], capture=capture), "holds 2 rows but the run has 1"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    assert capture["q", 0].shape[1] == 5  # a refused run leaves what was captured as it was
    first, second = Capture("k"), Capture("k", where=torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match=r"\[N\] or \[2, N\]"):
        model(ids, capture=[first, second])
    with pytest.raises(ValueError, match="nothing was captured"):  # nor does it fill one of two captures
        first.count  # noqa: B018
    assert Capture("q", layers=np.int64(1)).layers == (1,)
