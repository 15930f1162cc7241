"""The host's part of a step that is split: grammars, n-grams and users' functions between the logits and the draw."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..logits.grammar import fill_masks
from ..logits.processors import apply_masks
from .request import Request
from .transfer import to_device_async


def process(logits: Tensor, rows: Sequence[tuple[Request, int]], bits: np.ndarray | None) -> dict[Request, Exception]:
    """Let the processors of requests work on their rows of logits `[R, V]`; return the errors by request, whose logits
    and masks may be anything. All tokens of the requests so far must have been read.

    bits: filled with the masks that `apply_masks` is to apply, int32 `[R, V // 32 + 1]`; None if no request has any.
    Functions come after the masks, and have the last word, so those of their rows are applied here.
    """
    errors: dict[Request, Exception] = {}
    processed = [(r, row, r.processors, r.new_tokens) for r, row in rows if r.processors and not r.finished]
    if bits is not None:
        bits.fill(-1)
        states = [(processors.advance(new), row) for _, row, processors, new in processed]
        fill_masks([(state, row) for state, row in states if state is not None], bits)
        for request, row, processors, new in processed:
            with _errors_end(request, errors):
                processors.complete(new, bits[row])
    for request, row, processors, new in processed:
        if processors.functions and request not in errors:
            with _errors_end(request, errors):
                own = logits[row, None].clone()
                if bits is not None:
                    own = apply_masks(own, to_device_async(torch.tensor(bits[row, None]), logits.device))
                    bits[row] = -1
                logits[row] = processors.apply(new, own[0])
    return errors


@contextmanager
def _errors_end(request: Request, errors: dict[Request, Exception]) -> Iterator[None]:
    """Let an error in a grammar or in the user's code end this request and no other."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  - runs the user's code, which may raise anything
        traceback.clear_frames(error.__traceback__)
        errors[request] = error
