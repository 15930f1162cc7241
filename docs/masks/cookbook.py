"""The masks of docs/masks.md that take more than an expression; the same code stands there."""

import torch

from llama_flex import Mask, masks

widths = torch.tensor([2, 4, 7, 12])  # one for each head
by_head = Mask(lambda q, kv, widths=widths: (kv.index <= q.index) & (q.index - kv.index < widths[q.head]), "by_head")

hidden = torch.zeros(512, dtype=torch.bool)  # as long as the longest sequence
hidden[[3, 4, 8]] = True
left_out = masks.causal() & ~Mask(lambda q, kv, hidden=hidden: hidden[kv.index] & (kv.index != q.index), "hidden")


def strided(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx < 3) | (kv_idx % 4 == 3))


from_flex = Mask.from_mask_mod(strided)
