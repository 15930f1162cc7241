"""Tables over the vocabulary with a row for each batch slot, made once a request needs them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kinds import Kinds
from .request import Request
from .transfer import to_device_async

_DTYPES = {"seen": torch.bool, "counts": torch.int32, "bias": torch.float32, "stops": torch.bool}


class SlotTables(NamedTuple):
    """Tables `[N + 1, V]`; None if no request has needed one.

    seen: tokens of the prompt and of the text so far. counts: how often each token was generated. bias: to add to
    logits, -inf for banned tokens. stops: the stop tokens.
    """

    seen: Tensor | None = None
    counts: Tensor | None = None
    bias: Tensor | None = None
    stops: Tensor | None = None

    def with_those_of(self, kinds: Kinds, shape: tuple[int, int], device: torch.device) -> SlotTables:
        """Return these tables, and those that some kinds of sampling need besides."""
        missing = [name for name, table in self._asdict().items() if table is None and getattr(kinds, name)]
        return self._replace(**{n: torch.zeros(shape, dtype=_DTYPES[n], device=device) for n in missing})

    def only(self, kinds: Kinds) -> SlotTables:
        """Return the tables alone that some kinds of sampling need."""
        return SlotTables(**{name: table for name, table in self._asdict().items() if getattr(kinds, name)})

    def assign(self, request: Request, slot: int) -> None:
        """Initialise a slot for a request; the tables that it does not need may hold anything there, except biases."""
        sampling, kinds = request.sampling, request.kinds
        if kinds.seen and self.seen is not None:
            ids = np.concatenate([request.cached_ids, *(other.tokens[0] for other in request.sequences)])
            self.seen[slot].fill_(False).index_fill_(0, _sent(ids, self.seen.device), True)
        if kinds.counts and self.counts is not None:
            ids, times = np.unique(np.array(request.new_tokens, np.int64), return_counts=True)
            counts = to_device_async(torch.from_numpy(times.astype(np.int32)), self.counts.device)
            self.counts[slot].fill_(0).index_copy_(0, _sent(ids, self.counts.device), counts)
        if kinds.stops and self.stops is not None:
            known = [id for id in request.output_processor.stop_ids if id < self.stops.shape[1]]
            self.stops[slot].fill_(False).index_fill_(0, _sent(np.array(known), self.stops.device), True)
        if self.bias is not None:  # of a request before, perhaps
            self.bias[slot].fill_(0)
        if kinds.bias and self.bias is not None:
            sums = {**(sampling.logit_bias or {}), **dict.fromkeys(sampling.banned_tokens, -np.inf)}
            reals = to_device_async(torch.tensor(list(sums.values()), dtype=torch.float32), self.bias.device)
            self.bias[slot].index_copy_(0, _sent(np.array(list(sums)), self.bias.device), reals)


def _sent(ids: np.ndarray, device: torch.device) -> Tensor:
    return to_device_async(torch.from_numpy(ids.astype(np.int64)), device)
