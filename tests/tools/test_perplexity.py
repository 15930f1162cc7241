"""The perplexity of a text, in windows."""

import math

import pytest
import torch
from helpers import random_ids

from tools import perplexity as tool


@torch.no_grad()
def test_perplexity_is_that_of_each_window(tiny_pair, monkeypatch):
    model, ids = tiny_pair("gqa")[1], random_ids(70)
    monkeypatch.setattr(tool, "WIDTH", 30)
    logprobs = []
    for start in (0, 30, 60):
        window = torch.tensor([ids[start : start + 31]])
        each = model(window, backend="dense").double().log_softmax(-1)[0, :-1]
        logprobs += [row[token].item() for row, token in zip(each, window[0, 1:], strict=True)]
    found, count = tool.perplexity(model, ids)
    assert count == len(logprobs) == 69
    assert found == pytest.approx(math.exp(-sum(logprobs) / 69), rel=1e-5)
