"""The host's part of a step that is split: grammars, n-grams and users' functions between the logits and the draw."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        with _errors_end(request, errors):
            if (bits := processors.allowed(new)) is not None:
                masks[row] = bits
    if masks:
        at = to_device_async(torch.tensor(list(masks)), logits.device)
        allowed = unpack_bits(to_device_async(torch.from_numpy(np.stack(list(masks.values()))), logits.device))
        logits.index_copy_(0, at, logits[at].masked_fill(~allowed[:, : logits.shape[1]], -torch.inf))
    for request, row, processors, new in processed:
        if request not in errors and processors.functions:
            with _errors_end(request, errors):
                logits[row] = processors.apply(new, logits[row].clone())
    return errors


@contextmanager
def _errors_end(request: Request, errors: dict[Request, Exception]) -> Iterator[None]:
    """Let an error in a grammar or in the user's code end this request and no other."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything
        traceback.clear_frames(error.__traceback__)
        errors[request] = error
