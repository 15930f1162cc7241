"""The worker process that renders chat templates, started by chat.py.

It reads requests from stdin and answers on stdout until stdin ends, under limits that it sets itself.
"""

import importlib
import json
import marshal
import os
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .chat import OUT_OF_MEMORY

# The exceptions of a template that is wrong about its input: Jinja's own, and those of the Python operations that it is
# compiled to. (SyntaxError: Python limits how deep loops nest.)
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
# Modules that Jinja would import only when it needs them; by then, files can no longer be opened.
_LATE = ["jinja2.constants", "jinja2.debug", "html", "pprint", "textwrap"]
_LATE += [f"encodings.{name}" for name in ("ascii", "latin_1", "unicode_escape", "utf_8")]


class _Generation(Extension):
    """The `{% generation %}` tag, which only marks its body."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    """Return transformers' environment for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes and with non-ASCII text as it is, unlike Jinja's own filter."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _limit(name: int, most: int) -> None:
    hard = resource.getrlimit(name)[1]
    resource.setrlimit(name, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main(max_bytes: int) -> None:
    """Answer requests: 8 bytes of length, then (template, variables, seconds) as `marshal` writes it. An answer is a
    byte, 1 for a text and 0 for an error, 8 bytes of length, and UTF-8. Exits if memory runs out."""
    try:
        _serve(max_bytes)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _serve(max_bytes: int) -> None:
    for name in _LATE:
        importlib.import_module(name)
    compiled = lru_cache(maxsize=8)(_environment().from_string)
    if sys.platform == "linux":  # other kernels do not enforce it
        with open("/proc/self/statm", "rb") as statm:
            taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, taken + max_bytes)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))  # no file or connection can be opened from here on
    while length := sys.stdin.buffer.read(8):
        template, variables, seconds = marshal.loads(sys.stdin.buffer.read(int.from_bytes(length, "little")))
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)
        try:
            text, is_text = compiled(template).render(variables), True
        except OSError:
            text, is_text = ": it needs a file, such as that of a codec", False
        except _FAULTS as error:
            where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            text, is_text = f"{where}: {str(error) or type(error).__name__}", False
        content = text.encode("utf-8", "surrogatepass")
        del text
        sys.stdout.buffer.write(bytes([is_text]) + len(content).to_bytes(8, "little") + content)
        sys.stdout.buffer.flush()
