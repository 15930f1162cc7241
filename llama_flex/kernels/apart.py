"""A copy that Inductor does not fuse with attention on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

ops = torch.library.Library("llama_flex", "FRAGMENT")
# torch 2.13's compiled attention on a CPU fails if Inductor fuses what follows it into the same loop ("Unsupported for
# `epilogue_nodes`"); a copy by an operator that Inductor does not know prevents that.
ops.define("apart(Tensor x) -> Tensor")
ops.impl("apart", torch.clone, "CPU")
torch.library.register_fake("llama_flex::apart", torch.empty_like, lib=ops)


def keep_apart(x: Tensor) -> Tensor:
    """Copy attention's output in compiled steps on a CPU: Inductor must not fuse what follows with attention."""
    if not torch.compiler.is_dynamo_compiling() or x.is_cuda or x.requires_grad:
        return x
    return torch.ops.llama_flex.apart(x)
