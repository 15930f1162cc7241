"""Chat templates that somebody else wrote: changed at random, and random programs; see fuzz_helpers."""

import re
import time

import fuzz_helpers
import jinja2
import pytest
from fuzz_helpers import (
    CASES,
    MESSAGES,
    SECONDS,
    TEMPLATE,
    Outcomes,
    TooSlow,
    again_if_slow,
    byte_changes,
    change_bytes,
    fuzzed,
)
from hypothesis import strategies as st

from llama_flex.text import chat

outcomes, quiet = fuzz_helpers.outcomes, fuzz_helpers.quiet  # fixtures

# What programs are made of; @ stands for an expression, and words of capitals for one of CHOICES.
NUMBERS = [
    *("0", "1", "-1", "3", "99", "5000", "100000", "10000000000", "-100000000", "2.5", "1e308", "10 ** 400"),
    *("0x" + "f" * 300, "2305843009213693951"),
]
ATOMS = [
    *("'x'", "''", "'a\\nb'", "'%s%d%*d'", "'{:>{}}{!r}'", "'é' * 3000", "messages", "messages[0]", "missing", "none"),
    *("[]", "[1]", "()", "{}", "true", "ns", "ns.a", "ns.b", "range(9)", "range(100000)", "loop", "self", "caller"),
    *("dict", "cycler", "joiner()", "namespace(a=1)", "strftime_now", "range", "raise_exception", "varargs"),
]
METHODS = [
    *sorted({name for kind in (str, bytes, list, dict, int, float) for name in dir(kind) if name[0] != "_"}),
    *("__class__", "__init__", "__globals__", "gi_frame", "mapping", "changed", "cycle", "a", "call", "striptags"),
]
CHOICES = {
    "ATOM": [*NUMBERS, *ATOMS, *ATOMS],
    "FILTER": sorted(jinja2.filters.FILTERS),
    "TEST": sorted(jinja2.tests.TESTS),
    "METHOD": METHODS,
    "OPERATOR": ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or"],
}
FORMS = [
    *("(@ OPERATOR @)", "(@ OPERATOR @)", "(@ | FILTER)", "(@ | FILTER(@))", "(@ | FILTER(@, @))", "(@).METHOD()"),
    *("(@ | FILTER(width=@))", "(@ | FILTER(attribute=@))", "(@ | map('FILTER', @) | list)", "(@).METHOD(@)"),
    *("(@).METHOD(@, @)", "(@ is TEST(@))", "@[@]", "@[@:@]", "[@, @]", "(@, @)", "{@: @}", "dict(a=@, b=@)"),
    *("(@ if @ else @)", "m(@, @)", "[ns.a, ns.a]", "(ns.a * @)", "(ns.a ~ ns.a)"),
]
STATEMENTS = [
    *("{{ @ }}", "{% set ns.a = @ %}", "{% for i in range(60) %}{% set ns.a = @ %}{% endfor %}", "{{ ns.a }}"),
    *("{% for i in range(9000) %}{% set ns.b = @ %}{% endfor %}", "{% for x in @ %}{{ @ }}{% endfor %}"),
    *("{% macro m(x=@) %}{{ @ }}{% endmacro %}", "{% call m() %}{{ @ }}{% endcall %}", "{{ ns.a == @ }}"),
    *("{% filter upper %}{{ @ }}{% endfilter %}", "{% set x %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = x %}"),
    *("{% if @ %}{{ @ }}{% endif %}", "{% if"),
]


@st.composite
def expressions(draw, depth: int = 3) -> str:
    """Draw a Jinja expression."""
    form = draw(st.sampled_from(FORMS)) if depth and draw(st.integers(0, 4)) else "ATOM"
    for name, choices in CHOICES.items():
        while name in form:
            form = form.replace(name, draw(st.sampled_from(choices)), 1)
    while "@" in form:
        form = form.replace("@", draw(expressions(depth - 1)), 1)
    return form


@st.composite
def programs(draw) -> str:
    """Draw a template of a few statements."""
    body = [draw(st.sampled_from(STATEMENTS)) for _ in range(draw(st.integers(1, 5)))]
    text = "{% set ns = namespace(a='x', b=[1]) %}" + "".join(body)
    while "@" in text:
        text = text.replace("@", draw(expressions()), 1)
    return text


# Messages of templates that reach a limit, and what the table of outcomes calls it.
ENDS = {"for more than": "too long", "takes more than": "too much memory", "its text has": "too much text"}


def check_template(outcomes: Outcomes, kind: str, template: str) -> None:
    """Render a template: it ends in a text or in one line that says what is wrong with it, in time."""
    again_if_slow(lambda: _check_template(outcomes, kind, template))


def _check_template(outcomes: Outcomes, kind: str, template: str) -> None:
    start, message = time.perf_counter(), None
    try:
        chat.render_chat(template, MESSAGES, bos_token="<s>", eos_token="</s>")
    except ValueError as error:
        message = str(error)
    seconds = time.perf_counter() - start
    if seconds >= 2 + SECONDS:  # processor time is limited in whole seconds
        raise TooSlow(f"{seconds:.2f} s: {template}")
    end = "loaded"
    if message is not None:
        assert re.match(r"the chat template failed( \(line \d+\))?: .", message), message
        assert message.isprintable(), message
        assert "ended with" not in message, template
        end = next((ENDS[text] for text in ENDS if text in message), "faulty")
    outcomes.add(kind, end, seconds)


@pytest.mark.parametrize("cases", CASES)
def test_bytes_of_a_chat_template(cases, outcomes, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)

    @fuzzed(cases, byte_changes)
    def check(mutation):
        template = change_bytes(TEMPLATE.encode(), mutation).decode("utf-8", "replace")
        check_template(outcomes, "characters of a chat template", template)

    check()


@pytest.mark.parametrize("cases", CASES)
def test_programs_as_chat_templates(cases, outcomes, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)

    @fuzzed(cases, programs())
    def check(template):
        check_template(outcomes, "programs as a chat template", template)

    check()
