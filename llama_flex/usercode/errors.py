"""Explain what goes wrong in a user's function (a mask, a score function, an edit), in one line."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

_LIBRARIES = (str(Path(__file__).parents[1]) + os.sep, sysconfig.get_paths()["stdlib"], "<frozen", "<string>", "<eval")
_DATA_DEPENDENT = re.compile(
    r"Boolean value of Tensor|[Dd]ata-dependent|converted to (a )?(Python )?[Ss]calar|converted to an index"
    r"|_local_scalar_dense|call_method item\(|calling \.item\(\) on a Tensor"
    r"|doesn't have storage|unbacked_bindings|name 'u\d+' is not defined"  # .tolist(), .numpy(); last two compiled
)
_DYNAMIC_SHAPE = re.compile(r"can (output|support) dynamic shape|[Uu]nbacked symbols")
_OUT_OF_RANGE = re.compile(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)")
_ARGUMENTS = re.compile(r"takes .*positional arguments? but|missing \d+ required positional argument")


class FunctionError(ValueError):
    """A user's function that fails or returns an invalid value.

    what: the kind of fault, one of those that `check_mask.Finding` lists. fault: the message without the function's
    name.
    """

    def __init__(self, name: str, what: str, fault: str) -> None:
        super().__init__(f"{name} {fault[3:]}" if fault.startswith("it ") else f"{name}: {fault}")
        self.what, self.fault = what, fault


class CompileError(ValueError):
    """A failure of torch to compile: no compiler, an unknown processor, a damaged cache; the message says which."""


def check_scalar(name: str, answer: Any) -> Any:
    """Return the answer for one query and one key as a scalar tensor. Raises FunctionError unless it is one number."""
    if answer.numel() != 1:
        fault = (
            f"it returned {list(answer.shape)} for one query and one key, not one value: use elementwise "
            "operations, and look up tables by index, `table[kv.index]`"
        )
        raise FunctionError(name, "wrong-shape", fault)
    return answer.reshape(())


def is_data_dependent(text: str) -> bool:
    """Return whether an error's text says that Python code, or a shape, depends on the values of a tensor."""
    return bool(_DATA_DEPENDENT.search(text) or _DYNAMIC_SHAPE.search(text))


def diagnose(error: Exception) -> tuple[str, str]:
    """Return the kind of fault behind an exception of a user's function, and a line with its cause, the line of code
    and what to do."""
    text, line = str(error), line_of_user(error)
    if isinstance(error, CompileError):
        text = f"{error} {error.__cause__}"
        if not is_data_dependent(text):
            return "does-not-compile", str(error) if line in str(error) else f"{error}{line}"
    first = f"{type(error).__name__}: {(text.strip() or 'no message').splitlines()[0]}"
    if out := _OUT_OF_RANGE.search(text):
        way = "make it as long as the longest sequence, or clamp the index"
        if int(out[1]) < 0:
            way = "padding and free slots have index -1; clamp it, as in `kv.index.clamp(min=0)`"
        return "index-out-of-range", f"index {out[1]} into a tensor of {out[2]}{line}: {way}"
    if text == "index out of range in self":  # from an embedding, which gives no details
        way = "make the table as long as the longest sequence; padding and free slots have index -1, so clamp(min=0)"
        return "index-out-of-range", f"an index is out of range{line}: {way}"
    if "called random operation" in text:
        return "not-deterministic", f"it draws random numbers{line}: take random numbers from a table made beforehand"
    if _DYNAMIC_SHAPE.search(text):
        way = "no `nonzero`, `unique`, `x[flags]`; use torch.where, or a table made beforehand"
        return "data-dependent", f"a shape depends on the values of a tensor{line}: {way} ({first})"
    if _DATA_DEPENDENT.search(text):
        way = "no `if`, `and`, `or`, `not`, `a < b < c`, `int()`, `.item()`, `.tolist()`, `.numpy()` on tensors; "
        way += "use torch.where, `&`, `|`, `~`"
        return "data-dependent", f"Python code depends on the value of a tensor{line}: {way} ({first})"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "does-not-compile", f"torch cannot trace or compile it{line}: {first}"
    if isinstance(error, AttributeError) and "'Token' object" in text:
        return "raises", f"it raises {first}{line}; a token has index, position, segment, head and batch"
    if isinstance(error, TypeError) and _ARGUMENTS.search(text):
        way = "a mask takes (q, kv), a score function (score, q, kv), an edit (x, tokens)"
        return "raises", f"it raises {first}; {way}; FlexAttention's forms go through from_mask_mod and from_score_mod"
    return "raises", f"it raises {first}{line}"


def line_of_user(error: Exception) -> str:
    """Return where in the user's code an error arose, by its traceback or the compiler's message; "" if unknown."""
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    messages = f"{error} {error.__cause__}"
    frames += [(name, int(line), None) for name, line in re.findall(r'File "(.+?)", line (\d+)', messages)]
    for name, line, source in reversed(frames):
        if not name.startswith(_LIBRARIES) and f"{os.sep}site-packages{os.sep}" not in name:
            return f" in line {line} of {Path(name).name}" + (f", `{source}`" if source else "")
    return ""
