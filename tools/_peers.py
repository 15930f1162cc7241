"""Run transformers on the weights of our models: the peer that the benchmarks measure against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llama_flex import Llama
from llama_flex.masks.layout import BLOCK
from llama_flex.weights import named_weights

ATTENTION = {"dynamic": "sdpa", "static": "sdpa", "flex": "flex_attention"}


def register() -> None:
    """Make a model of transformers on the meta device, before anything is compiled.

    The first such model changes what compiled graphs are guarded on; graphs made earlier would be compiled again.
    """
    with torch.device("meta"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))


def load(model: Llama, folder: Path | None, attention: str = "sdpa") -> Any:
    """Load transformers' model, with the dtype and device of ours, from the same folder or from our random weights."""
    if folder is not None:
        peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation=attention)
        return peer.to(model.device).eval().requires_grad_(False)
    config = transformers.LlamaConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    # Views of our own weights: the same tokens come out, and no second copy is needed.
    peer.load_state_dict({"lm_head.weight": model.lm_head.weight, **named_weights(model, model.config)}, assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(model.device)  # not loaded: still on the meta device
    return peer.eval().requires_grad_(False)


class Peer:
    """Greedy generation from one prompt, in one of the ways that transformers offers.

    dynamic: a growing cache, sdpa, uncompiled. static, flex: a cache of fixed size with sdpa or flex_attention, each
    step compiled (on CUDA into CUDA graphs), but not the prompt, as in transformers' own generate. Tokens stay on the
    device until the end, so that no step waits for the host to read one.
    """

    def __init__(self, model: Any, kind: str, slots: int) -> None:
        """slots: how many tokens a cache of fixed size must hold at least."""
        self.model, self.kind = model, kind
        self.slots = -(-slots // BLOCK) * BLOCK
        self.cache: Any = None
        self.step = model.forward
        if kind != "dynamic":
            self.step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=kind == "static", dynamic=False)

    @torch.no_grad()
    def decode(self, ids: Sequence[int], new: int, warm_up: int) -> tuple[float, list[int]]:
        """Generate; return the seconds from token number `warm_up` to token number `new`, and all tokens."""
        cache = self._new_cache() if self.cache is None else self.cache
        if self.kind != "dynamic":
            self.cache = cache  # kept: the CUDA graphs work on its memory
        cache.reset()
        self.model.set_attn_implementation("sdpa")
        tokens, started = [self._first(self._on_device(ids), cache)], 0.0
        self.model.set_attn_implementation(ATTENTION[self.kind])
        for count in range(1, new):
            if count == warm_up:
                tokens[-1].item()
                started = time.perf_counter()
            if self.kind != "dynamic":
                torch.compiler.cudagraph_mark_step_begin()
            tokens.append(_greedy(self.step(tokens[-1], past_key_values=cache, use_cache=True).logits))
        tokens[-1].item()
        return time.perf_counter() - started, torch.cat(tokens, 1)[0].tolist()

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> tuple[float, list[int]]:
        """Return the seconds from the call to the first token, with a fresh cache, and that token."""
        self.model.set_attn_implementation(ATTENTION[self.kind])
        given = self._on_device(ids)
        if given.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        token = int(self._first(given, self._new_cache()))
        return time.perf_counter() - started, [token]

    def _on_device(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _new_cache(self) -> Any:
        if self.kind == "dynamic":
            return transformers.DynamicCache(config=self.model.config)
        return transformers.StaticCache(config=self.model.config, max_cache_len=self.slots)

    def _first(self, ids: Tensor, cache: Any) -> Tensor:
        return _greedy(self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)


def batches(model: Any, asked: Sequence[tuple[list[int], int]]) -> float:
    """Time requests (ids, and how many new tokens) in transformers' continuous batching, greedy.

    Returns the seconds without the start of the manager, which ends with a first request that does not count.
    """
    most = max(new for _, new in asked)
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=most)

    def results(names: set[str]) -> None:
        while names:
            found = manager.get_result(timeout=60)
            if found is not None and found.is_finished():
                names.remove(found.request_id)

    with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
        results({manager.add_request(asked[0][0][::-1], max_new_tokens=8)})
        started = time.perf_counter()
        results({manager.add_request(ids, max_new_tokens=new) for ids, new in asked})
        return time.perf_counter() - started


def _greedy(logits: Tensor) -> Tensor:
    """Return the most likely next tokens `[B, 1]` after the last of logits `[B, T, V]`."""
    return logits[:, -1].argmax(-1, keepdim=True)
