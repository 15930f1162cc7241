"""Caches in 8 bits: in every form, a step computes what it does with keys and values that were rounded beforehand.

The reference has no such cache: in its forwards, edits round keys and values. In float64 it differs by 1e-12 or so:
rounding hides the difference, unless a number lies at the middle between two of 8 bits.
"""

from functools import partial

import pytest
import torch
from attention_helpers import (
    ALONE,
    COMBINATIONS,
    IN_ONE_PIECE,
    Parameters,
    Text,
    combination,
    in_pieces,
    ragged,
)
from helpers import compiled_forward, few
from kv_dtype_helpers import FAULTS, FP8, break_it, each_fault, in_8_bits, is_near, rounding, uneven

from llama_flex import Capture, Llama, masks

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def model(tiny_pair) -> Llama:
    return in_8_bits(uneven(tiny_pair("gqa")[1]))


@pytest.fixture(scope="module")
def single(tiny_pair) -> Llama:
    return in_8_bits(uneven(tiny_pair("gqa")[1], torch.float32))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


SOME = ["sliding_window", "fused", "temperature"]


def check(model: Llama, make, backend: str, count: int = 180) -> None:
    """Compare a text in a cache, in chunks and two single tokens, and ragged, with the reference."""
    text, forward, edits = Text.of(count), partial(model, backend=backend), rounding(model)
    options = make(Parameters(count))
    expected = model(**text._asdict(), backend="dense", edit=edits, **options)
    assert (model(**text._asdict(), backend="dense", **options) - expected).abs().max() > 1e-2  # rounding matters
    assert_close(in_pieces(forward, model, text, **options), expected)
    lengths = (count, count - 40)
    for b, found in enumerate(ragged(forward, model, text, lengths, (128, 128, 1, 1), **options)):
        own = make(Parameters(count, (b,)))
        assert_close(found, model(**text.row(b, lengths[b]), backend="dense", edit=edits, **own))


@pytest.mark.parametrize("backend", ["dense", "flex"])
@pytest.mark.parametrize("name", few(SOME, [n for n in ALONE if n not in (*SOME, *IN_ONE_PIECE)]))
def test_chunks_tokens_and_ragged_batches_equal_rounded_keys_and_values(model, name, backend):
    check(model, ALONE[name], backend)


@pytest.mark.parametrize("seed", few([3], [n for n in range(COMBINATIONS) if n != 3]))
def test_masks_and_scores_in_combination(model, seed):
    check(model, combination(seed), "flex")


@each_fault()
def test_the_comparison_finds(model, fault, monkeypatch):
    break_it(monkeypatch, fault)
    with pytest.raises(AssertionError):
        check(model, ALONE["causal"], "dense")


def test_keys_and_values_take_a_byte_each(model):
    found, plain = model.new_cache(2, 100), Llama.new_cache(model, 2, 100)
    assert {x.dtype for kv in found.layers for x in (kv.k, kv.v)} == {FP8}
    assert sum(kv.k.nbytes for kv in found.layers) * 8 == sum(kv.k.nbytes for kv in plain.layers)


@pytest.mark.parametrize("fault", [None, *(name for name in FAULTS if "values" in name)])
def test_a_rolling_cache(model, fault, monkeypatch):
    text, mask = Text.of(250), masks.sliding_window(60) | masks.sink(3)
    expected = model(**text._asdict(), mask=mask, backend="dense", edit=rounding(model))
    if fault is not None:
        break_it(monkeypatch, fault)
    cache, found = model.new_rolling_cache(2, 60, 3, largest_append=64), []
    assert cache.layers[0].kv_dtype == "fp8"
    for a, b in [(0, 64), (64, 128), (128, 180), *((n, n + 1) for n in range(180, 250))]:
        part = text.part(a, b)
        found.append(model(part.pop("input_ids"), **part, cache=cache, backend="dense"))
    if fault is None:
        assert_close(torch.cat(found, 1), expected)
    else:
        with pytest.raises(AssertionError):
            assert_close(torch.cat(found, 1), expected)


def test_forks_expanded_reordered_and_truncated_rows_keep_their_scales(model):
    ids, edits = Text.of(90).input_ids, rounding(model)
    cache = model.new_cache(2, 128)
    model(ids[:, :70], cache=cache)
    fork, wide = cache.fork(), cache.expand(2)
    cache.truncate(60)
    cache.reorder([1, 0])
    texts = {
        "truncated, exchanged": (cache, torch.cat((ids[[1, 0], :60], ids[:, 70:80]), 1), 60),
        "forked": (fork, torch.cat((ids[:, :70], ids[:, 75:85]), 1), 70),
        "expanded": (wide, torch.cat((ids[[0, 0, 1, 1], :70], ids[[0, 1, 0, 1], 80:90]), 1), 70),
    }
    for held, text, start in texts.values():
        expected = model(text, backend="dense", edit=edits)[:, start:]
        assert_close(model(text[:, start:], cache=held), expected)
        assert held.layers[0].k.dtype == FP8


def test_evicted_tokens_are_not_seen(model):
    ids = Text.of(50).input_ids
    cache = model.new_cache(2, 128)
    model(ids[:, :40], cache=cache)
    cache.evict(range(10, 20))
    plain = Llama.new_cache(model, 2, 128)
    model(ids[:, :40], cache=plain, edit=rounding(model))
    plain.evict(range(10, 20))
    found = model(ids[:, 40:], cache=cache)
    assert_close(found, model(ids[:, 40:], cache=plain, edit=rounding(model)))


@pytest.mark.parametrize("fault", [None, "no scale of keys"])
def test_captured_attention_is_that_of_the_cached_keys(model, fault, monkeypatch):
    ids = Text.of(60).input_ids
    (found, expected) = (Capture("z", "attention", where=range(40, 60)) for _ in range(2))
    model(ids, backend="dense", capture=expected, edit=rounding(model))
    if fault is not None:
        break_it(monkeypatch, fault)
    cache = model.new_cache(2, 128)
    for part in ids.split([50, 9, 1], 1):
        model(part, cache=cache, capture=found, backend="dense")
    same = [torch.allclose(found[site, 0], expected[site, 0], atol=1e-9) for site in ("attention", "z")]
    assert same == [fault is None] * 2


@pytest.mark.parametrize("name", few(["causal"], ["sliding_window", "alibi", "from_mask_mod"]))
@pytest.mark.parametrize("fault", [None, "no scale of keys", "no scale of values"])
def test_compiled_steps(single, model, name, fault, monkeypatch):
    if fault is not None:
        break_it(monkeypatch, fault)
    text, lengths = Text.of(258), (258, 203)
    options = ALONE[name](Parameters(7))
    forward = compiled_forward(single)
    for b, found in enumerate(ragged(forward, single, text, lengths, (128, 128, 1, 1), **options)):
        given = text.row(b, lengths[b]) | ALONE[name](Parameters(7, (b,))) | {"backend": "dense"}
        exact, reference = (x(**given, edit=rounding(model)) for x in (model, single))
        assert is_near(found, reference, exact, model(**given)) == (fault is None)
