"""Fixtures of the tests of captures and edits."""

import pytest
from helpers import random_batch
from interp_helpers import hooked, stepped


@pytest.fixture(scope="session")
def pair(tiny_pair):
    """A tiny model of transformers, the same model here, and the reference's spread by hook point and layer.

    The spread is the largest difference between the reference's eager and sdpa attention, and between its full forward
    and the same fed token by token.
    """
    reference, model = tiny_pair("gqa")
    ids = random_batch(model, 140)
    eager, others = hooked(reference, ids), (hooked(reference, ids, kind="sdpa"), stepped(reference, ids))
    spread = {
        key: max((eager[key] - other[key]).abs().max().item() for other in others if key in other) for key in eager
    }
    return reference, model, spread
