"""Tables over the vocabulary with a row for each batch slot, made once a request needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    def with_tables(self, names: Sequence[str], shape: tuple[int, int], device: torch.device) -> SlotTables:
        """Return these tables with those of the given names."""
        missing = [name for name in names if getattr(self, name) is None]
        return self._replace(**{n: torch.zeros(shape, dtype=_DTYPES[n], device=device) for n in missing})

    def only(self, names: Sequence[str]) -> SlotTables:
        """Return the tables of the given names alone."""
        return SlotTables(**{name: getattr(self, name) for name in names})

    def assign(self, request: Request, slot: int) -> None:
        """Initialise a slot for a request."""
        sampling, new = request.sampling, [step.token for step in request.steps]
        if self.bias is not None:  # of a request before, perhaps
            self.bias[slot].fill_(0)
        for name in tables_of(request):
            table = getattr(self, name)
            if name == "seen":
                ids = np.concatenate([request.cached_ids, *(other.tokens[0] for other in request.sequences)])
                table[slot].fill_(False).index_fill_(0, _sent(ids, table.device), True)
            elif name == "counts":
                ids, counts = np.unique(np.array(new, np.int64), return_counts=True)
                values = to_device_async(torch.from_numpy(counts.astype(np.int32)), table.device)
                table[slot].fill_(0).index_copy_(0, _sent(ids, table.device), values)
            elif name == "stops":
                known = [id for id in request.output_processor.stop_ids if id < table.shape[1]]
                table[slot].fill_(False).index_fill_(0, _sent(np.array(known), table.device), True)
            else:
                biases = dict(sampling.logit_bias or {}) | dict.fromkeys(sampling.banned_tokens, -np.inf)
                reals = to_device_async(torch.tensor(list(biases.values()), dtype=torch.float32), table.device)
                table[slot].index_copy_(0, _sent(np.array(list(biases)), table.device), reals)


def tables_of(request: Request) -> list[str]:
    """Return the names of the tables that a request needs."""
    s = request.sampling
    needed = {
        "seen": s.repetition_penalty != 1,
        "counts": s.presence_penalty != 0 or s.frequency_penalty != 0,
        "bias": s.logit_bias is not None or len(s.banned_tokens) > 0,
        "stops": s.min_new_tokens > 0,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def _sent(ids: np.ndarray, device: torch.device) -> Tensor:
    return to_device_async(torch.from_numpy(ids.astype(np.int64)), device)
