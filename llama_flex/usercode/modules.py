"""Modules that users have changed: with hooks, or with a forward of their own."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as all_modules

_PACKAGE = __name__.partition(".")[0]


def in_package(module: str | None) -> bool:
    """Return whether a module's name is of this package; functions made by `exec` may have none."""
    return module is not None and module.partition(".")[0] == _PACKAGE


def are_own(*modules: nn.Module | None) -> bool:
    """Return whether modules, or None, compute what this package defines: they are its own, and nobody changed them."""
    return all(x is None or (in_package(type(x).__module__) and not is_changed(x)) for x in modules)


def is_changed(module: nn.Module) -> bool:
    """Return whether a module may do more than its class says: it has forward hooks, or its `forward` was replaced."""
    kind, hooks = type(module), (module._forward_pre_hooks, module._forward_hooks)
    defined_in = getattr(kind.forward, "__globals__", {}).get("__name__")
    if defined_in != kind.__module__ or "forward" in vars(module) or any(hooks):
        return True
    return bool(all_modules._global_forward_pre_hooks or all_modules._global_forward_hooks)
