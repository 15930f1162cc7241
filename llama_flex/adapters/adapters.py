"""The LoRA adapters of a model: several may be loaded, one is active, and requests may each have their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import hub
from ..checkpoint.shards import CheckpointError
from ..kernels.lora import LoRA, Update, lora_in
from ..kernels.modules import MatrixModule, matrix_of
from ..weights import named_weights
from . import files
from .config import ALL_LINEAR, EMBEDDING, HEAD, AdapterConfig

BASE = "__base__"  # the name of no adapter, for requests
_numbers = itertools.count(1)  # none is used twice, so that a number tells which adapter a key or a value came from


@dataclass(eq=False, frozen=True)
class Adapter:
    """A loaded adapter. number: its ranks' in `lora.LoRA`. saved: the weights that it replaces, by name."""

    name: str
    number: int
    config: AdapterConfig
    saved: Mapping[str, Tensor]


@dataclass
class AdapterState:
    """The adapters of a model by name, the active one, and the weights that the active one has replaced."""

    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: Adapter | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)


class Adapters:
    """A model's LoRA adapters, as `Llama.adapters`; iterates over their names.

    The forward, streams and requests compute with the active one, unless a request names another. Updates are computed
    in float32 or wider beside weights of any kind, quantised ones included, and rounded once, as PEFT does; casting
    the model casts its adapters, too.
    """

    def __init__(self, model: Any) -> None:
        """model: a `Llama`, which holds all state, so that copies of it have their own."""
        self._model = model
        self._state: AdapterState = vars(model).setdefault("_adapters", AdapterState())

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.loaded)

    def __len__(self) -> int:
        return len(self._state.loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._state.loaded

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self)}; active: {self.active})"

    @property
    def active(self) -> str | None:
        """The name of the active adapter, None if there is none."""
        return None if self._state.active is None else self._state.active.name

    @property
    def number(self) -> Tensor | None:
        """The number of the active adapter, int32 `[1, 1]`, as steps take it; None if there is none."""
        return self._model._buffers.get("adapter")

    def load(
        self,
        path_or_repo: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Load a PEFT folder, or a hub repository of one, and return the adapter's name, by default the folder's.

        It is not active yet: see `activate`. Raises ValueError, naming the file and the key or tensor, for anything but
        plain LoRA of this model's matrices and weights saved as a whole, and for a name that is taken.
        """
        self._model.check_device()
        folder = hub.resolve(path_or_repo, files.FILES, revision=revision, token=token)
        name = self._new_name(Path(path_or_repo).resolve().name if name is None else name)
        config = AdapterConfig.read(folder)
        weights = named_weights(self._model, self._model.config)
        updates, saved = files.read(folder, config, self._matrices(), weights)
        tied = self._model.config.tie_word_embeddings
        for key in saved:
            if tied and key.rpartition(".")[0] == EMBEDDING:
                raise CheckpointError(
                    f"{folder}: replaces the embedding (modules_to_save), which is this model's output matrix too; "
                    "merge it with peft, and save a model whose config.json sets tie_word_embeddings to false"
                )
            if weights[key].dtype != self._model.dtype:
                raise CheckpointError(f"{folder}: replaces {key} (modules_to_save), which is quantised; load floats")
        self._add(
            Adapter(name, self._new_number(), config, {key: x.to(weights[key]) for key, x in saved.items()}), updates
        )
        return name

    def add(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] | str = ALL_LINEAR,
        rslora: bool = False,
    ) -> str:
        """Add a new adapter to train, which changes nothing yet, and return its name.

        alpha: default twice the rank; updates are scaled by alpha / rank, or by alpha / sqrt(rank) if rslora. targets:
        names or ends of names of the checkpoint's modules, such as ["q_proj", "v_proj"]; default all matrices but the
        vocabulary's. The first factors are random, the second ones 0. Raises ValueError.
        """
        self._model.check_device()
        if targets != ALL_LINEAR and (isinstance(targets, str) or not isinstance(targets, Iterable)):
            raise ValueError(
                f'targets must be {ALL_LINEAR!r} or a list of names such as ["q_proj"], not {targets!r:.200}'
            )
        name, matrices = self._new_name(name), self._matrices()
        raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
        raw |= {"use_rslora": rslora, "target_modules": targets if isinstance(targets, str) else list(targets)}
        config = AdapterConfig.of(raw if alpha is None else raw | {"lora_alpha": alpha}, f"adapter {name!r}")
        updates = {}
        for key, (rows, columns) in matrices.items():
            if config.is_target(key, ()):
                down, up = torch.empty(rank, columns), torch.zeros(rows, rank)
                nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                updates[key] = Update(down, up, config.scale_of(key))
        if not updates:
            ends = sorted({key.rpartition(".")[2] for key in matrices})
            raise ValueError(f"targets {targets!r} name no matrix; choose from {', '.join(ends)}, or {ALL_LINEAR!r}")
        self._add(Adapter(name, self._new_number(), config, {}), updates)
        return name

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Let the model compute with an adapter, or, if None, without any.

        Streams and requests keep the adapter with which they began; keys and values of another are never shared.
        Raises ValueError for an unknown name.
        """
        adapter = None if name is None else self._of(name)
        weights = named_weights(self._model, self._model.config) if self._state.replaced or adapter else {}
        for key, tensor in self._state.replaced.items():
            weights[key].copy_(tensor)
        self._state.replaced = {}
        if adapter is not None:
            self._state.replaced = {key: weights[key].clone() for key in adapter.saved}
            for key, tensor in adapter.saved.items():
                weights[key].copy_(tensor)
        self._state.active = adapter
        self._model._buffers.pop("adapter", None)
        if adapter is not None:  # a buffer moves with the model, and a change of it is noticed
            self._model.register_buffer("adapter", self.numbers_of([adapter]), persistent=False)

    def train(self, name: str) -> list[nn.Parameter]:
        """Activate an adapter, let its parameters alone require gradients, and return them, for an optimizer.

        There is no dropout. Raises ValueError if other adapters are loaded, with which it shares parameters, or if it
        replaces weights as a whole.
        """
        adapter = self._of(name)
        if len(self) > 1:
            raise ValueError(
                f"adapters are trained alone; remove {', '.join(repr(n) for n in self if n != name)} first"
            )
        if adapter.saved:
            raise ValueError(
                f"adapter {name!r} replaces {', '.join(adapter.saved)} as a whole, which is not trained here"
            )
        self.activate(name)
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        parameters = [x for lora in self._loras() for x in lora.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Add an adapter to the model's weights for good, and remove it; the model then computes as fast as without.

        Rounding cannot be undone: load the model again to be rid of it. Raises ValueError, before anything changes, for
        quantised weights, for an output matrix that is the embedding, and while another adapter is active.
        """
        adapter = self._of(name)
        if self._state.active not in (None, adapter):
            raise ValueError(f"adapter {self.active!r} is active; activate(None) before merging another")
        updates = self._updates(adapter)
        weights = named_weights(self._model, self._model.config)
        for key in updates:
            if self._model.config.tie_word_embeddings and key in (EMBEDDING, HEAD):
                raise ValueError(
                    f"adapter {name!r} changes {key}, but embedding and output matrix are one; keep it apart"
                )
            if f"{key}.weight_scale" in weights:
                raise ValueError(f"{key} is quantised, so adapter {name!r} cannot be merged; activate it instead")
        self.activate(name)  # the weights that it replaces
        self._state.replaced = {}
        for key, update in updates.items():
            product = update.product()
            weights[f"{key}.weight"].add_(product.t() if key == EMBEDDING else product)
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an adapter; requests that have it end in an error. Raises ValueError for an unknown name."""
        adapter = self._of(name)
        if self._state.active is adapter:
            self.activate(None)
        for module, _ in self._products():
            if (held := lora_in(module)) is not None:
                left = [each for each in held.updates() if each[1] != adapter.number]
                module.register_module("adapter", LoRA(_parts(module), left) if left else None)
        del self._state.loaded[name]

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as PEFT does, for `load` and for PEFT. Raises ValueError for an unknown name, OSError."""
        adapter = self._of(name)
        raw = {key: adapter.config.raw[key] for key in sorted(adapter.config.raw)}
        updates = self._updates(adapter)
        if adapter.config.raw.get("target_modules") == ALL_LINEAR:
            raw["target_modules"] = sorted({key.rpartition(".")[2] for key in updates})
        files.write(Path(folder), raw, updates, adapter.saved)

    # ---- for the engine

    def of_request(self, name: str | None) -> Adapter | None:
        """Return the adapter of a request: by name, or the active one for None; None for the bare model, `BASE`.

        Raises ValueError for an unknown name, and for one that replaces weights as a whole, unless it is active.
        """
        active = self._state.active
        adapter = active if name is None else None if name == BASE else self._of(name)
        if adapter is not active:
            for one in (each for each in (adapter, active) if each is not None and each.saved):
                raise ValueError(
                    f"adapter {one.name!r} replaces {', '.join(one.saved)} as a whole, for all requests at a time; "
                    "activate it, or another, instead of naming one for a request"
                )
        return adapter

    def check(self, adapter: Adapter | None) -> None:
        """Raise ValueError if a request's adapter was removed, or if the weights that it replaces are others now."""
        if adapter is None:
            return
        if self._state.loaded.get(adapter.name) is not adapter:
            raise ValueError(f"adapter {adapter.name!r} was removed before the request had finished")
        if adapter.saved and self._state.active is not adapter:
            raise ValueError(f"adapter {adapter.name!r} is no longer active, and replaces {', '.join(adapter.saved)}")

    def numbers_of(self, adapters: Iterable[Adapter | None]) -> Tensor | None:
        """Return the numbers of the adapters of rows, `[R, 1]` on the model's device; None if there are none."""
        numbers = [0 if each is None else each.number for each in adapters]
        return torch.tensor(numbers, dtype=torch.int32, device=self._model.device)[:, None] if any(numbers) else None

    # ---- where updates are kept

    def _of(self, name: str) -> Adapter:
        if name not in self._state.loaded:
            known = f"; loaded: {', '.join(self)}" if self._state.loaded else "; load it first"
            raise ValueError(f"no adapter {name!r:.200}{known}")
        return self._state.loaded[name]

    def _new_name(self, name: str) -> str:
        if not isinstance(name, str) or not name.isprintable() or not name or name == BASE:
            raise ValueError(f"{name!r:.200} cannot be an adapter's name; give a printable one")
        if name in self._state.loaded:
            raise ValueError(f"there is an adapter {name!r} already; remove it, or give another name")
        return name

    def _new_number(self) -> int:
        """Return a number that no adapter of this process has, and none of a model from another one (`torch.load`)."""
        held = {adapter.number for adapter in self._state.loaded.values()}
        return next(number for number in _numbers if number not in held)

    def _products(self) -> Iterator[tuple[MatrixModule, list[str]]]:
        """Yield the modules of matrices, each with the checkpoint's names of those stacked in it."""
        config = self._model.config
        for path, names in config.architecture.modules(config.num_hidden_layers, tied=False):
            module = self._model.get_submodule(path)
            if isinstance(module, MatrixModule):
                yield module, names

    def _loras(self) -> list[LoRA]:
        return [lora for module, _ in self._products() if (lora := lora_in(module)) is not None]

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the checkpoint's matrices, `(N, K)`; (E, V) of the embedding."""
        found = dict[str, tuple[int, int]]()
        for module, names in self._products():
            columns = matrix_of(module).shape[0 if names == [EMBEDDING] else 1]
            found |= {name: (rows, columns) for name, rows in zip(names, _parts(module), strict=True)}
        return found

    def _updates(self, adapter: Adapter) -> dict[str, Update]:
        """Return the updates of an adapter, by the checkpoint's names of modules."""
        each = ((names, lora_in(module)) for module, names in self._products())
        held = ((names, lora) for names, lora in each if lora is not None)
        return {
            names[part]: update for names, lora in held for part, n, update in lora.updates() if n == adapter.number
        }

    def _add(self, adapter: Adapter, updates: Mapping[str, Update]) -> None:
        dtype, device = torch.promote_types(self._model.dtype, torch.float32), self._model.device
        for module, names in self._products():
            new = [(part, adapter.number, x) for part, name in enumerate(names) if (x := updates.get(name)) is not None]
            if new:
                held = [] if (lora := lora_in(module)) is None else list(lora.updates())
                each = [  # those held may have been cast with the model
                    (part, number, Update(x.down.to(device, dtype), x.up.to(device, dtype), x.scale))
                    for part, number, x in (*held, *new)
                ]
                module.register_module("adapter", LoRA(_parts(module), each))
        self._state.loaded[adapter.name] = adapter


def _parts(module: MatrixModule) -> tuple[int, ...]:
    """Return N of each matrix that is stacked in a module's weight, E of an embedding `[V, E]`."""
    return getattr(module, "parts", None) or (matrix_of(module).shape[1],)
