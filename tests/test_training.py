"""Gradients: the dense backend's are the reference's, and where there are none, that is said.

The budget of a parameter's gradient is twice what the reference's eager and sdpa attention differ by, of any parameter
in relation to its largest gradient.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from llama_flex import Capture, Engine, Llama, ScoreMod, edits, masks, scores
from llama_flex.weights import named_weights

LENGTHS = (5, 130)
OPTIONS = {"backend": "dense"}


def random_ids(model, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def loss_of(logits, ids) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model: Llama, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By Hugging Face's names."""
    of = dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, [*model.parameters()]),
            strict=True,
        )
    )
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        parameter.copy_(of[name])
    return {name: tensor.clone() for name, tensor in named_weights(twin, twin.config).items()}


def reference_gradients(reference, ids, kind: str) -> dict[str, torch.Tensor]:
    reference.set_attn_implementation(kind)
    reference.zero_grad()
    loss_of(reference(ids).logits, ids).backward()
    reference.set_attn_implementation("eager")
    return {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}


@pytest.fixture
def trainable(tiny_pair):
    def of(name: str):
        reference, model = tiny_pair(name)
        return copy.deepcopy(reference), copy.deepcopy(model).requires_grad_()

    return of


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["gqa", "tied", "biases"])
def test_gradients_of_every_parameter_are_the_references(trainable, name, length):
    reference, model = trainable(name)
    ids = random_ids(model, length)
    expected, other = (reference_gradients(reference, ids, kind) for kind in ("eager", "sdpa"))
    budget = 2 * max(relative(other[key], expected[key]) for key in expected)
    found = gradients(model, loss_of(model(ids, **OPTIONS), ids))
    assert found.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}
    for key, gradient in expected.items():
        assert relative(found[key], gradient) <= budget, key
    # The mutation: a key that sees one token more than it should.
    wrong = gradients(model, loss_of(model(ids, mask=masks.prefix_lm(2), **OPTIONS), ids))
    assert max(relative(wrong[key], expected[key]) for key in expected) > 100 * budget


def compare_in_bfloat16(pair, device: str, backend: str) -> None:
    """Gradients are at most as far from those in float64 as the reference's, in the mean over a parameter."""
    reference, model = (copy.deepcopy(x).to(device, torch.bfloat16) for x in pair)
    # `to` rounds the reference's frequencies; `from_pretrained` does not.
    reference.model.rotary_emb.inv_freq = pair[0].model.rotary_emb.inv_freq.to(device)
    model.requires_grad_()
    ids = random_ids(model, 300).to(device)
    exact = reference_gradients(copy.deepcopy(reference).double(), ids, "eager")

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(((found[key] - exact[key]).abs().mean() / exact[key].abs().mean()).item() for key in exact)

    budget = error(reference_gradients(reference, ids, "sdpa"))
    assert error(gradients(model, loss_of(model(ids, backend=backend), ids))) <= budget
    # The mutation: rounded frequencies.
    model.rotary.inv_freq.copy_(model.rotary.inv_freq.bfloat16())
    assert error(gradients(model, loss_of(model(ids, backend=backend), ids))) > budget


def test_bfloat16_gradients_are_no_further_from_float64_than_the_references(tiny_pair):
    compare_in_bfloat16(tiny_pair("gqa"), "cpu", "dense")


def test_recomputing_changes_no_bit_and_keeps_less(trainable):
    _, model = trainable("gqa")
    ids, kept = random_ids(model, 130), {}
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
    texts = [random_ids(model, n, batch=1) for n in (60, 7, 130)]
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
    ids, lengths = random_ids(model, 20), torch.tensor([20, 7])
    logits = model(ids, lengths=lengths, mask=masks.causal() & ~masks.sink(3), **OPTIONS)
    found = gradients(model, logits[0].logsumexp(-1).sum() + logits[1, :7].logsumexp(-1).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_vector_is_learned_while_the_model_stays(trainable):
    """And what is captured is on the way: its gradient is that of the vector added there."""
    _, model = trainable("gqa")
    model.requires_grad_(False)
    ids, target = random_ids(model, 12, batch=1), 17
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
    # What was learned holds in FlexAttention, and in generation.
    edit = edits.add("resid_post", vector.detach(), layers=0)
    assert model(ids, edit=edit)[0, -1].argmax() == target
    (done,) = Engine(model).generate([ids[0].tolist()], max_new_tokens=1, edit=edit, stop_token_ids=[])
    assert done.tokens == [target]


def test_where_there_are_no_gradients_that_is_said(trainable):
    _, model = trainable("gqa")
    ids = random_ids(model, 5)
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\) or backend='dense'"):
        model(ids)
    with pytest.raises(ValueError, match="a cache keeps no gradients"):
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
    ids = random_ids(model, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = loss_of(model(ids, **OPTIONS), ids)
    before.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "out")
    loaded = Llama.from_pretrained(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert loaded(ids).equal(model(ids))
        assert loss_of(loaded(ids), ids) < before
