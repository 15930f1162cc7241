"""Check the tensors that callers give to `Llama.forward`, and warn of sequences beyond the model's context."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .arguments import whole_number

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_inputs(
    input_ids: Tensor,
    lengths: Tensor | None,
    positions: Tensor | None,
    segments: Tensor | None,
    logits_to_keep: int,
    vocab_size: int,
) -> None:
    """Raise ValueError unless the arguments of `Llama.forward` fit each other and the vocabulary."""
    if not _holds(input_ids, torch.int32, torch.int64) or input_ids.dim() != 2 or not input_ids.numel():
        rule = "input_ids must be a tensor of integers [batch, tokens] with at least one token"
        raise ValueError(f"{rule}, such as torch.tensor([[1, 2, 3]]), found {_described(input_ids)}")
    b, t = input_ids.shape
    # On a GPU, ids are not checked: that would synchronise.
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = int(input_ids.min()), int(input_ids.max())
        if least < 0 or most >= vocab_size:
            raise ValueError(f"token id {least if least < 0 else most} is outside the vocabulary of {vocab_size} ids")
    for argument, value, shape in (
        ("lengths", lengths, (b,)),
        ("positions", positions, (b, t)),
        ("segments", segments, (b, t)),
    ):
        if value is not None and not (_holds(value, *_INTEGERS) and value.shape == shape):
            rule = f"{argument} must be a tensor of integers {list(shape)} to fit input_ids"
            raise ValueError(f"{rule}, found {_described(value)}")
    if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= t:
        raise ValueError(f"lengths must be from 0 to the {t} tokens given, found {lengths.tolist()}")
    if not 0 <= whole_number("logits_to_keep", logits_to_keep) <= t:
        raise ValueError(f"logits_to_keep must be from 0 to the {t} tokens given, found {logits_to_keep}")


def real_tokens_first(
    attention_mask: Tensor,
    input_ids: Tensor,
    lengths: Tensor | None,
    positions: Tensor | None,
    segments: Tensor | None,
    cache: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Translate transformers' attention_mask: return input_ids, lengths, positions and segments with each row's real
    tokens first, and the order `[B, T]` in which the tokens are now.

    attention_mask: 1 for real tokens and 0 for padding, wherever it is, `[B, T]`; with a cache `[B, past + T]`, as
    transformers passes it. The real tokens are computed as if there were no padding between or before them: their
    indices and default positions count them alone, as transformers' `generate` counts positions. Its `forward` counts
    padding, too: on the left that shifts a row's positions alike, which changes no logits unless frequencies depend on
    the length; for holes, pass its positions.
    Raises ValueError for anything else, and unless the past part has as many real tokens as the cache.
    """
    t = input_ids.shape[1]
    if lengths is not None:
        raise ValueError("lengths and attention_mask both say which tokens are real; pass one of them")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() > 2:
        found = _described(attention_mask)
        raise ValueError(f"attention_mask {found} says which tokens see which; pass that as mask=Mask(...) instead")
    fits = _holds(attention_mask, torch.bool, *_INTEGERS) and attention_mask.dim() == 2
    if not fits or len(attention_mask) != len(input_ids) or (past := attention_mask.shape[1] - t) < 0:
        rule = f"attention_mask must be a tensor of booleans or integers {list(input_ids.shape)} to fit input_ids"
        raise ValueError(f"{rule}, or [batch, past + tokens] with a cache, found {_described(attention_mask)}")
    if past and cache is None:
        raise ValueError(f"attention_mask {_described(attention_mask)} describes {past} past tokens; pass their cache")
    real = attention_mask != 0
    if not bool((real == attention_mask).all()):
        raise ValueError("attention_mask must hold 1 for real tokens and 0 for padding; pass anything else as mask=...")
    if cache is not None and (held := cache.length.tolist()) != (told := real[:, :past].sum(1).tolist()):
        raise ValueError(
            f"the past part of attention_mask, {past} columns, has {told} real tokens by row but the cache has {held}; "
            "pass [batch, past + tokens], or the lengths of the new tokens instead"
        )
    new = real[:, past:]
    order = (~new).int().sort(dim=1, stable=True).indices
    positions, segments = (None if x is None else in_order(x, order) for x in (positions, segments))
    return in_order(input_ids, order), new.sum(1), positions, segments, order


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return x `[B, T, ...]` with the tokens of each row in another order `[B, T]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], order.to(x.device)]


def check_cache(
    cache: Any,
    kind: type[Any],
    dims: Any,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: str | None = None,
) -> None:
    """Raise ValueError for anything but a `Cache` (`kind`), and for one of another batch size, or of a model of
    other `Dimensions`, dtype or device, or in its dtype if the checkpoint says `kv_dtype`."""
    if not isinstance(cache, kind):
        raise ValueError(f"cache must be made with model.new_cache, found {type(cache).__name__}")
    if cache.batch_size != batch_size:
        raise ValueError(f"the cache has {cache.batch_size} rows but the input has {batch_size}; they must match")
    keys = cache.layers[0].k
    mine = (dims.num_layers, dims.num_kv_heads, dims.head_dim, dtype, device)
    other = (len(cache.layers), keys.shape[1], keys.shape[3], cache.layers[0].model_dtype, keys.device)
    if mine != other:
        raise ValueError(f"the cache belongs to another model ({other}, not {mine}); make it with model.new_cache")
    if kv_dtype is not None and cache.layers[0].kv_dtype is None:
        raise ValueError(
            f"the cache keeps keys and values in {dtype}, but the checkpoint has scales for them in {kv_dtype!r}; make "
            "it with model.new_cache"
        )


def warn_beyond_context(count: int, lengths: Tensor | None, cache: Any, context: int, device: torch.device) -> None:
    """Warn, at the caller's line, if `count` new tokens per row, of which `lengths` are real, exceed the context.

    cache: the `Cache` that they are appended to, or None.
    """
    total = count if cache is None else cache.reserved + count
    if total > context and (lengths is not None or device.type == "cpu"):  # padding may be among them
        held = 0 if cache is None else (cache.tokens.index >= 0).sum(1)
        total = int((held + (torch.tensor(count) if lengths is None else lengths)).max())
    if total <= context:
        return
    stack = enumerate(traceback.walk_stack(sys._getframe()), 1)  # past torch's frames, of which hooks add more
    level = next((n for n, (frame, _) in stack if not _is_ours_or_torchs(frame.f_globals)), 1)
    warnings.warn(
        f"{total} tokens exceed the {context} that the model was trained for (max_position_embeddings); "
        "predictions beyond that may be meaningless",
        stacklevel=level,
    )


def _is_ours_or_torchs(module: Mapping[str, Any]) -> bool:
    return str(module.get("__name__")).partition(".")[0] in ("llama_flex", "torch")


def _holds(value: object, *kinds: torch.dtype) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype in kinds


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
