"""Logits equal those of transformers: in full forwards, chunks, single tokens and ragged batches, eager and compiled.

The budget of a comparison is twice the reference's own spread: the largest difference between its eager and its sdpa
attention, on the same weights and tokens, at the length where they differ most. A product of a matrix and a vector
rounds differently from a product of matrices; so where tokens are fed one by one, the spread includes the difference
between the reference's full forward and the same fed one by one.
"""

import copy
from functools import partial

import pytest
import torch
import transformers
from helpers import ROOT, TINY, compiled_forward, few

from llama_flex import Llama, Mask, Tokenizer
from llama_flex.checkpoint.rope_scaling import RopeParameters

LENGTHS = (1, 127, 128, 129, 700)


def token_ids(vocab_size: int, length: int, batch: int = 2) -> torch.Tensor:
    """Return random ids `[batch, length]`, the same for every call."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def reference_logits(reference, ids: torch.Tensor, attention: str = "eager") -> torch.Tensor:
    """Return transformers' logits with one kind of attention."""
    reference.set_attn_implementation(attention)
    logits = reference(ids).logits
    reference.set_attn_implementation("eager")
    return logits


@pytest.fixture(scope="module")
def budget(tiny_pair):
    """A function from a TINY shape to twice the reference's spread over all LENGTHS."""
    found = {}

    def of(name: str) -> float:
        if name not in found:
            reference, model = tiny_pair(name)
            spreads = []
            for length in LENGTHS:
                ids = token_ids(model.config.vocab_size, length)
                difference = reference_logits(reference, ids) - reference_logits(reference, ids, "sdpa")
                spreads.append(difference.abs().max().item())
            found[name] = 2 * max(spreads)
        return found[name]

    return of


@pytest.fixture(scope="module")
def step_budget(tiny_pair, budget):
    """A function like `budget`, with the spread between the reference's full forward and single tokens added."""

    @torch.no_grad()
    def of(name: str) -> float:
        reference, model = tiny_pair(name)
        ids = token_ids(model.config.vocab_size, 140)
        cache = transformers.DynamicCache(config=reference.config)
        steps = [reference(part, past_key_values=cache).logits for part in ids.split(1, dim=1)]
        spread = (torch.cat(steps, dim=1) - reference_logits(reference, ids)).abs().max().item()
        return max(2 * spread, budget(name))

    return of


@torch.no_grad()
def chunked(forward, model: Llama, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the logits of ids that are appended to a cache, `chunk` at a time."""
    cache = model.new_cache(*ids.shape)
    return torch.cat([forward(part, cache=cache) for part in ids.split(chunk, dim=1)], dim=1)


@pytest.mark.parametrize("length", few([129], [1, 127, 128, 700]))
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_logits_equal_the_reference(tiny_pair, budget, name, length):
    reference, model = tiny_pair(name)
    ids = token_ids(model.config.vocab_size, length)
    expected = reference_logits(reference, ids)
    for backend in ("flex", "dense"):
        torch.testing.assert_close(model(ids, backend=backend), expected, rtol=0, atol=budget(name))


@pytest.mark.parametrize("length", few([129], [127, 700]))
@pytest.mark.parametrize("name", few(["group3"], ["gqa"]))
def test_full_forward_equals_chunks(tiny_pair, budget, name, length):
    reference, model = tiny_pair(name)
    ids = token_ids(model.config.vocab_size, length)
    expected = reference_logits(reference, ids)
    for chunk in (128, 100, 300):
        torch.testing.assert_close(chunked(model, model, ids, chunk), expected, rtol=0, atol=budget(name))


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["flex", "dense"])
def test_full_forward_equals_token_by_token(tiny_pair, step_budget, backend):
    reference, model = tiny_pair("gqa")
    ids = token_ids(model.config.vocab_size, 140)
    logits = chunked(partial(model, backend=backend), model, ids, 1)
    torch.testing.assert_close(logits, reference_logits(reference, ids), rtol=0, atol=step_budget("gqa"))


@pytest.mark.parametrize("name", few(["group3"], ["mha", "gqa"]))
def test_compiled_chunks_and_steps_equal_the_reference(tiny_pair, step_budget, name):
    """Check the two graphs of generation: chunks of 128, then single tokens across the border of a block, so that the
    last block is partly filled, then full, then followed by another."""
    reference, model = tiny_pair(name)
    ids = token_ids(model.config.vocab_size, 386)
    forward = compiled_forward(model)
    with torch.no_grad():
        cache = model.new_cache(2, 386)
        parts = [forward(ids[:, start : start + 128], cache=cache) for start in (0, 128)]
        parts += [forward(ids[:, i : i + 1], cache=cache) for i in range(256, 386)]
    torch.testing.assert_close(torch.cat(parts, 1), reference_logits(reference, ids), rtol=0, atol=step_budget(name))


@pytest.mark.parametrize("length", few([129], [1, 700]))
@torch.no_grad()
def test_compiled_full_forward_is_no_further_from_float64_than_the_reference(tiny_pair, length):
    """Compare both with float64: fused kernels round in other places than eager ones, also in the reference."""
    reference, model = tiny_pair("gqa")
    ids = token_ids(model.config.vocab_size, length)
    truth = copy.deepcopy(model).double()(ids, backend="dense")
    error = (compiled_forward(model)(ids) - truth).abs()
    theirs = (reference_logits(reference, ids) - truth).abs()
    assert error.mean() <= 1.1 * theirs.mean()
    assert error.max() <= 1.25 * theirs.max()


@pytest.mark.parametrize("compile", few([False], [True]))
@torch.no_grad()
def test_ragged_rows_equal_each_alone(tiny_pair, step_budget, compile):
    """Check that padding on the right, in a first or a later chunk, changes no row and is in no slot that is read."""
    _, model = tiny_pair("gqa")
    forward = compiled_forward(model) if compile else model
    lengths = torch.tensor([[100, 128, 1], [128, 0, 127]])  # two chunks, three rows
    ids = token_ids(model.config.vocab_size, 256, batch=3)
    cache = model.new_cache(3, 300)
    chunks = [forward(ids[:, i * 128 : (i + 1) * 128], cache=cache, lengths=lengths[i]) for i in range(2)]
    assert cache.length.tolist() == [228, 128, 128]
    for row in range(3):
        real = torch.cat([ids[row, i * 128 : i * 128 + lengths[i, row]] for i in range(2)])
        logits = torch.cat([chunks[i][row, : lengths[i, row]] for i in range(2)])
        torch.testing.assert_close(logits, model(real[None])[0], rtol=0, atol=step_budget("gqa"))


def mutated(model: Llama, change) -> Llama:
    """Return a copy of the model with a change."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model)
    return model


def wrong_theta(model):
    model.rotary.inv_freq.copy_(RopeParameters(rope_theta=10100.0).inverse_frequencies(model.config.head_dim))


def permuted_q_rows(model):
    q = model.layers[0].attention.qkv.weight[: model.config.head_dim]
    q.copy_(q.view(2, -1, q.shape[1]).transpose(0, 1).reshape(q.shape))


def wrong_eps(model):
    for layer in model.layers:
        layer.mlp.norm.eps = 1e-2


def swapped_gate_and_up(model):
    weight = model.layers[1].mlp.gate_up.weight
    weight.copy_(torch.cat(weight.chunk(2)[::-1]))


@pytest.mark.parametrize("change", [wrong_theta, permuted_q_rows, wrong_eps, swapped_gate_and_up])
@torch.no_grad()
def test_parity_would_notice(tiny_pair, budget, change):
    reference, model = tiny_pair("gqa")
    ids = token_ids(model.config.vocab_size, 129)
    difference = mutated(model, change)(ids) - reference_logits(reference, ids)
    assert difference.abs().max() > 100 * budget("gqa")


@pytest.mark.parametrize(
    "mask",
    few(
        [Mask(lambda q, kv: kv.index <= q.index + 1)],  # one token too many
        [
            Mask(lambda q, kv: kv.index < q.index),  # one token too few
            Mask(lambda q, kv: (kv.index <= q.index) & (kv.index > q.index - 128)),  # a window
        ],
    ),
)
@torch.no_grad()
def test_parity_would_notice_a_wrong_mask(tiny_pair, budget, mask):
    reference, model = tiny_pair("gqa")
    ids = token_ids(model.config.vocab_size, 140)
    for backend in ("flex", "dense"):
        difference = model(ids, mask=mask, backend=backend) - reference_logits(reference, ids)
        assert difference.abs().max() > 100 * budget("gqa")


@torch.no_grad()
def test_logits_to_keep_are_the_last_real_ones(tiny_pair):
    _, model = tiny_pair("gqa")
    ids, lengths = token_ids(512, 130, batch=3), torch.tensor([130, 7, 64])
    full = model(ids, lengths=lengths, backend="dense")
    kept = model(ids, lengths=lengths, backend="dense", logits_to_keep=3)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(kept[row], full[row, length - 3 : length])


@torch.no_grad()
def test_positions_and_segments_are_what_masks_and_rotation_read(tiny_pair):
    """Check that two documents packed into one row, each with its own positions, have the logits of each alone."""
    _, model = tiny_pair("gqa")
    ids = token_ids(512, 200, batch=1)
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    segments = (torch.arange(200) >= 90).long()[None]
    mask = Mask(lambda q, kv: (kv.index <= q.index) & (kv.segment == q.segment))
    packed = model(ids, positions=positions, segments=segments, mask=mask)
    alone = torch.cat([model(ids[:, :90]), model(ids[:, 90:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    assert (model(ids, mask=mask) - alone).abs().max() > 1e-2  # without segments and positions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids must be"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids must be"),
        ({"lengths": torch.tensor([1, 2])}, "lengths must be"),
        ({"positions": torch.arange(4)}, "positions must be"),
        ({"segments": torch.zeros(1, 3)}, "segments must be"),
        ({"logits_to_keep": 5}, "logits_to_keep"),
        ({"backend": "sdpa"}, "choose 'flex' or 'dense'"),
    ],
)
def test_wrong_arguments_are_named(tiny_pair, arguments, message):
    _, model = tiny_pair("gqa")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.zeros(1, 4, dtype=torch.long)} | arguments)


def test_gradients_without_a_backward_name_the_way_out(tiny_pair):
    _, model = tiny_pair("gqa")
    model = copy.deepcopy(model).requires_grad_()
    with pytest.raises(ValueError, match="backend='dense'"):
        model(token_ids(512, 4))


@torch.no_grad()
def test_a_full_cache_says_so(tiny_pair):
    _, model = tiny_pair("gqa")
    cache = model.new_cache(1, 128)
    model(token_ids(512, 120, batch=1), cache=cache)
    with pytest.raises(ValueError, match="larger max_length"):
        model(token_ids(512, 9, batch=1), cache=cache)
    with pytest.raises(ValueError, match="rows"):
        model(token_ids(512, 1, batch=2), cache=cache)


def test_gradients_flow_through_dense_and_equal_the_reference(tiny_pair):
    reference, model = tiny_pair("group3")
    ids = token_ids(512, 40)
    model = copy.deepcopy(model).requires_grad_()
    reference.zero_grad()
    reference(ids).logits.pow(2).mean().backward()
    model(ids, backend="dense").pow(2).mean().backward()
    expected, found = reference.model.embed_tokens.weight.grad, model.embed.weight.grad
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.weights
@pytest.mark.parametrize("length", few([129], [1, 127, 128, 700]))
@torch.no_grad()
def test_demo_logits_equal_the_reference(demo, demo_reference, length):
    ids = token_ids(49152, length, batch=1)
    expected = reference_logits(demo_reference, ids)
    # With a single token, eager and sdpa may be bit-equal: take the spread of the longest text.
    longest = token_ids(49152, 700, batch=1)
    spread = reference_logits(demo_reference, longest) - reference_logits(demo_reference, longest, "sdpa")
    torch.testing.assert_close(demo(ids), expected, rtol=0, atol=2 * spread.abs().max().item())
    assert (mutated(demo, permuted_q_rows)(ids) - expected).abs().max() > 0.1 or length == 1


@pytest.mark.exhaustive
@pytest.mark.weights
@torch.no_grad()
def test_compiled_demo_logits_equal_the_reference(demo, demo_reference):
    ids = token_ids(49152, 260, batch=1)
    expected = reference_logits(demo_reference, ids)
    spread = (reference_logits(demo_reference, ids, "sdpa") - expected).abs().max().item()
    forward, cache = compiled_forward(demo), demo.new_cache(1, 260)
    parts = [forward(ids[:, :128], cache=cache), forward(ids[:, 128:256], cache=cache)]
    parts += [forward(ids[:, i : i + 1], cache=cache) for i in range(256, 260)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2 * spread)


@pytest.mark.exhaustive
@pytest.mark.weights
@torch.no_grad()
def test_demo_bfloat16_is_no_further_from_float64_than_the_reference(demo, demo_reference, demo_folder):
    exact = copy.deepcopy(demo).double()
    model = Llama.from_pretrained(demo_folder, device="cpu", dtype=torch.bfloat16)
    reference = type(demo_reference).from_pretrained(demo_folder, dtype=torch.bfloat16, attn_implementation="eager")
    mutant = mutated(model, wrong_eps)
    errors = torch.zeros(3)  # sums of means: the largest error of a single sequence is a matter of chance
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    text = (ROOT / "LICENSE").read_text()
    for start in range(0, len(text), 1800):
        ids = torch.tensor([tokenizer.encode(text[start : start + 900])])
        truth = exact(ids, backend="dense")
        found = [model(ids, backend="dense"), reference(ids).logits, mutant(ids, backend="dense")]
        errors += torch.tensor([(logits - truth).abs().mean().item() for logits in found])
    ours, theirs, wrong = errors.tolist()
    assert ours <= theirs < wrong
