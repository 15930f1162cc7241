"""Masks that promise never to look ahead keep the promise, whatever they are combined with."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Tokens, masks

NAMED = {
    "causal": masks.causal(),
    "sliding_window": masks.sliding_window(3),
    "sink": masks.sink(2),
    "chunked": masks.chunked(4),
    "dilated": masks.dilated(2),
    "shared_prefix": masks.shared_prefix(3),
    "fused": masks.fused(),
    "tree": masks.tree([-1, 0, 0, 1], 2),
    "document": masks.document(),
    "bidirectional": masks.bidirectional(),
    "bidirectional_window": masks.bidirectional_window(2),
    "prefix_lm": masks.prefix_lm(5),
    "global_tokens": masks.global_tokens([0, 3]),
}


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_mask_that_promises_never_to_look_ahead_does_not(data):
    tokens = Tokens.arriving(12, segments=torch.arange(12) // 5)
    mask = NAMED[data.draw(st.sampled_from(list(NAMED)))]
    for _ in range(data.draw(st.integers(0, 3))):
        other = NAMED[data.draw(st.sampled_from(list(NAMED)))]
        mask = data.draw(st.sampled_from([mask & other, mask | other, ~mask]))
    ahead = bool(mask.dense(tokens, tokens, 1)[0, 0].triu(1).any())
    assert not (mask.never_looks_ahead and ahead)
    assert mask.to("meta").never_looks_ahead == mask.never_looks_ahead


def test_all_named_masks_that_look_back_only_say_so():
    assert {name for name, mask in NAMED.items() if mask.never_looks_ahead} == {
        *("causal", "sliding_window", "sink", "chunked", "dilated", "shared_prefix", "fused", "tree")
    }
