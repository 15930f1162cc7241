"""transformers' attention_mask and its packed rows: real tokens get the logits that they get there."""

import copy

import pytest
import torch
import transformers
from helpers import random_batch

from llama_flex import Capture, Llama, masks
from llama_flex import model as model_file
from llama_flex.usercode import inputs

T = 12
PADDED = {
    "left": [[0] * 5 + [1] * 7, [1] * T, [0] * 11 + [1]],
    "right": [[1] * 7 + [0] * 5, [1] * T, [1] + [0] * 11],
    "both": [[0, 0] + [1] * 7 + [0] * 3, [1] * T, [0] * T],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1], [1] * T, [0, 1] * 6],
}


@pytest.fixture(scope="module")
def wide(tiny_pair):
    """A tiny model of transformers and the same one here, in float64; there its eager attention gives padding NaN."""
    reference, model = tiny_pair("gqa")
    reference = copy.deepcopy(reference).double()
    reference.set_attn_implementation("sdpa")
    return reference, copy.deepcopy(model).double()


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions that transformers' `generate` gives."""
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


def assert_real_equal(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    """Check the logits of real tokens; frequencies are float32 on both sides."""
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=0, atol=2e-5)


@torch.no_grad()
def check(reference, model: Llama, kind: str, backend: str = "flex", dtype: torch.dtype = torch.int64) -> None:
    ids, mask = random_batch(model, T, batch=3), torch.tensor(PADDED[kind])
    expected = reference(ids, attention_mask=mask, position_ids=counted(mask)).logits
    found = model(ids, attention_mask=mask.to(dtype), backend=backend)
    assert_real_equal(found, expected, mask)
    assert found.isfinite().all()
    if kind != "holes":  # its forward counts padding in positions
        assert_real_equal(found, reference(ids, attention_mask=mask).logits, mask)


@pytest.mark.parametrize("backend", ["flex", "dense"])
@pytest.mark.parametrize("kind", PADDED)
def test_padding_anywhere_is_left_out_as_in_transformers(wide, kind, backend):
    check(*wide, kind, backend)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_the_mask_may_have_any_dtype_of_flags(wide, dtype):
    check(*wide, "left", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["flex", "dense"])
@pytest.mark.parametrize("kind", PADDED)
@torch.no_grad()
def test_padding_anywhere_is_left_out_on_cuda(wide, kind, backend):
    model, ids, mask = wide[1], random_batch(wide[1], T, batch=3), torch.tensor(PADDED[kind])
    expected, model = model(ids, attention_mask=mask, backend=backend), copy.deepcopy(model).cuda().float()
    for given in (mask, mask.cuda()):  # ids stay on the CPU
        cache = model.new_cache(3, 128)
        logits = model(ids, attention_mask=given, backend=backend, cache=cache).cpu().double()
        torch.testing.assert_close(logits[mask > 0], expected[mask > 0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_holes_with_the_positions_of_a_forward_of_transformers(wide):
    reference, model = wide
    ids, mask = random_batch(model, T, batch=3), torch.tensor(PADDED["holes"])
    positions = torch.arange(T).expand(3, -1)
    expected = reference(ids, attention_mask=mask).logits
    assert_real_equal(model(ids, attention_mask=mask, positions=positions), expected, mask)
    with pytest.raises(AssertionError):
        assert_real_equal(model(ids, attention_mask=mask), expected, mask)


def without_order(*given):
    """Break `real_tokens_first`: as if all padding were on the right."""
    _, lengths, *rest, order = inputs.real_tokens_first(*given)
    return given[1], lengths, *rest, torch.arange(order.shape[1]).expand_as(order)


def without_lengths(*given):
    """Break `real_tokens_first`: padding is real."""
    ids, _, *rest = inputs.real_tokens_first(*given)
    return ids, None, *rest


@pytest.mark.parametrize(
    ("broken", "kind"), [(without_order, "left"), (without_order, "holes"), (without_lengths, "both")]
)
def test_a_mask_that_is_not_honoured_would_be_noticed(wide, monkeypatch, broken, kind):
    monkeypatch.setattr(model_file, "real_tokens_first", broken)
    # Padding that counts as real lies behind what is: a forward does not see it, and the next one's check does.
    with pytest.raises(AssertionError if broken is without_order else ValueError):
        check(*wide, kind) if broken is without_order else check_chunks(*wide)


@torch.no_grad()
def check_chunks(reference, model: Llama) -> None:
    """Compare a prompt in two chunks, padded on the left, and three steps, with a mask that grows as transformers'."""
    ids, mask = random_batch(model, T + 3, batch=3), torch.tensor(PADDED["left"])
    cache, theirs = model.new_cache(3, T + 3), transformers.DynamicCache(config=reference.config)
    for start, end in ((0, 7), (7, T), *((n, n + 1) for n in range(T, T + 3))):
        mask = torch.nn.functional.pad(mask, (0, max(end - mask.shape[1], 0)), value=1)
        seen, new = mask[:, :end], mask[:, start:end]
        position_ids = counted(mask)[:, start:end]
        expected = reference(
            ids[:, start:end], attention_mask=seen, position_ids=position_ids, past_key_values=theirs
        ).logits
        assert_real_equal(model(ids[:, start:end], attention_mask=seen, cache=cache), expected, new)
    assert cache.length.tolist() == mask.sum(1).tolist()


def test_chunks_and_steps_with_a_cache_take_the_mask_of_all_tokens(wide):
    check_chunks(*wide)


@torch.no_grad()
def test_a_loop_over_a_left_padded_batch_gives_the_tokens_of_generate(tiny_pair):
    reference, model = tiny_pair("gqa")
    ids, mask = random_batch(model, T, batch=3), torch.tensor(PADDED["left"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(ids, attention_mask=mask, **options)[:, T:]
    cache, new = model.new_cache(3, T + 8), []
    for _ in range(8):
        ids = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1).argmax(-1)
        new.append(ids)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    assert torch.cat(new, 1).equal(expected)


@torch.no_grad()
def test_what_else_belongs_to_tokens_goes_with_them(wide):
    """Positions, segments, kept logits and captures are those of the real tokens of a row alone."""
    _, model = wide
    ids, mask = random_batch(model, T), torch.tensor(PADDED["holes"][:2])
    segments, positions = torch.arange(2 * T).view(2, T) // 5, torch.arange(2 * T).view(2, T) * 2
    attributes = {"segments": segments, "positions": positions}
    options, capture = {"mask": masks.causal() & masks.document(), "backend": "dense"}, Capture("resid_post", layers=1)
    found = model(ids, attention_mask=mask, capture=capture, **attributes, **options)
    kept = model(ids, attention_mask=mask, logits_to_keep=3, **attributes, **options)
    for row in range(2):
        real, alone = mask[row] > 0, Capture("resid_post", layers=1)
        given = {name: x[row, real][None] for name, x in attributes.items()}
        expected = model(ids[row, real][None], capture=alone, **given, **options)[0]
        torch.testing.assert_close(found[row, real], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(kept[row], expected[-3:], rtol=0, atol=1e-9)
        count = int(real.sum())
        there = capture["resid_post", 1][row, :count]
        torch.testing.assert_close(there, alone["resid_post", 1][0], rtol=0, atol=1e-9)
        assert capture.tokens.index[row, :count].tolist() == list(range(count))


def test_gradients_flow_to_real_tokens_only(wide):
    _, model = wide
    ids, mask = random_batch(model, T), torch.tensor(PADDED["left"][:2])
    edit_at = torch.zeros(2, T, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    with model.embed.register_forward_hook(lambda module, args, x: x + edit_at):
        logits = model(ids, attention_mask=mask, backend="dense")
    logits[mask > 0].logsumexp(-1).sum().backward()
    assert edit_at.grad.abs().sum(-1)[0].count_nonzero() == 7  # as the hook has it, real tokens come first


FULL = torch.ones(2, T, dtype=torch.int64)
WRONG = {
    "lengths too": (lambda m, ids: m(ids, attention_mask=FULL, lengths=torch.tensor([3, 4])), "pass one of them"),
    "floats": (lambda m, ids: m(ids, attention_mask=FULL.float()), r"booleans or integers \[2, 12\] .* torch.float32"),
    "a list": (lambda m, ids: m(ids, attention_mask=[[1] * T] * 2), "found list"),
    "4-D": (lambda m, ids: m(ids, attention_mask=FULL[:, None, None]), r"\[2, 1, 1, 12\] .* mask=Mask\(...\) instead"),
    "too narrow": (lambda m, ids: m(ids, attention_mask=FULL[:, 1:]), r"found torch.int64 \[2, 11\]"),
    "too few rows": (lambda m, ids: m(ids, attention_mask=FULL[:1]), r"found torch.int64 \[1, 12\]"),
    "past without a cache": (lambda m, ids: m(ids[:, 1:], attention_mask=FULL), "describes 1 past tokens; pass their"),
    "additive": (lambda m, ids: m(ids, attention_mask=FULL - 2), "1 for real tokens and 0 for padding"),
    "no past": (
        lambda m, ids: m(ids, attention_mask=FULL, cache=filled(m, ids)),
        r"0 columns, has \[0, 0\] real tokens by row but the cache has \[12, 12\]; pass",
    ),
    "another past": (
        lambda m, ids: m(ids[:, :1], attention_mask=FULL.index_fill(1, torch.tensor(0), 0), cache=filled(m, ids)),
        r"11 columns, has \[10, 10\] .* \[12, 12\]",
    ),
}


def filled(model: Llama, ids: torch.Tensor):
    """Return a cache that holds ids."""
    cache = model.new_cache(2, 2 * T)
    model(ids, cache=cache)
    return cache


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_a_wrong_mask_is_refused_in_words(wide, name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call(wide[1], random_batch(wide[1], T))


# ---- packed rows


PACKED = torch.tensor([[*range(5), *range(4), *range(3)], [*range(9), *range(1), *range(2)]])


@torch.no_grad()
def check_packed(reference, model: Llama, segments: torch.Tensor, backend: str) -> None:
    """Compare packed rows with transformers', which reads documents from positions, and with rows of their own."""
    ids, own = random_batch(model, T), [masks.document() & mask for mask in model.default_masks]
    found = model(ids, positions=PACKED, segments=segments, mask=own, backend=backend)
    torch.testing.assert_close(found, reference(ids, position_ids=PACKED, use_cache=False).logits, rtol=0, atol=2e-5)
    for row, cuts in enumerate(([5, 4, 3], [9, 1, 2])):
        alone = [model(part[None], backend=backend)[0] for part in ids[row].split(cuts)]
        torch.testing.assert_close(found[row], torch.cat(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["flex", "dense"])
def test_rows_whose_positions_restart_are_documents_if_asked(wide, backend):
    segments = masks.segments_from_positions(PACKED)
    assert segments.tolist() == [[0] * 5 + [1] * 4 + [2] * 3, [0] * 9 + [1] + [2] * 2]
    assert segments.dtype == torch.int32
    check_packed(*wide, segments, backend)
    with pytest.raises(AssertionError):
        check_packed(*wide, segments * 0, backend)


def test_documents_begin_where_positions_jump_whatever_the_first_is():
    assert masks.segments_from_positions(torch.tensor([[7, 8, 9, 20, 21, 21]])).tolist() == [[0, 0, 0, 1, 1, 2]]
    for wrong in (torch.arange(3), torch.zeros(1, 3), [[0, 1]]):
        with pytest.raises(ValueError, match="positions must be a tensor of integers"):
            masks.segments_from_positions(wrong)
