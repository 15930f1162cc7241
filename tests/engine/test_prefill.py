"""Chunks of prompts: their sizes."""

from types import SimpleNamespace

import pytest
import torch

from llama_flex.engine.prefill import _chunks, _sizes


def runner(device: str, backend: str = "flex") -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(device=torch.device(device)), backend=backend)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(0, (128,)), (1, (128,)), (128, (128,)), (129, (512, 128)), (512, (512, 128)), (9999, (512, 128))],
)
def test_chunks_are_no_larger_than_what_may_be_appended_needs(most, sizes):
    assert _sizes(runner("cpu"), 3, most) == sizes
    assert all(count <= max(most, 0) for _, _, count in _chunks(700, sizes, most)[:5])


@pytest.mark.parametrize(
    ("rows", "gigabytes", "backend", "largest"),
    [(1, 80, "flex", 8192), (2, 80, "flex", 2048), (1, 24, "flex", 2048), (1, 80, "dense", 512)],
)
def test_large_chunks_on_a_gpu_are_for_a_single_prompt_and_much_memory(monkeypatch, rows, gigabytes, backend, largest):
    found = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert _sizes(runner("cuda", backend), rows, 10**6)[0] == largest
