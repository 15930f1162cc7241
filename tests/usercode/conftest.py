"""Fixtures of the tests of usercode."""

import pytest
from usercode_helpers import CONFIG

from llama_flex import Llama


@pytest.fixture(scope="session")
def model() -> Llama:
    """A tiny random model with a context of 300 tokens."""
    return Llama(CONFIG).eval().requires_grad_(False)
