"""Chat templates: Jinja text from a model's folder, rendered as transformers renders it, and bounded.

A template is a program that somebody else wrote. Jinja's sandbox keeps it away from Python; it does not keep it from
running for ever or from building gigabytes. So every loop, call and operation that makes text draws on one budget of
time and characters here, and a template that overdraws it ends in a ValueError.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import GeneratorType, MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 27  # built in one rendering, intermediate strings included
MAX_INTEGER_BITS = 1 << 16

# What a template can raise by being wrong about its input: Jinja's own errors and those of the Python operations it is
# compiled to. (A SyntaxError: Python allows only so many nested loops.)
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
_CAN_GROW = {"*", "batch", "center", "expandtabs", "format", "indent", "join", "ljust", "pprint", "rjust", "slice"}
_CAN_GROW |= {"sum", "to_bytes", "tojson", "translate", "urlencode", "urlize", "wordwrap", "xmlattr", "zfill"}
_JINJA_ARGUMENTS = (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext)  # passed first to some filters
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation. Environment, functions and variables are those of transformers 5.23's
    `render_jinja_template` (utils/chat_template_utils.py), which the tests compare with.

    Args:
        template: Jinja source.
        messages: dicts, as the template wants them; usually "role" and "content".
        tools: JSON schemas, each a dict. documents: dicts, usually "title" and "text".
        variables: anything else the template reads, such as bos_token or date_string.

    Raises:
        ValueError: no messages; something that is not plain data; the template is faulty, refuses the conversation
            (`raise_exception`), or needs more than MAX_SECONDS or MAX_CHARACTERS.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("a chat needs a non-empty list of messages, such as [{'role': 'user', 'content': 'Hi'}]")
    for name, entries in (("message", messages), ("tool", tools or ()), ("document", documents or ())):
        for entry in entries:
            if callable(entry):
                raise ValueError(
                    f"{name} {entry!r} is a Python function; pass its JSON schema instead: "
                    "{'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': {...}}}"
                )
            if not isinstance(entry, Mapping):
                raise ValueError(f"every {name} must be a dict, not {type(entry).__name__}: {entry!r:.80}")
    data = {"messages": list(messages), "tools": tools, "documents": documents, **variables}
    data = {key: _plain(value, key) for key, value in data.items()}
    data["messages"] = [_with_reasoning(message) for message in data["messages"]]

    environment = _BoundedEnvironment()
    try:
        tree = environment.parse(template)
        _meter(tree, environment)
        compiled = jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)
        return "".join(compiled.generate(add_generation_prompt=add_generation_prompt, **data))
    except _TEMPLATE_FAULTS as error:
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template failed{where}: {reason}") from error


def _plain(value: Any, name: str) -> Any:
    """A copy in plain JSON types: methods of richer objects would be callable from the template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, name) for item in value)
    raise ValueError(f"{name} holds a {type(value).__name__}; a chat template takes str, numbers, lists and dicts")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by three names; as in transformers, each template finds it under the one it reads."""
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Budget:
    """Time and characters left to one rendering."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._characters = MAX_CHARACTERS

    def spend(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise jinja2.TemplateRuntimeError(f"it builds more than {MAX_CHARACTERS:,} characters")
        if time.monotonic() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def spend_text_of(self, value: Any) -> int:
        """Charges about what str(value) would take, and returns it. Containers may share their items, so every visit
        is charged: nesting twenty lists [x, x] is short to write and long to print."""
        size, stack = 0, [value]
        while stack:
            value = stack.pop()
            cost = len(value) if isinstance(value, (str, bytes)) else 1
            self.spend(cost)
            size += cost
            if isinstance(value, Mapping):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                stack += value
        return size


class _Meter(Extension):
    """What `_meter` puts into a template's tree, and the `{% generation %}` tag, which only marks its body."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)
    environment: "_BoundedEnvironment"

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()

    def _tick(self, characters: int) -> str:
        self.environment.budget.spend(characters)
        return ""

    def _concatenate(self, *parts: Any) -> str:
        for part in parts:
            self.environment.budget.spend_text_of(part)
        return "".join(map(str, parts))


def _meter(tree: nodes.Template, environment: "_BoundedEnvironment") -> None:
    """Makes loops and macros draw on the budget at every turn, for the turn and for the literal text in it, and `~`
    for its result. Jinja has no hook for these, unlike for operators, calls, filters and output."""
    meter = environment.extensions[_Meter.identifier]
    assert isinstance(meter, _Meter)
    for parent in list(tree.find_all(nodes.Node)):
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _concatenation(meter, value))
            elif isinstance(value, list):
                value[:] = [_concatenation(meter, item) if isinstance(item, nodes.Concat) else item for item in value]
    for body in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        literal = sum(len(text.data) for text in body.find_all(nodes.TemplateData))
        tick = nodes.ExprStmt(meter.call_method("_tick", [nodes.Const(1 + literal)]), lineno=body.lineno)
        body.body.insert(0, tick)  # type: ignore[attr-defined]
    tree.set_environment(environment)


def _concatenation(meter: _Meter, concat: nodes.Concat) -> nodes.Call:
    return meter.call_method("_concatenate", concat.nodes, lineno=concat.lineno)


class _BoundedFormatter(SandboxedFormatter):
    def __init__(self, environment: "_BoundedEnvironment") -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{5}", format_spec):
            raise jinja2.TemplateRuntimeError(f"field width {format_spec!r} is out of bounds")
        self._budget.spend_text_of(value)
        text: str = super().format_field(value, format_spec)
        self._budget.spend(len(text))
        return text


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)`, refusing underscored names, which could shadow Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # like Jinja's, so that a template may name an attribute "self"
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.TemplateRuntimeError(f"a namespace attribute may not begin with an underscore: {name}")


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with everything that makes text metered; for one rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Meter, loopcontrols], finalize=self._output)
        self.budget = _Budget()
        self.filters["tojson"] = _to_json
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
        del self.globals["lipsum"]  # unbounded filler text

    def _output(self, value: Any) -> Any:
        self.budget.spend_text_of(value)
        return value

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps Jinja's mark of what it passes first (context, environment)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if name in _CAN_GROW:  # what is lazy could not be measured
                args = tuple(list(arg) if isinstance(arg, GeneratorType) else arg for arg in args)
            self._check_growth(name, [arg for arg in args if not isinstance(arg, _JINJA_ARGUMENTS)], kwargs)
            result = function(*args, **kwargs)
            self.budget.spend(len(result) if isinstance(result, (str, list)) else 1)
            return result

        return metered

    def _check_growth(
        self, name: str, operands: Sequence[Any], named: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Refuses beforehand what one call could blow up by a width, a separator or a repetition: what it makes is
        bounded by the product of its operands. (Afterwards is too late: the memory would be taken already.)"""
        if name == "replace" and len(operands) >= 3 and all(isinstance(text, str) for text in operands[:3]):
            text, old, new = operands[:3]
            self.budget.spend(len(text) + text.count(old) * len(new))
            return
        if name == "format":
            if re.search(r"%(?:\(.*?\))?[-+ #.\d]*(?:\d{5}|\*)", str(operands[0])):
                raise jinja2.TemplateRuntimeError(f"a field width in {operands[0]!r:.40} is out of bounds")
            growth = str(operands[0]).count("%") * (self.budget.spend_text_of(operands) + MAX_INTEGER_BITS)
        elif name in _CAN_GROW:
            growth = 1
            for place, operand in enumerate((*operands, *named.values())):
                width = isinstance(operand, int) and (place > 0 or name == "*")
                growth *= 1 + (abs(operand) if width else self.budget.spend_text_of(operand))
        else:
            return
        if growth > MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"the operands of {name!r} are out of bounds")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        format_safely = super().wrap_str_format(value)
        if format_safely is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            fields = ((), args[0]) if value.__name__ == "format_map" else (args, kwargs)
            _BoundedFormatter(self).vformat(value.__self__, *fields)  # measures; what follows is Jinja's own
            return format_safely(*args, **kwargs)

        return formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            __self._check_growth(__obj.__name__, [owner, *args], kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.budget.spend(len(result) if isinstance(result, (str, bytes)) else 1)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._check_growth("format", [left, right])
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise jinja2.TemplateRuntimeError(f"the operands of {operator!r} are out of bounds")
        elif operator == "*":
            self._check_growth(operator, [left, right])
        result = super().call_binop(context, operator, left, right)
        self.budget.spend(len(result) if isinstance(result, (str, bytes, list, tuple)) else 1)
        return result


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own: no HTML escapes, and non-ASCII text stays as it is."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
