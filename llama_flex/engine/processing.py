"""The host's part of a step that is split: grammars, n-grams and users' functions between the logits and the draw."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..logits.processors import unpack_bits
from .request import Request
from .transfer import to_device_async


def process(logits: Tensor, rows: Sequence[tuple[Request, int]]) -> dict[Request, Exception]:
    """Apply the processors of requests to their rows of logits `[R, V]`, in place; return the errors by request, whose
    logits stay as they were. All tokens of the requests so far must have been read.

    The masks of grammars are computed while the device still works on the logits.
    """
    errors: dict[Request, Exception] = {}
    masks: dict[int, np.ndarray] = {}
    processed = [(r, row, r.processors, r.new_tokens) for r, row in rows if r.processors and not r.finished]
    for request, row, processors, new in processed:
        try:
            bits = processors.allowed(new)
        except ValueError as error:
            errors[request] = error
            continue
        if bits is not None:
            masks[row] = bits
    if masks:
        at = to_device_async(torch.tensor(list(masks)), logits.device)
        allowed = unpack_bits(to_device_async(torch.from_numpy(np.stack(list(masks.values()))), logits.device))
        logits.index_copy_(0, at, logits[at].masked_fill(~allowed[:, : logits.shape[1]], -torch.inf))
    for request, row, processors, new in processed:
        if request in errors or not processors.functions:
            continue
        try:
            logits[row] = processors.apply(new, logits[row].clone())
        except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything
            traceback.clear_frames(error.__traceback__)
            errors[request] = error
    return errors
