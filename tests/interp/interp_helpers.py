"""Recordings of transformers' model at every hook point, by its own hooks, and captures that are compared with them."""

from contextlib import ExitStack

import torch
import transformers

from llama_flex import Capture, edits
from llama_flex.interp.hook_points import ATTENTION, HOOK_POINTS

PROMPTS = [[5, 9, 3, 77, 20], [8] * 130, [4, 100]]
NEW = 6  # tokens to generate, or to feed one by one
NULL_EDITS = [edits.scale(point, 1.0) for point in HOOK_POINTS]


@torch.no_grad()
def hooked(reference, ids, cache=None, kind="eager") -> dict:
    """Run transformers' model; return the tensors at all hook points, with the names and shapes that `Capture` has."""
    found = {}

    def put(layer, name, x):
        found[name, layer] = x

    # Rotated queries are no module's input or output: the attention function gets them.
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
    """Return the same as `hooked`, but feed a first chunk and then single tokens."""
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


def assert_equal(capture, expected, spread, tokens=slice(None)) -> None:
    """Check what was captured at every hook point against the reference, with twice its spread as the tolerance."""
    assert expected.keys() == spread.keys()
    for key, reference in expected.items():
        found = capture[key][:, tokens]
        assert found.shape == reference.shape
        assert (found - reference).abs().max() <= 2 * spread[key], key


def everything(**options) -> Capture:
    """Return a capture of all hook points, and of the attention of all queries."""
    return Capture(*HOOK_POINTS, ATTENTION, where=range(10**6), **options)
