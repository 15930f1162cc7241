"""FlexAttention's own mask functions as masks: all of attn-gym's are the same cells, and hold in cached decoding."""

import pytest
import torch
from attn_gym import masks as gym
from attn_gym.masks.document_mask import length_to_offsets
from helpers import few
from mask_helpers import marks, random_tree
from torch.nn.attention.flex_attention import create_mask, noop_mask

from llama_flex import Mask, masks
from llama_flex.tokens import Tokens

N = 144  # tokens, a canvas of 12 x 12 for the masks of images
OFFSETS = length_to_offsets([30, 64, 1, 49], "cpu")


def chosen_tiles() -> torch.Tensor:
    """Draw the tiles of 16 tokens that each tile of queries sees: 4 of 9, others for each of 2 rows and 4 heads."""
    return torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4].clone()


GYM = {
    "causal": gym.causal_mask,
    "sliding_window": gym.generate_sliding_window(20),
    "dilated_sliding_window": gym.generate_dilated_sliding_window(30, 4),
    "prefix_lm": gym.generate_prefix_lm_mask(50),
    "document": gym.generate_doc_mask_mod(gym.causal_mask, OFFSETS),
    "document, window": gym.generate_doc_mask_mod(gym.generate_sliding_window(7), OFFSETS),
    "packed documents": gym.generate_packed_causal_doc_mask_mod(OFFSETS),
    "shared_prefix": gym.generate_shared_prefix_mask_mod(OFFSETS, torch.tensor([0, 0, 2, 0])),
    "global_sliding_window": gym.generate_global_sliding_window(9, marks(N, 0, 70)),
    "batchify": gym.batchify_mask_mod(gym.generate_sliding_window(5), 25),
    "batchify, noop": gym.batchify_mask_mod(noop_mask, 48),
    "block_diffusion": gym.generate_block_diffusion_mask(72, 8),
    "natten": gym.generate_natten(12, 12, 5, 3),
    "tiled_natten": gym.generate_tiled_natten(12, 12, 5, 3, 4, 2),
    "morton_natten": gym.generate_morton_natten(
        8, 8, 3, 5
    ),  # its canvas is a power of two; tokens beyond it see nothing
    "sta_2d": gym.generate_sta_mask_mod_2d((12, 8), (6, 4), (2, 4), 48),
    "sta_3d": gym.generate_sta_mask_mod_3d((4, 4, 8), (2, 4, 4), (2, 2, 4), 16),
    "svg, spatial": gym.generate_spatial_head_mask_mod(14, 13, 10, 3, True, 8),
    "svg, temporal": gym.generate_temporal_head_mask_mod(14, 13, 10, 4),
    "vsa": gym.generate_vsa_mask_mod(chosen_tiles(), 16),
    "vsa, padded": gym.generate_vsa_mask_mod(chosen_tiles(), 16, torch.tensor([16] * 7 + [9, 5])),
    "flamingo": gym.generate_vision_cross_attention_mask_mod(torch.tensor([[0, 70], [10, 60], [70, N]]), N // 3),
}


@pytest.mark.parametrize("name", GYM)
def test_mask_mods_of_attn_gym_are_the_same_cells(name):
    everyone = Tokens.arriving(N, batch=2)
    mask = Mask.from_mask_mod(GYM[name])
    expected = create_mask(GYM[name], 2, 4, N, N, device="cpu")
    assert torch.equal(mask.dense(everyone, everyone, 4).expand(-1, 4, -1, -1), expected)
    assert expected.any()
    assert not expected.all()
    assert repr(mask) == GYM[name].__name__


@pytest.mark.parametrize("name", few(["vsa"], [name for name in GYM if name != "vsa"]))
@torch.no_grad()
def test_mask_mods_of_attn_gym_hold_in_cached_decoding(tiny_pair, name):
    _, model = tiny_pair("mha")
    mask = Mask.from_mask_mod(GYM[name]) & masks.causal()
    ids = torch.randint(512, (2, N), generator=torch.Generator().manual_seed(0))
    full = model(ids, mask=mask, backend="dense")
    cache = model.new_cache(2, N)
    parts = [model(part, mask=mask, cache=cache) for part in ids.split([128, 14, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_drafting_masks_of_attn_gym_are_the_same_cells(seed):
    """Their queries are numbered from the start of the tree or block, their keys from the start of the prefix."""
    parents, prefix = [-1, *(max(p, 0) for p in random_tree(seed, 30)[1:])], 21
    matrix = gym.build_tree_ancestor_matrix(parents, "cpu")
    for mod in (
        gym.generate_jetspec_tree_causal_mask_mod(prefix, matrix),
        gym.generate_jetspec_training_mask_mod(21, 6),
    ):
        expected = create_mask(mod, 1, 1, 30, prefix + 30, device="cpu")
        assert torch.equal(Mask.from_mask_mod(mod).dense(Tokens.arriving(30), Tokens.arriving(51), 1), expected)
    expected = create_mask(gym.generate_jetspec_tree_causal_mask_mod(prefix, matrix), 1, 1, 30, 51, device="cpu")
    everyone = Tokens.arriving(51)
    assert torch.equal(masks.tree(parents, start=prefix).dense(everyone, everyone, 1)[:, :, prefix:], expected)
