"""Drafts on a CUDA device, compiled and recorded: python -m pytest -m gpu"""

from dataclasses import replace

import pytest
import torch
from speculation_helpers import EXAMPLES, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("drafter", ["oracle", "lookup", "self", "small", "model"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_drafts_change_no_example(name, drafter, compile):
    check(replace(EXAMPLES[name], device="cuda"), drafter, 0.9, compile=compile, backend="flex")


@pytest.mark.parametrize("drafter", ["oracle", "self", "model"])
@pytest.mark.parametrize("name", ["sampled", "penalties", "stops", "several"])
def test_drafts_change_no_compiled_example(name, drafter):
    check(replace(EXAMPLES[name], device="cuda"), drafter, 0.9, compile=True, backend="flex")
