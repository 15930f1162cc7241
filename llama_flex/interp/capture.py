"""Capture activations inside the layers as plain tensors, in a forward or while an engine generates.

Dimensions: B batch, N tokens captured, T tokens of a step, H heads, D head dim, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import attention_scores, attention_weights, build_attention_metadata
from ..masks.layout import SlotCache
from ..masks.plan import AttentionPlan, LayerAttention
from ..masks.selection import Where, selection
from ..tokens import Tokens
from ..usercode.arguments import named_device
from .hook_points import ATTENTION, ENTROPY, HOOK_POINTS, LSE, OF_ATTENTION, Captured, numbers_of

_QUERIES = 128  # queries whose attention weights are computed at once
_NOTHING = "nothing was captured: nothing has run yet, or `where` selected no token"


class Capture:
    """The hook points to capture in a run, and the tensors captured there.

    Pass it to `Llama.forward` or `Engine.generate`, then read `capture[site, layer]`, `[B, N, ...]`: the tokens in
    order, rows with fewer tokens padded with zeros.

    Runs append: one forward with a cache after another, an engine's chunks and decode steps. The last generated token
    was never fed, so it is not captured. Edits of a site apply before it is captured. In a run that records gradients,
    without padding, captures of all tokens are part of that graph, except attention, which is computed separately.
    """

    def __init__(
        self,
        *sites: str,
        layers: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        where: Where = None,
        device: torch.device | str | None = None,
    ) -> None:
        """sites: names of `hook_points.HOOK_POINTS`; and "attention", the attention weights `[B, N, heads, S]`, keys by
        their index, computed densely as `attention.attention_weights` defines them, "attention.lse" and
        "attention.entropy", log-sum-exp of the scores and entropy of those weights, `[B, N, heads]`. layers: default
        all. heads: of these three, default all. where: the tokens to capture, by their indices, `[N]` for all rows or
        `[B, N]`, or by a function from their attributes to booleans `[B, T]`; default all, but required for
        "attention". device: where to keep the tensors, default the model's.
        """
        known = (*HOOK_POINTS, *OF_ATTENTION)
        if not sites or not all(site in known for site in sites):
            raise ValueError(f"capture needs some of {', '.join(known)}, found {', '.join(map(repr, sites)) or 'none'}")
        if ATTENTION in sites and where is None:
            raise ValueError(
                "capturing attention takes N x S numbers per head; select the queries, such as where=range(10)"
            )
        if heads is not None and OF_ATTENTION.keys().isdisjoint(sites):
            raise ValueError(
                f"heads selects heads of {ATTENTION!r}, which is not captured; other sites always hold all heads"
            )
        self.device = None if device is None else named_device(device)
        self.sites, self.layers = frozenset(sites), numbers_of("layers", layers)
        self.heads = numbers_of("heads", heads)
        self.where = None if where is None else selection(where)
        self._parts: list[tuple[Tokens, dict[tuple[str, int], Tensor]]] = []

    def clear(self) -> None:
        """Drop everything captured."""
        self._parts.clear()

    @property
    def tokens(self) -> Tokens:
        """The attributes of the captured tokens, `[B, N]`, index -1 where a row has fewer."""
        index, position, segment = (self._join(list(each)) for each in zip(*self._tokens(), strict=True))
        valid = torch.arange(index.shape[1], device=index.device) < self.count[:, None]
        return Tokens(torch.where(valid, index, -1), position, segment)

    @property
    def count(self) -> Tensor:
        """The number of captured tokens in each row, `[B]`."""
        return torch.cat([tokens.index >= 0 for tokens in self._tokens()], 1).sum(1)

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        """Return the tensor captured at a hook point of a layer, `[B, N, ...]`. Raises KeyError if there is none."""
        parts = [found[key] for _, found in self._parts if key in found]
        if not parts:
            held = sorted({k for _, found in self._parts for k in found})
            raise KeyError(f"{key} was not captured; these were: {held}" if held else f"{key}: {_NOTHING}")
        if key[0] == ATTENTION:  # later steps have more keys
            most = max(x.shape[-1] for x in parts)
            parts = [torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in parts]
        return self._join(parts)

    def check(self, rows: int, device: torch.device) -> None:
        """Raise ValueError if this capture does not fit a run of `rows` rows."""
        if self._parts and len(self._parts[0][0].index) != rows:
            held = len(self._parts[0][0].index)
            raise ValueError(
                f"the capture holds {held} rows but the run has {rows}; call clear(), or use another capture"
            )
        if self.where is not None:
            self.where(Tokens.arriving(1, batch=rows).map(lambda x: x.to(device)))

    @property
    def num_parts(self) -> int:
        """The number of steps from which it holds tokens."""
        return len(self._parts)

    def rewind(self, parts: int, lengths: Sequence[int]) -> None:
        """Drop the tokens captured after the first `parts` steps from index `lengths` on, one for each row."""
        left = []
        for tokens, kept in self._parts[parts:]:
            ends = torch.tensor(lengths, device=tokens.index.device)[:, None]
            index = torch.where(tokens.index < ends, tokens.index, -1)
            if bool((index >= 0).any()):
                left.append((tokens._replace(index=index), kept))
        self._parts[parts:] = left

    def add(self, found: Captured, plan: AttentionPlan, cache: SlotCache | None) -> None:
        """Append the requested tensors of a step."""
        index = found.tokens.index
        chosen = index >= 0 if self.where is None else (index >= 0) & self.where(found.tokens)
        columns = chosen.any(0).nonzero()[:, 0]
        if not len(columns):
            return
        every = len(columns) == index.shape[1]

        def some(x: Tensor) -> Tensor:
            if not every:
                return x[:, columns]
            # A view of a larger tensor would keep all of it in memory.
            return x if x.requires_grad or x.untyped_storage().nbytes() == x.nbytes else x.clone()

        tokens = found.tokens.map(some)
        tokens = tokens._replace(index=torch.where(some(chosen), tokens.index, -1))
        kept = {}
        for (site, layer), x in found.at.items():
            if self.layers is not None and layer not in self.layers:
                continue
            if site in self.sites:
                kept[site, layer] = some(x)
            if site == "q" and self.sites & OF_ATTENTION.keys():
                attention = plan.variants[plan.of_layer[layer]]
                q, k, kv = some(x).transpose(1, 2), found.at["k", layer].transpose(1, 2), found.tokens
                if cache is not None:
                    held, kv = cache.layers[layer], cache.tokens
                    q, k = held.scale_queries(q), held.k if cache.pages is None else cache.pages.gather(held.k)
                elif (scales := found.scales[layer]) is not None:
                    held = scales.round(k, k)
                    q, k = held.scale_queries(q), held.k
                found_here = self._of_attention(q, k, tokens, kv, attention)
                kept |= {(name, layer): value for name, value in found_here.items()}
        device = index.device if self.device is None else self.device
        self._parts.append(
            (tokens.map(lambda x: x.to(device)), {key: x.to(device) for key, x in kept.items()}),
        )

    def _of_attention(
        self, q: Tensor, k: Tensor, tokens: Tokens, kv: Tokens, attention: LayerAttention
    ) -> dict[str, Tensor]:
        """Return those of OF_ATTENTION that are captured, of queries q `[B, H, N, D]`, a block of queries at a time."""
        heads = None if self.heads is None else torch.tensor(self.heads, device=q.device)
        parts: dict[str, list[Tensor]] = {name: [] for name in OF_ATTENTION if name in self.sites}
        for n in range(0, q.shape[2], _QUERIES):
            here = Tokens(*(x[:, n : n + _QUERIES] for x in tokens))
            metadata = build_attention_metadata(attention, here, kv, q.shape[1], "dense")
            given = q[:, :, n : n + _QUERIES], k, metadata, heads
            if ATTENTION in parts:
                parts[ATTENTION].append(_by_index(attention_weights(*given), kv.index))
            if LSE in parts or ENTROPY in parts:
                lse, entropy = lse_and_entropy(attention_scores(*given))
                for name, x in ((LSE, lse), (ENTROPY, entropy)):
                    if name in parts:
                        parts[name].append(x)
        return {name: torch.cat(part, 2).transpose(1, 2) for name, part in parts.items()}

    def _tokens(self) -> list[Tokens]:
        if not self._parts:
            raise ValueError(_NOTHING)
        return [tokens for tokens, _ in self._parts]

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate the tensors of several steps, `[B, N, ...]`, without padding between tokens."""
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        there = torch.cat([tokens.index >= 0 for tokens in self._tokens()], 1)
        if bool(there.all()):
            return x
        order = (~there).long().sort(dim=1, stable=True).indices[:, : int(there.sum(1).max())]
        row = torch.arange(len(x), device=x.device)[:, None]
        gone = ~there[row, order]
        return x[row, order].masked_fill(gone.reshape(*gone.shape, *[1] * (x.dim() - 2)), 0)


def _by_index(rows: Tensor, index: Tensor) -> Tensor:
    """Return attention weights `[B, H, N, S]` with the keys in order of arrival; index: of the slots, `[B, S]`."""
    count = int(index.max()) + 1
    place = torch.where(index < 0, count, index).long()[:, None, None]
    return rows.new_zeros(*rows.shape[:3], count + 1).scatter(3, place.expand_as(rows), rows)[..., :count]


def lse_and_entropy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of scores `[..., S]`, and the entropy of their softmax in nats, both `[...]`.

    Of scores that are all -inf: -inf, and 0. Differentiable.
    """
    lse = scores.logsumexp(-1)
    logs = scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # of the weights
    # Each term is at least 0, so nothing cancels as it would in lse - sum(weight * score); 0 * log 0 is 0.
    return lse, -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
