"""Modules that users have changed: with hooks, or with a forward of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules

_PACKAGE = __name__.partition(".")[0]


def in_package(module: str | None) -> bool:
    """Return whether a module's name is of this package; functions made by `exec` may have none."""
    return module is not None and module.partition(".")[0] == _PACKAGE


def are_own(*modules: nn.Module | None) -> bool:
    """Return whether modules, or None, compute what this package defines: they are its own, and nobody changed them."""
    return all(x is None or (in_package(type(x).__module__) and not is_changed(x)) for x in modules)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether this package defines a module's `forward`, whatever hooks it has."""
    return in_package(getattr(type(module).forward, "__module__", None)) and "forward" not in vars(module)


def is_changed(module: nn.Module) -> bool:
    """Return whether a module may do more than its class says: it has forward hooks, or its `forward` was replaced."""
    kind = type(module)
    defined_in = getattr(kind.forward, "__globals__", {}).get("__name__")
    if defined_in != kind.__module__ or "forward" in vars(module):
        return True
    return any(hooks_of(module)) or any(global_hooks())


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the forward hooks of a module, those before it first, by the number that torch gives each."""
    return module._forward_pre_hooks, module._forward_hooks


def global_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the forward hooks of all modules, as `hooks_of` does."""
    return all_modules._global_forward_pre_hooks, all_modules._global_forward_hooks


def check_hooks(module: nn.Module, why: str, way: str) -> None:
    """Raise ValueError, with the reason and the way out, if a module has forward hooks of its own or of all modules."""
    for hook in (hook for hooks in (*hooks_of(module), *global_hooks()) for hook in hooks.values()):
        name = getattr(hook, "__qualname__", repr(hook))
        raise ValueError(f"{type(module).__name__} has the forward hook {name}, but {why}; {way}")
