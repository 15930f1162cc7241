"""Check a mask or a score function for mistakes: `python -m tools.check_mask FILE.py:NAME`.

NAME is a `Mask`, a predicate `(q, kv)`, a `ScoreMod`, a score function `(score, q, kv)`, or FlexAttention's
`mask_mod(b, h, q_idx, kv_idx)` or `score_mod(score, b, h, q_idx, kv_idx)`. FILE.py is run. See
`llama_flex.eval.check_mask`. Exit code: 0 without errors, 1 with errors, 2 for an argument that cannot be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a file: put `llama_flex` on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODULE = "_checked"  # the name under which FILE.py is imported


class Parser(argparse.ArgumentParser):
    """Report wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"error: {message}\n")


def load(target: str) -> Any:
    """Return the object FILE.py:NAME. Raises ValueError for a missing file or name, and for a file that fails."""
    from llama_flex.eval.check_mask import attempt

    file, _, name = target.rpartition(":")
    if not file or not name:
        raise ValueError(f"{target} is not FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if not Path(file).is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE.py` does
    try:
        _, fault = attempt(spec.loader.exec_module, module)
    except SystemExit as error:
        raise ValueError(f"{file}: exits when it is run; put that under `if __name__ == '__main__':`") from error
    if fault:
        raise ValueError(f"{file}: {fault.message}")
    if not hasattr(module, name):
        raise ValueError(f"{file}: has no {name}")
    return getattr(module, name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description="Check a mask or a score function for mistakes.", prog="python -m tools.check_mask")
    parser.add_argument("target", metavar="FILE.py:NAME", help="a mask, a predicate, a score function; FILE.py is run")
    parser.add_argument("--heads", type=int, default=4, help="number of query heads (default: 4)")
    parser.add_argument(
        "--no-compile", action="store_true", help="skip the checks of compiled code, which take most of the time"
    )
    options = parser.parse_args(arguments)

    from llama_flex.eval.check_mask import check_mask

    try:
        findings = check_mask(
            load(options.target),
            num_heads=options.heads,
            compile=not options.no_compile,
            passed=lambda line: print(f"passed: {line}", flush=True),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    return int(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
