"""The LLaMA architecture (Touvron et al., arXiv:2302.13971; grouped-query attention arXiv:2305.13245).

Dimension letters, here and in the whole package:
B batch, T query tokens, S slots (keys), H query heads, K key/value heads, D head dim, E hidden size, F MLP size,
V vocabulary, L layers.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import attention, hub, masks, rope, weights
from .arguments import named_device, whole_number
from .attention import Backend, Layers, Pattern, View
from .cache import Cache, store
from .capture import Capture
from .config import GenerationConfig, LlamaConfig
from .edits import Edit
from .linear import RMSNorm, gated, linear
from .masks import Mask
from .paging import Packed, Rows
from .rope import Rotary, RotaryEmbedding
from .rules import Tokens
from .scores import ScoreMod
from .sites import Found, Probe, Site, copied, probed, probes, several, untouched

Run: TypeAlias = Callable[..., Any]  # runs a part of a step, as `plainly` does: its name, a function, its arguments
KV: TypeAlias = tuple[Tensor, Tensor]  # one layer's keys and values, each [B, K, S, D]
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Attention(nn.Module):
    """Grouped-query self-attention over slots, added to what it is given, normalised; one product makes q, k and v."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.attention_bias)
        self.o = nn.Linear(self.heads[0] * config.head_dim, config.hidden_size, bias=config.attention_bias)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, D]`, keys and values `[B, K, T, D]`, queries and keys rotated to their positions."""
        qkv = (
            linear(x, self.qkv.weight, self.qkv.bias, norm=self.norm).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        )
        q, k, v = qkv.split(self.heads, dim=1)
        return rope.rotate(q, *rotary), rope.rotate(k, *rotary), v

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        pattern: Pattern,
        view: View,
        kv: KV | None,
        slots: Tensor | None,
        site: Site = untouched,
    ) -> Tensor:
        projected = zip("qkv", self.project(x, rotary), strict=True)
        q, k, v = (site(name, heads.transpose(1, 2)).transpose(1, 2) for name, heads in projected)
        if kv is not None and slots is not None:
            k, v = store(kv, slots, k, v)  # [B, K, S, D]
        z = site("z", attention.attend(q, k, v, pattern, view).transpose(1, 2))  # [B, T, H, D]
        return linear(z.flatten(2), self.o.weight, self.o.bias, residual=x)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202), added to what it is given, normalised; one product makes gate and up."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, site: Site = untouched) -> Tensor:
        hidden = site("mlp_post", gated(x, self.gate_up.weight, self.gate_up.bias, norm=self.norm))
        return linear(hidden, self.down.weight, self.down.bias, residual=x)


class Block(nn.Module):
    """One layer: attention, then MLP. site: reads and changes what flows by; see `sites.SITES`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        pattern: Pattern,
        view: View,
        kv: KV | None,
        slots: Tensor | None,
        site: Site = untouched,
    ) -> Tensor:
        x = site("resid_pre", x)
        x = site("resid_mid", self.attention(x, rotary, pattern, view, kv, slots, site))
        return site("resid_post", self.mlp(x, site))


def through(block: Block, *args: Any) -> Any:
    """One layer, as a function of it, so that its compiled code serves them all."""
    return block(*args)


def plainly(name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
    """Run a part of a step as it is."""
    return function(*args)


def recomputed(name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
    """Run a part of a step, keeping nothing of it for the backward pass, which runs it again (arXiv:1604.06174)."""
    return checkpoint(function, *args, use_reentrant=False)


class Llama(nn.Module):
    """A LLaMA or Mistral for causal language modelling. Parameters are fused (q, k, v; gate, up) and tied if so
    configured."""

    def __init__(self, config: LlamaConfig, generation_config: GenerationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationConfig()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Llama:
        """Load a Hugging Face folder or hub repository of safetensors.

        device: default the GPU if there is one. dtype: default the checkpoint's own. Raises ValueError, with the file
        and the way out, for anything missing, malformed or not supported; see `weights.load` and `LlamaConfig`.
        The parameters do not require gradients until `requires_grad_()` is called.
        """
        if dtype is not None and dtype not in weights.DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, weights.DTYPES))}, found {dtype!r}")
        folder = hub.resolve(path_or_repo, hub.MODEL_FILES, revision=revision, token=token)
        config, generation_config = LlamaConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
        model = weights.load(
            lambda: cls(config, generation_config), config, folder, device=_device(device), dtype=dtype
        )
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and safetensors under Hugging Face's names; loading them back gives the same bits.

        Raises ValueError for a model without weights, on the meta device.
        """
        self.check_device()
        weights.save(self, Path(folder))

    def blocks(self) -> Iterator[Block]:
        """The layers in order, typed."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.embed.weight.dtype

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a text: generation_config.json's, else config.json's."""
        return self.generation_config.eos_token_ids or self.config.eos_token_ids

    @property
    def context(self) -> int:
        """How long a sequence may become: `max_position_embeddings`, or where its keys, already cached, would turn."""
        limit, longest = self.rotary.limit, self.config.max_position_embeddings
        return longest if limit is None else min(limit, longest)

    @property
    def _keys_turn(self) -> str:
        kind = self.config.rope_parameters.rope_type
        return f"beyond {self.rotary.limit} tokens rope_type {kind!r} rotates all keys anew, those in the cache too"

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Slots for `batch_size` sequences of up to `max_length` tokens, in the model's dtype on its device."""
        return Cache(self.config, batch_size, max_length, dtype=self.dtype, device=self.device)

    def new_rolling_cache(self, batch_size: int, window: int, sinks: int = 0, *, largest_append: int = 512) -> Cache:
        """Slots for sequences of any length that see their last `window` tokens and first `sinks` ones, no others.

        It holds the mask `sliding_window(window) | sink(sinks)`, added to any other mask, in memory that does not grow.
        largest_append: how many tokens one step may append. Raises ValueError for sizes below 1.
        """
        window, sinks = whole_number("window", window, least=1), whole_number("sinks", sinks, least=0)
        largest_append = whole_number("largest_append", largest_append, least=1)
        if self.rotary.limit is not None:
            raise ValueError(f"a rolling cache has no end, but {self._keys_turn}; use new_cache")
        slots = sinks + window - 1 + largest_append
        return Cache(self.config, batch_size, slots, window=window, sinks=sinks, dtype=self.dtype, device=self.device)

    def bytes_per_step(self, contexts: Sequence[int]) -> int:
        """Bytes a decoding step must read at least: all weights once (of an untied embedding next to nothing), and the
        keys and values of every sequence, whose lengths are given."""
        c = self.config
        weights = sum(p.nbytes for p in self.parameters()) - (0 if self.lm_head is None else self.embed.weight.nbytes)
        per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize
        window = c.sliding_window
        return weights + per_token * sum(n if window is None else min(n, window) for n in contexts)

    def forward(
        self,
        input_ids: Tensor,
        *,
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
        """Logits `[B, T, V]` of token ids `[B, T]`; with a cache the tokens are appended to what it holds.

        lengths `[B]`: how many tokens of each row are real, the rest being padding on the right (default: all).
        positions `[B, T]`: rotary positions (default: on from the highest that the row holds, or 0). segments `[B, T]`:
        default 0.
        mask: default causal, or the model's sliding window. score_mod: default none. One for all layers or one each;
        tensors they capture are moved to the model. logits_to_keep: compute only the last so many logits of each row's
        real tokens (0: all), `[B, logits_to_keep, V]`.
        capture: what to keep of what flows inside the layers; edit: how to change it; one or several. recompute: keep
        only what enters each layer for the backward pass, which computes the rest again.
        Raises ValueError for shapes that do not fit, for a cache that is full, for sequences in a cache beyond the
        length at which "dynamic" and "longrope" embeddings change (without a cache they are the reference's), and for
        gradients on the CPU, where FlexAttention has none and only backend "dense" does, or with a cache.
        """
        if not _holds(input_ids, torch.int32, torch.int64) or input_ids.dim() != 2 or not input_ids.numel():
            rule = "input_ids must be a tensor of integers [batch, tokens] with at least one token"
            raise ValueError(f"{rule}, such as torch.tensor([[1, 2, 3]]), found {_described(input_ids)}")
        b, t = input_ids.shape
        self._check_ids(input_ids)
        for argument, value, shape in (
            ("lengths", lengths, (b,)),
            ("positions", positions, (b, t)),
            ("segments", segments, (b, t)),
        ):
            if value is not None and not (_holds(value, *_INTEGERS) and value.shape == shape):
                rule = f"{argument} must be a tensor of integers {list(shape)} to fit input_ids"
                raise ValueError(f"{rule}, found {_described(value)}")
        if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= t:
            raise ValueError(f"lengths must be from 0 to the {t} tokens given, found {lengths.tolist()}")
        if not 0 <= whole_number("logits_to_keep", logits_to_keep) <= t:
            raise ValueError(f"logits_to_keep must be from 0 to the {t} tokens given, found {logits_to_keep}")
        if backend not in get_args(Backend):
            raise ValueError(f"backend {backend!r} is not known; choose 'flex' or 'dense'")
        lengths, positions, segments = (
            None if x is None else x.to(self.device) for x in (lengths, positions, segments)
        )
        if cache is not None:
            self.check_cache(cache, b)
        layers = self.attention_layers(mask, score_mod, cache)
        if score_mod is not None and not torch.compiler.is_compiling():
            self._try_last(layers, t, positions, segments, cache)
        captures = several(capture, Capture, "capture")
        probe_of = probes(self, captures, several(edit, Edit, "edit"), b)
        input_ids = input_ids.to(self.device)
        if (cache is None or cache.window is None) and not torch.compiler.is_compiling():
            self._warn_beyond_context(t, lengths, cache)
        if cache is not None:
            end = positions + 1 if positions is not None else cache.next_position + (t if lengths is None else lengths)
            if self.rotary.limit is not None and int(end.max()) > self.rotary.limit:
                raise ValueError(
                    f"the cache reaches {int(end.max())} tokens, but {self._keys_turn}; go without a cache"
                )
        with nullcontext() if cache is None else cache.appending(t):
            run = recomputed if recompute else plainly
            x, read = self.step(input_ids, lengths, positions, segments, cache, layers, backend, run, probe_of)
            for each in captures:
                assert read is not None
                each.add(read, layers, cache)
            return self.head(last(x, lengths, logits_to_keep) if logits_to_keep else x)

    def _check_ids(self, input_ids: Tensor) -> None:
        """Raise ValueError for ids outside the vocabulary. On a GPU they are not looked at: that would have to wait."""
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        least, most, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
        if least < 0 or most >= size:
            raise ValueError(f"token id {least if least < 0 else most} is outside the vocabulary of {size} ids")

    def _try_last(
        self, layers: Layers, count: int, positions: Tensor | None, segments: Tensor | None, cache: Cache | None
    ) -> None:
        """Raise ValueError for a mask or score function that fails for the last of `count` new tokens."""
        column = torch.arange(count, dtype=torch.int32)[None]
        index = column + (0 if cache is None else int(cache.length.max()))
        tokens = (index, index if positions is None else positions, 0 * index if segments is None else segments)
        rows = max(len(x) for x in tokens)
        attention.try_last(layers, Tokens(*(x.expand(rows, -1) for x in tokens)), self.config.num_attention_heads)

    def _warn_beyond_context(self, count: int, lengths: Tensor | None, cache: Cache | None) -> None:
        context = self.config.max_position_embeddings
        total = count if cache is None else cache.reserved + count
        if total > context and (lengths is not None or self.device.type == "cpu"):  # padding may be among them
            held = 0 if cache is None else (cache.tokens.index >= 0).sum(1)
            total = int((held + (torch.tensor(count) if lengths is None else lengths)).max())
        if total > context:
            stack = enumerate(traceback.walk_stack(sys._getframe()), 1)  # torch's modules, more of them with hooks
            level = next((n for n, (frame, _) in stack if not _is_ours_or_torchs(frame.f_globals)), 1)
            warnings.warn(
                f"{total} tokens are more than the {context} that the model was made for (max_position_embeddings); "
                "what it predicts there may be of no use",
                stacklevel=level,
            )

    def attention_layers(
        self,
        mask: Mask | Sequence[Mask | None] | None = None,
        score_mod: ScoreMod | Sequence[ScoreMod | None] | None = None,
        cache: Cache | None = None,
    ) -> Layers:
        """How each layer attends, with its tensors on the model's device; equal masks are computed once for all.

        Raises ValueError for what is no mask or score function, and for another number of them than of layers.
        """
        self.check_device()
        count = self.config.num_hidden_layers

        def of_each_layer(value: Any, kind: type, name: str) -> list[Any]:
            each = list(value) if isinstance(value, list | tuple) else [value] * count
            if len(each) != count:
                raise ValueError(f"{len(each)} {name}s for {count} layers; give one, or one each")
            for rule in each:
                if rule is not None and not isinstance(rule, kind):
                    found = type(rule).__name__
                    raise ValueError(
                        f"{name} must be a {kind.__name__}, found {found}; {kind.__name__}(function) is one"
                    )
            return each

        # Tried on one token, so that what a function does wrong is not reported by a compiler.
        token = Tokens(*(x.to(self.device) for x in Tokens.arriving(1)))
        score = torch.zeros(1, 1, 1, 1, device=self.device)

        each_mask, each_score_mod = of_each_layer(mask, Mask, "mask"), of_each_layer(score_mod, ScoreMod, "score_mod")
        patterns: dict[Hashable, Pattern] = {}
        of_layer = []
        for m, s in zip(each_mask, each_score_mod, strict=True):
            m = m or self.default_mask
            key = m.identity(), s and s.identity()
            if key not in patterns:
                m = m if cache is None or cache.mask is None else m & cache.mask
                patterns[key] = pattern = Pattern(m.to(self.device), s and s.to(self.device))
                pattern.mask.dense(token, token, 1)
                if pattern.score_mod is not None:
                    pattern.score_mod.dense(score, token, token)
            of_layer.append(list(patterns).index(key))
        return Layers(tuple(patterns.values()), tuple(of_layer))

    @property
    def default_mask(self) -> Mask:
        """Who attends to whom if nobody says: causal, or the window that the model was trained with; in both
        directions where its config says `is_causal: false`."""
        window = self.config.sliding_window
        if self.config.is_causal:
            return masks.causal() if window is None else masks.sliding_window(window)
        return masks.bidirectional() if window is None else masks.bidirectional_window(window)

    def looks_ahead_by_default(self, mask: Mask | Sequence[Mask | None] | None = None) -> bool:
        """Whether a layer to which a mask, as `forward` takes it, leaves the default one attends to later tokens."""
        masks_given = mask if isinstance(mask, Sequence) else [mask]
        return None in masks_given and not self.default_mask.never_looks_ahead

    def check_device(self) -> None:
        """Raise ValueError for a model without weights."""
        if self.device.type == "meta":
            raise ValueError("the model is on the meta device, without weights; load it with Llama.from_pretrained")

    def check_cache(self, cache: Cache, batch_size: int) -> None:
        """Raise ValueError for what is no cache, and for one of another batch size or another model."""
        if not isinstance(cache, Cache):
            raise ValueError(f"cache must be made with model.new_cache, found {type(cache).__name__}")
        if cache.batch_size != batch_size:
            raise ValueError(f"the cache has {cache.batch_size} rows, the input {batch_size}; give one row each")
        c, (keys, _) = self.config, cache.layers[0]
        mine = (c.num_hidden_layers, c.num_key_value_heads, c.head_dim, self.dtype, self.device)
        other = (len(cache.layers), keys.shape[1], keys.shape[3], keys.dtype, keys.device)
        if mine != other:
            raise ValueError(f"the cache is of another model ({other}, not {mine}); make it with model.new_cache")

    def step(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        cache: Cache | Rows | None,
        layers: Layers,
        backend: Backend,
        run: Run = plainly,
        probe_of: Mapping[int, Probe] | None = None,
    ) -> tuple[Tensor, Found | None]:
        """`forward` without its checks and logits: the last layer's output, `[B, T, E]` or packed, and what probes
        read.

        Its parts, what comes before the layers and each layer, are tensor operations only; `run` may compile them.
        probe_of: of layers, see `sites.probes`; without any nothing is read.
        """
        probe_of = probe_of or {}
        given = input_ids, lengths, positions, segments, cache, layers.patterns, backend
        x, rotary, views, slots = run("enter", Llama.enter, self, *given)
        found = Found(run("tokens", copied, views[0].q), {}) if probe_of else None
        for i, (block, p) in enumerate(zip(self.layers, layers.of_layer, strict=True)):
            kv = None if cache is None else cache.layers[i]
            args = x, rotary, layers.patterns[p], views[p], kv, slots
            if found is None or (probe := probe_of.get(i)) is None:
                x = run(f"block, pattern {p}", through, block, *args)
            else:
                x, read = run((f"block, pattern {p}", probe.structure), probed, probe, views[p].q, block, *args)
                found.at.update({(site, i): value for site, value in read.items()})
        return x, found

    def enter(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        cache: Cache | Rows | None,
        patterns: tuple[Pattern, ...],
        backend: Backend,
    ) -> tuple[Tensor, Rotary, list[View], Tensor | None]:
        """What all layers share: embeddings `[B, T, E]`, rotations, who sees whom in each pattern, and slots `[B, T]`,
        which the cache gives to the tokens here. Where the cache is `Rows` of chosen tokens, all but who sees whom is
        packed: `[1, N]` instead of `[B, T]`."""
        b, t = input_ids.shape
        column = torch.arange(t, dtype=torch.int32, device=input_ids.device).expand(b, t)
        index = column if cache is None else cache.length[:, None] + column
        if positions is None:
            assert not isinstance(cache, Rows)  # which know no positions but those given
            positions = column if cache is None else cache.next_position[:, None] + column
        tokens = Tokens(
            index if lengths is None else torch.where(column < lengths[:, None], index, -1),
            positions.to(torch.int32),
            torch.zeros_like(index) if segments is None else segments.to(torch.int32),
        )
        slots = None if cache is None else cache.append(tokens)
        kv, pages, chosen = (tokens, None, None) if cache is None else (cache.tokens, cache.pages, cache.chosen)
        packed = None if chosen is None else Packed.of(chosen, (b, t))
        heads = self.config.num_attention_heads
        views = [attention.view_of(p, tokens, kv, heads, backend, pages, packed) for p in patterns]
        if packed is not None and slots is not None:
            input_ids, slots, tokens = packed.pack(input_ids), packed.pack(slots), Tokens(*map(packed.pack, tokens))
        return self.embed(input_ids), self.rotary(tokens), views, slots

    def head(self, x: Tensor) -> Tensor:
        """Logits `[B, T, V]` of the last layer's output `[B, T, E]`."""
        return linear(x, self.output_weight, norm=self.norm)

    @property
    def output_weight(self) -> Tensor:
        """The matrix `[V, E]` from the last hidden state to the logits: the embedding itself where tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight


def last(x: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last `count` tokens of each row's real ones, `[B, count, E]` of `[B, T, E]`."""
    b, t, e = x.shape
    end = torch.full((b,), t, device=x.device) if lengths is None else lengths
    kept = end[:, None] - count + torch.arange(count, device=x.device)
    return x.gather(1, kept.clamp(min=0)[:, :, None].expand(-1, -1, e))


def _is_ours_or_torchs(module: Mapping[str, Any]) -> bool:
    return str(module.get("__name__")).partition(".")[0] in ("llama_flex", "torch")


def _holds(value: object, *kinds: torch.dtype) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype in kinds


def _described(value: object) -> str:
    """What a caller gave where a tensor was expected."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; cpu, cuda and cuda:N are")
    return device
