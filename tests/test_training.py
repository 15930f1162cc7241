"""Gradients of the dense backend equal the reference's; where there is no backward, the error says so.

The budget of a parameter's gradient, relative to its largest entry, is twice the largest such difference between the
reference's eager and sdpa attention, over all parameters.
"""

import copy

import pytest
import torch
from helpers import few, random_batch
from torch.nn.functional import cross_entropy
from training_helpers import compare_in_bfloat16, gradients, loss_of, reference_gradients, relative

from llama_flex import Capture, Engine, Llama, ScoreMod, edits, masks, scores

OPTIONS = {"backend": "dense"}


@pytest.fixture
def trainable(tiny_pair):
    """A function from a TINY shape to copies of transformers' model and of ours, to train."""

    def of(name: str):
        reference, model = tiny_pair(name)
        return copy.deepcopy(reference), copy.deepcopy(model).requires_grad_()

    return of


@pytest.mark.parametrize("length", few([5], [130]))
@pytest.mark.parametrize("name", ["gqa", "tied", "biases"])
def test_gradients_of_every_parameter_are_the_references(trainable, name, length):
    reference, model = trainable(name)
    ids = random_batch(model, length)
    expected, other = (reference_gradients(reference, ids, kind) for kind in ("eager", "sdpa"))
    budget = 2 * max(relative(other[key], expected[key]) for key in expected)
    found = gradients(model, loss_of(model(ids, **OPTIONS), ids))
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for key, gradient in expected.items():
        assert relative(found[key], gradient) <= budget, key
    # The mutation: a mask that shows one query a token too many.
    wrong = gradients(model, loss_of(model(ids, mask=masks.prefix_lm(2), **OPTIONS), ids))
    assert max(relative(wrong[key], expected[key]) for key in expected) > 100 * budget


@pytest.mark.exhaustive
def test_bfloat16_gradients_are_no_further_from_float64_than_the_references(tiny_pair):
    compare_in_bfloat16(tiny_pair("gqa"), "cpu", "dense")


def test_recomputing_changes_no_bit_and_keeps_less(trainable):
    _, model = trainable("gqa")
    ids, kept = random_batch(model, 130), {}
    options = OPTIONS | {"mask": masks.sliding_window(20) | masks.sink(2), "score_mod": scores.softcap(4.0)}

    def losses(recompute: bool):
        sizes = {}

        def pack(x):
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(model(ids, recompute=recompute, **options), ids)
        kept[recompute] = sum(sizes.values())
        return gradients(model, loss)

    plain, again = losses(False), losses(True)
    assert all(plain[key].equal(again[key]) for key in plain)
    assert kept[True] < 0.7 * kept[False]


def test_packed_documents_have_the_gradients_of_each_alone(trainable):
    _, model = trainable("gqa")
    texts = [random_batch(model, n, batch=1) for n in (60, 7, 130)]
    segments = torch.cat([torch.full_like(text, n) for n, text in enumerate(texts)], 1)
    positions = torch.cat([torch.arange(text.shape[1])[None] for text in texts], 1)
    mask = masks.causal() & masks.document()
    packed = model(torch.cat(texts, 1), segments=segments, positions=positions, mask=mask, **OPTIONS)
    parts = packed.split([text.shape[1] for text in texts], 1)
    found = gradients(model, sum(loss_of(logits, text) for logits, text in zip(parts, texts, strict=True)))
    expected = gradients(model, sum(loss_of(model(text, **OPTIONS), text) for text in texts))
    leaking = model(torch.cat(texts, 1), positions=positions, **OPTIONS).split([text.shape[1] for text in texts], 1)
    leaked = gradients(model, sum(loss_of(logits, text) for logits, text in zip(leaking, texts, strict=True)))
    for key in expected:
        assert relative(found[key], expected[key]) < 1e-4, key
    assert max(relative(leaked[key], expected[key]) for key in expected) > 0.1


def test_padding_and_queries_that_see_nothing_leave_gradients_finite(trainable):
    _, model = trainable("gqa")
    ids, lengths = random_batch(model, 20), torch.tensor([20, 7])
    logits = model(ids, lengths=lengths, mask=masks.causal() & ~masks.sink(3), **OPTIONS)
    found = gradients(model, logits[0].logsumexp(-1).sum() + logits[1, :7].logsumexp(-1).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_vector_is_learned_while_the_model_stays(trainable):
    """Check also that a capture is part of the graph: its gradient is that of the vector added there."""
    _, model = trainable("gqa")
    model.requires_grad_(False)
    ids, target = random_batch(model, 12, batch=1), 17
    vector = torch.zeros(model.config.hidden_size, requires_grad=True)
    capture = Capture("resid_post", layers=0)
    optimizer, losses = torch.optim.Adam([vector], lr=0.1), []
    for step in range(60):
        capture.clear()
        logits = model(ids, edit=edits.add("resid_post", vector, layers=0), capture=capture, **OPTIONS)
        loss = cross_entropy(logits[:, -1], torch.tensor([target]))
        (slope, at_site) = torch.autograd.grad(loss, [vector, capture["resid_post", 0]])
        if step == 0:
            torch.testing.assert_close(at_site.sum((0, 1)), slope)
        vector.grad = slope
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 1 < losses[0]
    # The vector that was learned also works in FlexAttention, and in generation.
    edit = edits.add("resid_post", vector.detach(), layers=0)
    assert model(ids, edit=edit)[0, -1].argmax() == target
    (done,) = Engine(model).generate([ids[0].tolist()], max_new_tokens=1, edit=edit, stop_token_ids=[])
    assert done.tokens == [target]


def test_missing_gradients_are_an_error(trainable):
    _, model = trainable("gqa")
    ids = random_batch(model, 5)
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\) or backend='dense'"):
        model(ids)
    with pytest.raises(ValueError, match="a cache does not support gradients"):
        model(ids, cache=model.new_cache(2, 5), **OPTIONS)
    with torch.no_grad():
        model(ids, cache=model.new_cache(2, 5))
    frozen = model.requires_grad_(False)
    frozen(ids)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        frozen(ids, edit=edits.add("resid_pre", torch.zeros(256, requires_grad=True)))
    bias = torch.zeros(8, requires_grad=True)
    biased = {"score_mod": ScoreMod(lambda score, q, kv: score + bias[q.head])}
    with pytest.raises(ValueError, match="no backward on the CPU"):
        frozen(ids, **biased)
    with torch.no_grad():
        frozen(ids, **biased)
    frozen(ids, score_mod=ScoreMod(lambda score, q, kv: score + bias[q.head] * kv.index), **OPTIONS).sum().backward()
    assert bias.grad.any()
    assert Engine(model.requires_grad_()).generate([[5, 6]], max_new_tokens=2)[0].tokens


def test_a_trained_model_is_saved_with_what_it_learned(trainable, tmp_path):
    _, model = trainable("tied")
    ids = random_batch(model, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = loss_of(model(ids, **OPTIONS), ids)
    before.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "out")
    loaded = Llama.from_pretrained(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert loaded(ids).equal(model(ids))
        assert loss_of(loaded(ids), ids) < before
