"""Masks in a model: dense = eager = compiled, whatever the predicate captures or returns; their algebra and names."""

import pytest
import torch
from helpers import compiled_forward, few
from mask_helpers import PREDICATES, causal, tokens

from llama_flex import Mask, masks, scores

EAGER = ["tree", "nothing", "bidirectional_window"]


@pytest.mark.parametrize("name", few(EAGER, [name for name in PREDICATES if name not in EAGER]))
@torch.no_grad()
def test_dense_equals_eager_in_full_and_cached(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = PREDICATES[name]
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(150) // 40).expand(2, -1)
    dense = model(ids, segments=segments, mask=mask, backend="dense")
    torch.testing.assert_close(model(ids, segments=segments, mask=mask), dense, rtol=0, atol=2e-4)
    cache = model.new_cache(2, 150)
    # In pieces a mask has to be causal, and let every token attend to something.
    if name not in ("everything", "nothing", "bidirectional", "bidirectional_window", "prefix_lm"):
        steps = [
            model(ids[:, a:b], segments=segments[:, a:b], mask=mask, cache=cache)
            for a, b in ((0, 128), (128, 149), (149, 150))
        ]
        torch.testing.assert_close(torch.cat(steps, 1), dense, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name",
    few(["captured table"], ["false", "per head", "per row", "segments", "window and sink", "windows by row"]),
)
@torch.no_grad()
def test_compiled_equals_dense_in_chunks_and_steps(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = PREDICATES[name]
    ids = torch.randint(512, (2, 258), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(258) // 60).expand(2, -1).contiguous()
    dense = model(ids, segments=segments, mask=mask, backend="dense")
    cache, forward, parts = model.new_cache(2, 258), compiled_forward(model), []
    for a, b in ((0, 128), (128, 256), (256, 257), (257, 258)):
        parts.append(forward(ids[:, a:b], segments=segments[:, a:b], cache=cache, mask=mask))
    torch.testing.assert_close(torch.cat(parts, 1), dense, rtol=0, atol=2e-4)
    wrong = model(ids, segments=segments, mask=masks.causal(), backend="dense")
    assert (wrong - dense).abs().max() > 1e-2 or name == "false"


def test_masks_say_what_they_are():
    window = Mask(lambda q, kv: q.index - kv.index < 4, "window(4)")
    assert repr(masks.causal() & window | ~window) == "((causal() & window(4)) | ~window(4))"
    assert repr(Mask(causal)) == "causal"


@pytest.mark.parametrize("answer", [1, 1.0, None, torch.ones(()), torch.ones((), dtype=torch.int32)])
def test_an_answer_that_is_no_boolean_is_named(answer):
    q = tokens(torch.arange(3)[None])
    with pytest.raises(ValueError, match="a predicate returns booleans"):
        Mask(lambda q, kv: answer).dense(q, q, 1)


def test_only_rules_of_a_kind_combine():
    for wrong in (lambda: masks.causal() & (lambda q, kv: True), lambda: masks.causal() | scores.softcap(2.0)):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
