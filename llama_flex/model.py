"""LLaMA and its kin for causal language modelling: embeddings, blocks, logits. Dimension letters: see `layers`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import weights
from .adapters.adapters import Adapters
from .attention import AttentionMetadata, Backend, build_attention_metadata
from .cache import Cache
from .checkpoint import hub, quantization, saving
from .checkpoint.generation_config import GenerationConfig
from .config import Dimensions, LlamaConfig
from .interp.capture import Capture
from .interp.edits import Edit
from .interp.hook_points import Captured, Probe, copy_tokens, run_probed
from .interp.probes import as_tuple, build_probes
from .kernels.kv_cache import KVDtype, KVFormat, given_scales, kv_dtype_of
from .kernels.modules import Embedding, matrix_of
from .layers import Block, Linear, RMSNorm, TiedLinear, apply_linear, run_blocks
from .masks import library
from .masks.layout import PackedRows, SlotCache, last_tokens
from .masks.mask import Mask
from .masks.plan import AttentionPlan, LayerAttention
from .masks.scores import ScoreMod
from .rope import RotaryEmbedding
from .tokens import Tokens
from .usercode.arguments import check_choice, whole_number
from .usercode.inputs import check_cache, check_inputs, in_order, real_tokens_first, warn_beyond_context

Run: TypeAlias = Callable[..., Any]  # runs a part of a step: takes its name, a function and the arguments


def run_eager(name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
    """Run a part of a step eagerly."""
    return function(*args)


def run_checkpointed(name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
    """Run a part of a step and keep only its inputs; the backward pass recomputes the rest (arXiv:1604.06174)."""
    return checkpoint(function, *args, use_reentrant=False)


def run_block(block: Block, *args: Any) -> Any:
    """Run one layer, passed as an argument, so that all layers share the compiled code."""
    return block(*args)


class Llama(nn.Module):
    """A model with fused parameters (q, k, v; gate, up); its output matrix is the embedding if tied."""

    adapters = property(Adapters, doc="The LoRA adapters: load, switch, train, merge and save them.")

    def __init__(self, config: LlamaConfig, generation_config: GenerationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationConfig()
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = TiedLinear(self.embed) if tied else Linear(config.hidden_size, [config.vocab_size])
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "embed" and isinstance(head := self._modules.get("lm_head"), TiedLinear):
            head.embedding = (value,)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantize: quantization.Quantization | str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a model from a Hugging Face folder or hub repository of safetensors.

        device: default the GPU if there is one. dtype: default the checkpoint's own. quantize: "int8", "fp8", "int4",
        "nf4" or another `Quantization` of the layers' matrices, or, as "int4+int8", of these and the vocabulary's,
        which are not trained then. The parameters do not require gradients until `requires_grad_()` is called. Raises
        ValueError, naming the file and what to do, for anything missing, malformed or unsupported; see `weights.load`.
        """
        if dtype is not None and dtype not in weights.DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, weights.DTYPES))}, found {dtype!r}")
        where = quantization.device_for(device, quantized := quantization.Quantization.of(quantize))
        folder = hub.resolve(path_or_repo, hub.MODEL_FILES, revision=revision, token=token)
        config, generation_config = LlamaConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config, generation_config)
        weights.load(model, config, folder, device=where, dtype=dtype, quantization=quantized)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and safetensors under Hugging Face's names, and quantised weights as compressed-tensors does.

        Loading them back is bit-exact; but a quantised embedding is written as the floats that it stands for, and if it
        is the output matrix, too, then once more as such, in its few bits. Raises ValueError for a model on the meta
        device, for NF4, fp8 in groups and act-order, and if replaced modules hold other tensors than its config.
        """
        self.check_device()
        with torch.device("meta"):
            plain = Llama(self.config)
        saving.assign(plain, self.state_dict())
        tensors, config = weights.named_weights(plain, self.config), self.config.to_dict()
        saving.save(tensors, config, self.generation_config, Path(folder))

    def blocks(self) -> Iterator[Block]:
        """Yield the layers in order, typed as Block."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    @property
    def dims(self) -> Dimensions:
        """The sizes of the modules."""
        block, (vocab_size, hidden_size) = next(self.blocks()), matrix_of(self.embed).shape
        heads = block.attention.num_heads, block.attention.num_kv_heads, block.attention.head_dim
        return Dimensions(len(self.layers), *heads, hidden_size, block.mlp.size, vocab_size)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, but for the numbers of quantised ones."""
        return matrix_of(self.embed).dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text: generation_config.json's, else config.json's."""
        return self.generation_config.eos_token_ids or self.config.eos_token_ids

    @property
    def context(self) -> int:
        """The longest sequence: `max_position_embeddings`, or less if cached keys would be invalid beyond that."""
        limit, longest = self.rotary.limit, self.config.max_position_embeddings
        return longest if limit is None else min(limit, longest)

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer, `[L]`; None for those without."""
        return [block.attention.window for block in self.blocks()]

    @property
    def default_masks(self) -> list[Mask]:
        """The mask of each layer if none is given, `[L]`: causal, or with the window that the layer was trained with;
        bidirectional if the config says `is_causal: false`."""
        of_window = {width: library.trained_mask(width, self.config.is_causal) for width in set(self.windows)}
        return [of_window[width] for width in self.windows]

    def looks_ahead_by_default(self, mask: Mask | Sequence[Mask | None] | None = None) -> bool:
        """Return whether any layer for which `mask` (as in `forward`) gives no mask attends to later tokens."""
        given = mask if isinstance(mask, Sequence) else [mask]
        return None in given and not self.default_masks[0].never_looks_ahead

    @property
    def _rotates_cached_keys(self) -> str:
        kind = self.config.rope_parameters.rope_type
        return f"beyond {self.rotary.limit} tokens rope_type {kind!r} re-rotates every key, cached ones included"

    def new_cache(self, batch_size: int, max_length: int, *, kv_dtype: KVDtype = None) -> Cache:
        """Make a cache for `batch_size` sequences of up to `max_length` tokens, on the model's device.

        kv_dtype: of keys and values, by default as the checkpoint says; "fp8": 8 bits, see `kernels.kv_cache`.
        """
        return Cache(self.dims, batch_size, max_length, KVFormat.of(self, kv_dtype))

    def new_rolling_cache(
        self, batch_size: int, window: int, sinks: int = 0, *, largest_append: int = 512, kv_dtype: KVDtype = None
    ) -> Cache:
        """Make a cache for sequences of any length that see only their last `window` and first `sinks` tokens.

        Its mask, `sliding_window(window) | sink(sinks)`, is combined (`&`) with every other; its memory does not grow.
        largest_append: the most tokens that one step may append. kv_dtype: see `new_cache`. Raises ValueError for sizes
        that are too small, and for rope types that rotate long sequences anew.
        """
        window, sinks = whole_number("window", window, least=1), whole_number("sinks", sinks, least=0)
        largest_append = whole_number("largest_append", largest_append, least=1)
        if self.rotary.limit is not None:
            raise ValueError(f"a rolling cache is unbounded, but {self._rotates_cached_keys}; use new_cache")
        slots = sinks + window - 1 + largest_append
        return Cache(self.dims, batch_size, slots, KVFormat.of(self, kv_dtype), window=window, sinks=sinks)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        backend: Backend = "flex",
        logits_to_keep: int = 0,
        capture: Capture | Sequence[Capture] | None = None,
        edit: Edit | Sequence[Edit] | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Return logits `[B, T, V]` for token ids `[B, T]`; with a cache, append the tokens to those it holds.

        lengths `[B]`: the number of real tokens in each row; the rest is padding on the right (default: all are real).
        attention_mask: the same as in transformers, see `inputs.real_tokens_first`; logits of padding are arbitrary.
        positions `[B, T]`: rotary positions (default: continue after the row's highest, or from 0). segments `[B, T]`:
        default 0.
        mask: default each layer's own, see `default_masks`. score_mod: default none. Either: one for all layers, or one
        per layer; captured tensors are moved to the model's device. logits_to_keep: compute logits for that many of
        each row's last real tokens only, `[B, logits_to_keep, V]` (0: all).
        capture, edit: one or several of each, to record and to change the tensors at hook points. recompute: keep only
        the input of each layer for the backward pass, which recomputes the rest.
        Raises ValueError for shapes that do not fit, for a cache that is full, for sequences in a cache beyond the
        length at which "dynamic" and "longrope" frequencies change (without a cache they follow the reference), and for
        gradients with a cache, or on the CPU, where FlexAttention has no backward and only backend "dense" has one.
        """
        check_inputs(input_ids, lengths, positions, segments, logits_to_keep, self.config.vocab_size)
        check_choice("backend", backend, get_args(Backend))
        b, t = input_ids.shape
        if cache is not None:
            self.check_cache(cache, b)
        order = None
        if attention_mask is not None:
            input_ids, lengths, positions, segments, order = real_tokens_first(
                attention_mask, input_ids, lengths, positions, segments, cache
            )
        lengths, positions, segments = (
            None if x is None else x.to(self.device) for x in (lengths, positions, segments)
        )
        plan = self.attention_plan(mask, score_mod, cache)
        if score_mod is not None and not torch.compiler.is_dynamo_compiling():
            start = 0 if cache is None else int(cache.length.max())
            plan.check_new_tokens(t, positions, segments, start, self.dims.num_heads)
        captures = as_tuple(capture, Capture, "capture")
        probes = self.probes(captures, edit, b)
        input_ids = input_ids.to(self.device)
        if (cache is None or cache.window is None) and not torch.compiler.is_dynamo_compiling():
            warn_beyond_context(t, lengths, cache, self.config.max_position_embeddings, self.device)
        if cache is not None:
            end = positions + 1 if positions is not None else cache.next_position + (t if lengths is None else lengths)
            if self.rotary.limit is not None and (longest := int(end.max())) > self.rotary.limit:
                raise ValueError(f"the cache would hold {longest} tokens, but {self._rotates_cached_keys}; use none")
        with nullcontext() if cache is None else cache.appending(t):
            run, active = run_checkpointed if recompute else run_eager, self._buffers.get("adapter")
            x, captured = self.step(input_ids, lengths, positions, segments, cache, plan, backend, run, probes, active)
            for each in captures:
                assert captured is not None
                each.add(captured, plan, cache)
            if logits_to_keep:
                x = last_tokens(x, lengths, logits_to_keep)
            elif order is not None:
                x = in_order(x, order.argsort(1))
            return self.head(x, active)

    def step(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        cache: SlotCache | None,
        plan: AttentionPlan,
        backend: Backend,
        run: Run = run_eager,
        probes: Mapping[int, Probe] | None = None,
        adapters: Tensor | None = None,
    ) -> tuple[Tensor, Captured | None]:
        """Run the layers without checks and head; return the last one's output `[B, T, E]`, or packed, and captures.

        Its parts, `prepare_inputs` and each layer, are tensor operations only; `run` may compile them. What one kernel
        computes, layers of an uncompiled step on a CPU, needs no `run`. probes: by layer, see `probes.build_probes`.
        adapters: each row's number, `[B, 1]` or `[1, 1]`; None for the bare model.
        """
        probes = probes or {}
        given = input_ids, lengths, positions, segments, cache, plan.variants, backend, self.dims.num_heads, adapters
        x, metadata = run("prepare_inputs", Llama.prepare_inputs, self, *given)
        captured = Captured(run("tokens", copy_tokens, metadata[0].q), {}, given_scales(self)) if probes else None
        kvs = [None] * len(self.layers) if cache is None else cache.layers
        layers = list(zip(self.layers, [metadata[variant] for variant in plan.of_layer], kvs, strict=True))
        if not probes and adapters is None and (y := run_blocks(x, layers)) is not None:
            return y, None
        for i, (block, each, kv) in enumerate(layers):
            name, args = f"block, variant {plan.of_layer[i]}", (x, each, kv)
            if captured is None or (probe := probes.get(i)) is None:
                x = run(name, run_block, block, *args)
            else:
                x, read = run((name, probe.structure), run_probed, probe, each.q, block, *args)
                captured.at.update({(point, i): value for point, value in read.items()})
        return x, captured

    def prepare_inputs(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        cache: SlotCache | None,
        variants: tuple[LayerAttention, ...],
        backend: Backend,
        num_heads: int,
        adapters: Tensor | None = None,
    ) -> tuple[Tensor, list[AttentionMetadata]]:
        """Embed the tokens, `[B, T, E]`, assign their cache slots, and build the attention metadata of each variant.

        If the cache has `token_indices`, tokens, rotary and slots are packed, `[1, N]`; the metadata's q and visible
        keep `[B, T]`.
        """
        b, t = input_ids.shape
        column = torch.arange(t, dtype=torch.int32, device=input_ids.device).expand(b, t)
        index = column if cache is None else cache.length[:, None] + column
        if positions is None:
            assert cache is None or isinstance(cache, Cache)  # steps of a paged cache are given positions
            positions = column if cache is None else cache.next_position[:, None] + column
        tokens = Tokens(
            index if lengths is None else torch.where(column < lengths[:, None], index, -1),
            positions.to(torch.int32),
            torch.zeros_like(index) if segments is None else segments.to(torch.int32),
        )
        slots = None if cache is None else cache.append(tokens)
        kv, pages, chosen = (tokens, None, None) if cache is None else (cache.tokens, cache.pages, cache.token_indices)
        if isinstance(cache, Cache) and not torch.compiler.is_dynamo_compiling():
            kv = kv.map(lambda x: x[:, : cache.slots_in_use])
        packed = None if chosen is None else PackedRows.of(chosen, (b, t))
        queries = tokens
        if packed is not None and slots is not None:
            input_ids, slots, queries = packed.pack(input_ids), packed.pack(slots), Tokens(*map(packed.pack, tokens))
            adapters = None if adapters is None else packed.pack(adapters.expand(b, t))
        layout = pages, packed, self.rotary(queries), slots, adapters
        metadata = [build_attention_metadata(v, tokens, kv, num_heads, backend, *layout) for v in variants]
        return apply_linear(self.embed, input_ids, adapters=adapters), metadata

    def head(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]` of the last layer's output `[B, T, E]`. adapters: see `step`."""
        return apply_linear(self.lm_head, x, norm=self.norm, adapters=adapters)

    def attention_plan(
        self,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        cache: Cache | None = None,
        fused: bool = False,
    ) -> AttentionPlan:
        """Plan the attention of each layer; see `AttentionPlan.make`. Raises ValueError.

        fused: combine the default masks with `masks.fused()`.
        """
        self.check_device()
        return AttentionPlan.make(
            mask,
            score_mod,
            default=[library.fused() & m for m in self.default_masks] if fused else self.default_masks,
            cache_mask=None if cache is None else cache.mask,
            device=self.device,
        )

    def probes(
        self, captures: Sequence[Capture], edit: Edit | Sequence[Edit] | None, rows: int, stepwise: bool = False
    ) -> dict[int, Probe]:
        """Build the probes by layer for a run of `rows` rows; see `probes.build_probes`. Raises ValueError."""
        edits = as_tuple(edit, Edit, "edit")
        return build_probes(captures, edits, rows, self.dims, self.device, self.dtype, stepwise)

    def check_device(self) -> None:
        """Raise ValueError for a model without weights."""
        if self.device.type == "meta":
            raise ValueError("the model is on the meta device, without weights; load it with Llama.from_pretrained")

    def check_cache(self, cache: Cache, batch_size: int) -> None:
        """Raise ValueError for anything but a Cache, and for one of another batch size or another model."""
        check_cache(cache, Cache, self.dims, batch_size, self.dtype, self.device, kv_dtype_of(self))
