"""Chat templates against transformers' rendering, and templates that would not end."""

import datetime
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jinja2
import pytest
import tokenizers

from llama_flex import chat
from llama_flex.text.chat import render_chat
from llama_flex.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
WEIGHTS = Path(__file__).parent.parent / "weights"

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message is not false %}
        {% set content = '<<SYS>>\\n' ~ system_message ~ '\\n<</SYS>>\\n\\n' ~ message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' ~ content.strip() ~ ' ' ~ eos_token -}}
    {% endif %}
{% endfor %}"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- macro header(role) -%}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{%- endmacro %}
{{- header('system') }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Respond with a JSON function call. Do not use variables.\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}\
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- header('ipython') }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- else %}
        {{- header(message['role']) + message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}"""
CHATML = """\
{%- set ns = namespace(system='You are a helpful assistant.', seen=0) %}
{% for message in messages if message.role == 'system' %}{% set ns.system = message.content %}{% endfor %}
<|im_start|>system
{{ ns.system }}{% if tools %}

# Tools
{% for tool in tools %}{{ '\\n' ~ tool.function.name ~ ': ' ~ (tool | tojson) }}{% endfor %}
{% endif %}
<|im_end|>
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.reasoning_content %}<think>{{ message.thinking }}</think>{% endif %}
{{ '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
{{ '<|im_end|>\\n' }}
{%- set ns.seen = ns.seen + 1 %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% set user = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- if message == user[-1] and tools %}[AVAILABLE_TOOLS] {{ tools | map(attribute='function') | list \
| tojson }}[/AVAILABLE_TOOLS]{%- endif %}
        {{- '[INST] %s[/INST]' % message.content }}
    {%- else %}{{- ' {}{}'.format(message.content | replace('\\n', ' '), eos_token) }}{%- endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if documents and loop.first %}
{% for d in documents %}{{ [d.title, d.text | upper] | join(': ') }}
{% endfor %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {"llama2": LLAMA_2, "llama3": LLAMA_3, "chatml": CHATML, "mistral": MISTRAL, "zephyr": ZEPHYR}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": 'Wie ist\'s in <Köln> & "Umgebung"? 天气',
            "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}, "required": ["ort"]},
        },
    }
]
SYSTEM = {"role": "system", "content": "  Be brief.\nAlways. "}
TURNS = [
    {"role": "user", "content": " Grüße! <b>&'\"\n你好 👋 {{ not a variable }} {% nor a tag %}"},
    {"role": "assistant", "content": "Hello </s>\n there", "reasoning": "be polite"},
    {"role": "user", "content": "And the weather?"},
]
CALL = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln"}}}],
    },
    {"role": "tool", "content": {"temperature": 21.5, "sky": None, "dry": True}},
]
CONVERSATIONS = {"one": TURNS[:1], "turns": TURNS, "system": [SYSTEM, *TURNS], "call": [SYSTEM, *TURNS, *CALL]}


def reference(template: str, messages: list, **arguments) -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_the_references(name, conversation, tools, prompt):
    messages = CONVERSATIONS[conversation]
    documents = [{"title": "Ä", "text": "straße"}]
    arguments = {"tools": tools, "documents": documents, "add_generation_prompt": prompt}
    try:
        expected = reference(TEMPLATES[name], messages, **arguments)
    except (jinja2.TemplateError, TypeError):
        assert conversation == "call"
        with pytest.raises(ValueError, match="the chat template failed"):
            render_chat(TEMPLATES[name], messages, bos_token="<s>", eos_token="</s>", **arguments)
        return
    ours = render_chat(TEMPLATES[name], messages, bos_token="<s>", eos_token="</s>", **arguments)
    assert ours == expected
    # The parity means something only if white space control and the template's own environment matter.
    if name in ("zephyr", "llama2"):
        plain = jinja2.Template(TEMPLATES[name])
        assert plain.render(messages=messages, bos_token="<s>", eos_token="</s>", **arguments) != expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ 2 ** 10 }} {{ 7 % 4 }} {{ 'ab' * 3 }} {{ [1] * 2 + [3] }} {{ 1.5 * 2 }} {{ '%05.1f|%s' % (2.25, 'x') }}",
        "{{ 1700000000 | tojson }} {{ '%d' % 4000000000 }} {{ [4000000000] | join }} {{ 4000000000 | center(12) }}",
        "{{ 1700000000 * 1000 }} {{ 1700000000 | int }} {{ 4000000000 | string }} {{ -3 | abs }}",
        "{{ 'a,b'.split(',') | join('; ') }} {{ 'x'.center(9, '*') }} {{ 'x' | center(5) }}|{{ 'a\nb' | indent(4) }}",
        "{{ {'b': 1, 'a': [none, true, 'é<']} | tojson(indent=2, sort_keys=true) }}",
        "{{ 'é' | tojson(ensure_ascii=true) }}",
        "{% macro m(x, y='d') %}<{{ x }}{{ y }}{{ caller() if caller else '' }}>{% endmacro %}"
        "{{ m(1) }}{% call m(2) %}c{% endcall %}",
        "{% for a in [1, [2, [3]]] recursive %}{{ '(' ~ loop(a) ~ ')' if a is iterable else a }}{% endfor %}",
        "{% set x %}block {{ 1 }}{% endset %}{{ x | upper }}{% filter upper %}low{% endfilter %}",
        "{% set x = 'a' ~ 1 ~ none ~ [2] %}{{ x ~ (x ~ 'b') ~ {'k': x ~ 'c'} }}{{ [x ~ 1] }}",
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}{{ missing }}{{ range(3) | list }}",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + ns.self %}{{ ns.a }}{{ dict(x=1) }}{{ 'a' 'b' }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{{ '{:>8}|{a!r}'.format(5, a='x') }}{{ 'k={k}'.format_map({'k': 1}) }}{{ messages[0].content[::-1] }}",
        "{{ messages | map(attribute='content') | join('\n') | replace('e', '') | truncate(12) | wordwrap(5) }}",
        "{{ 'since 20240101: %s, %-9.3f%%' % ('x', 2.5) }}{{ '%(k)s' % {'k': 1} }}{{ '%s' | format('20240101') }}",
        "{{ ('<{}>' | safe).format('<') }}{{ '{:>{}}'.format('x', 5) }}{{ '20240101{}'.format('12345678') }}",
        "{{ '<' | e ~ '<' }}{{ ('<' | e) + '<' }}{{ messages | tojson }}{{ messages | length }}{{ 'abc' | list }}",
        "{{ 'a' ~ 'b' == 'ab' }}{{ 1 < 2 < 3 }}{{ [1] ~ [2] }}{{ ([1, 2] + [3])[1:] ~ 'x'[:1] }}",
        "{{ 'b' ~ 'c' in ['bc'] }}{{ {'a' ~ 1: [1 ~ 2]}['a1'][0][1:] }}{{ {'k': messages[0:1]}.k[0].role }}",
        "{% set a, b = 1, (2, 3)[1:] %}{{ a }}{{ b }}{{ 7 // 2 }}{{ 7 / 2 }}{{ 7 - 2.5 }}{{ 2.345 | round(2) }}",
        "{{ 'x (y) 20240101 %s' % 1 }}{{ 'a b'.split() }}{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a\\nb'.splitlines() }}",
        "{{ [1, 2] | sum }}{{ [1, 1, 2] | unique | list }}{{ 'abc' | list | last }}{{ 'x' ~ namespace is defined }}",
        "{{ 'x' if messages is defined and missing is undefined }}{{ messages[0].get('nothing', 'default') }}",
    ],
)
def test_the_language_is_the_references(template):
    messages = [{"role": "user", "content": "Were there <eels>?"}]
    assert render_chat(template, messages, bos_token="<s>", eos_token="</s>") == reference(template, messages)


def test_a_difference_in_the_template_shows():
    assert render_chat(ZEPHYR, TURNS, eos_token="</s>") != reference(ZEPHYR.replace("\\n", " "), TURNS)


def test_dates(monkeypatch):
    assert render_chat("{{ strftime_now('%d %B %Y') }}", TURNS) == datetime.datetime.now().strftime("%d %B %Y")
    dated = render_chat(LLAMA_3, TURNS, bos_token="<s>", date_string="26 Jul 2024")
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in dated


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only user\nand assistant roles') }}", "Only user and assistant roles"),
        ("line\n{% if %}", r"\(line 2\)"),
        ("{% for x in y %}", r"\(line 1\)"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% include 'other' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages | nofilter }}", "nofilter"),
        ("{{ strftime_now(1) }}", "must be str"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ raise_exception('a\x1b[31mb') }}", r"a\\x1b\[31mb"),
    ],
)
def test_faulty_templates_end_in_one_line(template, reason):
    with pytest.raises(ValueError, match=f"^the chat template failed.*(?:{reason})") as error:
        render_chat(template, TURNS)
    assert "\n" not in str(error.value)


# Two lists that are equal, and take 2 ** 40 steps to compare, to hash or to print.
NESTED = "{% set ns = namespace(a=(), b=()) %}{% for i in range(40) %}{% set ns.a = (ns.a, ns.a) %}"
NESTED += "{% set ns.b = (ns.b, ns.b) %}{% endfor %}"
ALIKE = "range(0, 50000 * 2305843009213693951, 2305843009213693951)"  # numbers with one hash
ENDLESS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    "{% set ns = namespace(n=[]) %}{% for a in range(60) %}{% set ns.n = [ns.n, ns.n] %}{% endfor %}{{ ns.n }}",
    *(NESTED + end for end in ("{{ ns.a == ns.b }}", "{{ ns.a in [ns.b] }}", "{{ {ns.a: 1} }}", "{{ ns.a | upper }}")),
    *(NESTED + end for end in ("{{ {1: ns.a}.values() }}", "{{ '{!r}'.format(ns.a) }}", "{{ raise_exception(ns.a) }}")),
    *(NESTED + end for end in ("{{ [ns.a] | select('eq', ns.b) | list }}", "{{ [ns.b].index(ns.a) }}")),
    "{% set ns = namespace(a=()) %}{% macro m() %}{% set ns.a = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(ns.a, ns.a) }}{% endfor %}{{ {ns.a: 1} }}",
    "{{ 5 | round(-100000000) }}",
    "{{ 5 | round(precision=100000000, method='ceil') }}",
    "{{ ('f' * 20000000) | int(base=16) // 7 }}",
    "{% set f %}{{ 'f' * 4000 }}{% endset %}{% set x = f | int(base=16) %}{% for i in range(99999) %}"
    "{% set x = x * x // 7 %}{{ x * x * x * x * x }}{% endfor %}",
    "{{ ('x' * 10000000) | wordwrap(1) }}",
    "{{ ('<!---->' * 1000000) | striptags }}",
    "{{ (('<!---->' * 1000000) | safe).striptags() }}",
    "{{ ('äöü' * 300000).encode('punycode') }}",
    "{{ ('a' * 10000000).rfind('ab' ~ 'a' * 3000000) }}",
    "{{ ('%(a)s' * 1000000) % {'a': 'x'} }}",
    "{{ ([[1]] * 200000) | sum(start=[]) }}",
    "{{ (['x'] * 100000) | map(attribute='0' ~ '.0' * 30000) | list }}",
    f"{{{{ {ALIKE} | unique | list }}}}",
    f"{{{{ {{}}.fromkeys({ALIKE}) }}}}",
    f"{{{{ dict({ALIKE} | map('batch', 2)) }}}}",
    "{% set a = 'x' * 10000000 %}{% if a is lower and a is lower and a is lower %}{% endif %}" * 700,
    "{{ [" + "[]," * 20000 + "] }}",
    "{% macro m() %}{% endmacro %}" * 20000,
]
GROWING = [
    "{{ 'x' * 10000000000 }}",
    "{{ 10000000000 * 'x' }}",
    "{{ [0] * 10000000000 }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x'.encode().zfill(10000000000) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10000000000) }}",
    "{{ '{x:10000000000}'.format_map({'x': 1}) }}",
    "{{ '\t'.expandtabs(10000000000) }}",
    "{{ [1] | tojson(indent=10000000000) }}",
    "{{ 'a\nb' | indent(10000000000) }}",
    "{{ [1] | batch(10000000000, 'x') | list }}",
    "{{ range(10000000000) }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ '' ~ ns.s | tojson %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(1000) %}" + "literal text " * 200 + "{% endfor %}{% endfor %}",
    "{% macro m() %}{% for a in range(100000) %}" + "x" * 9000 + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "{% set s = 'x' * 1000000 %}{% for a in range(100000) %}{{ s }}{% endfor %}",
    "{% set s = 'x' * 1000000 %}{{ ([{'a': s}] * 100000) | map(attribute='a') | join }}",
    "{{ lipsum(n=100000) }}",
    "{% set s = 'x' * 1000000 %}{% set ns = namespace(l=[]) %}{% for i in range(10000) %}"
    "{% set ns.l = [ns.l, s[1:]] %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l, [" + "[]," * 1000 + "]] %}"
    "{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l, 2 ** 32000 + i] %}{% endfor %}",
    "{{ ('€' * 2000000) | list }}",
    "{{ ''.join('€' * 2000000) }}",
    "{{ ([0] * 10000000) | length }}",
    "{{ ('a,' * 2000000).split(',') }}",
    "{{ ('a ' * 2000000).split() }}",
    "{{ ('é1\n' * 1000000).splitlines() }}",
    "{{ ('' * 4000000) | tojson }}",
    "{{ range(100000) | map('default', 'x' * 1000000) | map('center', 1000000) | join }}",
    "{{ ('a' * 1000000) | replace(new='b' * 2000, old='') }}",
    "{{ strftime_now('%Y' * 30000000) }}",
    "{{ ('b%9999999999d').encode() % 1 }}",
    "{{ '%(a(b))99999999999d' % {'a(b)': 1} }}",
    "{% autoescape true %}{{ '<' * 1000000 }}{% endautoescape %}",
    "{{ a }}" * 20000,
]


@pytest.mark.parametrize("template", [*ENDLESS, *GROWING])
def test_templates_that_would_not_end_are_stopped(template, monkeypatch):
    """Some of them, which do a great deal of work in a single call, are done before they are stopped."""
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    start = time.monotonic()
    tracemalloc.start()
    try:
        text = render_chat(template, TURNS)
    except ValueError as error:
        text = str(error)
        assert text.startswith("the chat template failed")
        assert "ended with" not in text
    assert len(text) <= chat.MAX_TEXT_BYTES
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert time.monotonic() - start < 6
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))  # the next is as ever


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS[0], "it runs for more than 1 seconds"),
        (GROWING[0], "it takes more than 128 MiB"),
        ("{{ ('€' * 3000000) }}", "its text has more than 8 MiB"),
    ],
)
def test_what_was_too_much_is_said(template, reason, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match=f"^the chat template failed: {reason}$"):
        render_chat(template, TURNS)


def test_the_process_that_renders_can_open_nothing(monkeypatch):
    """Even if a template came out of the sandbox."""
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))
    process = chat._idle[-1]._process
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for name in ("Max open files", "Max file size", "Max core file size"):
        assert re.search(rf"{name} +0 +0 ", limits), limits
    assert re.search(r"Max address space +\d+ ", limits), limits


def test_the_process_is_kept_and_replaced():
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))
    held = list(chat._idle)
    with pytest.raises(ValueError, match="nothing"):
        render_chat("{{ nothing.at.all }}", TURNS)
    assert chat._idle == held
    for renderer in held:
        renderer.end()
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))
    assert chat._idle
    assert not set(chat._idle) & set(held)


@pytest.mark.parametrize("kind", ["filter", "test"])
def test_all_of_jinja_is_imported_beforehand(kind):
    """What is imported later, when no file can be opened, would fail."""
    names = jinja2.filters.FILTERS if kind == "filter" else jinja2.tests.TESTS
    said = []
    for name in names:
        for value in ("'a b'", "1.5", "[1]", "{'a': 1}", "nothing"):
            try:
                said.append(render_chat(f"{{{{ {value} {'|' if kind == 'filter' else 'is'} {name} }}}}", TURNS))
            except ValueError as error:
                said.append(str(error))
    assert not [text for text in said if "open files" in text]


def length(n: int) -> str:
    return render_chat("{{ messages | length }}{{ n }}", TURNS, n=n)


def test_threads_and_forks_each_get_their_own_text():
    expected = [f"{len(TURNS)}{n}" for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(length, range(40))) == expected

    def endless() -> None:
        with pytest.raises(ValueError, match="seconds"):
            render_chat(ENDLESS[0], TURNS)

    rendering = threading.Thread(target=endless)
    rendering.start()  # what is forked meanwhile does not wait for it
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(length, range(8)) == expected[:8]
    rendering.join()
    assert length(7) == expected[7]


def test_modules_in_the_current_folder_are_not_imported(tmp_path):
    """As they would be where sys.path begins with "", in `python -c` and in notebooks."""
    (tmp_path / "jinja2.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    code = "import os, sys; from llama_flex.chat import render_chat; assert sys.path[0] == ''; os.chdir(sys.argv[1]);"
    code += "print(render_chat('{{ messages | length }}', [{}]))"
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=path)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", ["-t 4", "-v 8000000", "-n 30"])
def test_limits_of_the_shell_stay(limit):
    code = "from llama_flex.chat import render_chat; print(render_chat('{{ messages | length }}', [{}]))"
    command = f"ulimit {limit}; {sys.executable} -W error -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_what_is_no_plain_data_but_nearly():
    class List(list):
        pass

    class Pair(NamedTuple):
        a: int
        b: int

    message = [{"role": "user", "content": List([1, Pair(2, 3)])}]
    assert render_chat("{{ messages[0].content }}", message) == "[1, (2, 3)]"
    assert render_chat("{{ add_generation_prompt }}", TURNS, add_generation_prompt=0) == "False"
    nested: list = []
    nested.append(nested)
    with pytest.raises(ValueError, match="recursion"):
        render_chat("", [{"content": nested}])
    with pytest.raises(ValueError, match="the conversation has 60 MiB; a chat template takes 32"):
        render_chat("", [{"content": "x" * (60 << 20)}])


def test_ctrl_c_while_rendering(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        render_chat(ENDLESS[0], TURNS)
    assert time.monotonic() - start < 3
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))


def test_long_conversations_are_not_stopped():
    long = [{"role": role, "content": "word " * 2000} for _ in range(50) for role in ("user", "assistant")]
    for name, template in TEMPLATES.items():
        arguments = {"date_string": "today"} if name == "llama3" else {}
        ours = render_chat(template, long, bos_token="<s>", eos_token="</s>", **arguments)
        assert ours == reference(template, long, add_generation_prompt=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"messages": []}, "non-empty list of messages"),
        ({"messages": "Hi"}, "non-empty list of messages"),
        ({"messages": {"role": "user", "content": "Hi"}}, "non-empty list of messages"),
        ({"messages": ["Hi"]}, "every message must be a dict, not str"),
        ({"messages": TURNS, "tools": [len]}, "is a Python function; pass its JSON schema"),
        ({"messages": TURNS, "tools": ["name"]}, "every tool must be a dict"),
        ({"messages": TURNS, "documents": ["text"]}, "every document must be a dict"),
        ({"messages": [{"role": "user", "content": object()}]}, "messages holds a object"),
        ({"messages": TURNS, "when": datetime.date(2024, 1, 1)}, "when holds a date"),
    ],
)
def test_wrong_arguments_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        render_chat(CHATML, **arguments)


# --- where the template comes from


ENDINGS = {
    "white space": "The answer is ",
    "white space before": "  The answer",
    "in the template's own words": "im_end",
    "a line": "line one\nline two\n",
    "the template's own marker": "<|im_end|>",
    "blocks": [{"type": "text", "text": "first"}, {"type": "image"}, {"type": "text", "text": "last "}],
    "empty": "",
    "twice": "Hello! How are you?",
}
OWN = {
    "drops": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "cuts": "{% for m in messages %}[{{ m.role }}]{{ m.content[:5] }}{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}",
    "thinks": "{% for m in messages %}[{{ m.role }}]{{ m.thinking }}|{{ m.content }}[end]{% endfor %}",
    "blocks": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{{ b.text }};{% endfor %}{% endif %}[end]{% endfor %}",
    "escapes": "{% for m in messages %}[{{ m.role }}]{{ m.content | e }}[end]{% endfor %}",
    "JSON": "{% for m in messages %}{{ m.content | tojson }}[end]{% endfor %}",
    "no content": "{% for m in messages %}{{ m.role }}{% endfor %}",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", [*TEMPLATES, *OWN])
def test_a_message_that_is_continued_ends_where_it_ends_in_transformers(name, ending):
    template = {**TEMPLATES, **OWN}[name]
    messages = [*TURNS[:1], {"role": "assistant", "content": ENDINGS[ending]}]
    arguments = {"add_generation_prompt": False, "continue_final_message": True}
    try:
        expected = reference(template, messages, **arguments)
    except (jinja2.TemplateError, TypeError, ValueError):
        with pytest.raises(ValueError, match=r"continue|the chat template failed"):
            render_chat(template, messages, bos_token="<s>", eos_token="</s>", **arguments)
        return
    assert render_chat(template, messages, bos_token="<s>", eos_token="</s>", **arguments) == expected


def test_what_is_continued_may_be_reasoning():
    message = {"role": "assistant", "content": "", "reasoning_content": "Let me see "}
    arguments = {"add_generation_prompt": False, "continue_final_message": "reasoning_content"}
    expected = reference(OWN["thinks"], [*TURNS[:1], message], **arguments)
    assert expected.endswith("Let me see ")
    assert render_chat(OWN["thinks"], [*TURNS[:1], message], bos_token="<s>", eos_token="</s>", **arguments) == expected


@pytest.mark.parametrize(
    ("message", "arguments", "reason"),
    [
        ({"role": "assistant", "content": "x"}, {"add_generation_prompt": True}, "add_generation_prompt=False"),
        ({"role": "assistant"}, {}, "the last message has no 'content'"),
        ({"role": "assistant", "content": 5}, {}, "5, which is no text"),
        ({"role": "assistant", "content": [{"type": "image"}]}, {}, "no text to continue"),
        ({"role": "assistant", "content": "x"}, {"continue_final_message": "thinking"}, "has no 'thinking'"),
    ],
)
def test_a_message_that_cannot_be_continued_is_named(message, arguments, reason):
    arguments = {"add_generation_prompt": False, "continue_final_message": True} | arguments
    with pytest.raises(ValueError, match=re.escape(reason)):
        render_chat(OWN["trims"], [*TURNS[:1], message], **arguments)


def folder_with(path: Path, config: dict, **files: str) -> Path:
    path.mkdir(parents=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config})
    )
    for name, content in files.items():
        file = path / name.replace("__", ".").replace("DIR_", "additional_chat_templates/")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return path


def test_the_folders_template(tmp_path):
    named = [{"name": "default", "template": "D {{ bos_token }}"}, {"name": "tool_use", "template": "T {{ tools }}"}]
    folders = {
        "config": folder_with(tmp_path / "config", {"chat_template": "C {{ eos_token }}{{ pad_token }}"}),
        "named": folder_with(tmp_path / "named", {"chat_template": named}),
        "file": folder_with(tmp_path / "file", {"chat_template": "C"}, chat_template__jinja="F {{ bos_token }}"),
        "extra": folder_with(tmp_path / "extra", {}, chat_template__jinja="F", DIR_tool_use__jinja="X {{ extra }}"),
    }
    for folder in folders.values():
        ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for arguments in ({}, {"tools": TOOLS}, {"chat_template": "own {{ bos_token }}"}, {"bos_token": "other"}):
            assert ours.apply_chat_template(TURNS, **arguments) == theirs.apply_chat_template(
                TURNS, tokenize=False, add_generation_prompt=True, **arguments
            )
    assert Tokenizer.from_pretrained(folders["named"]).chat_template == "D {{ bos_token }}"
    assert Tokenizer.from_pretrained(folders["file"]).chat_template == "F {{ bos_token }}"
    named_one = Tokenizer.from_pretrained(folders["extra"]).apply_chat_template(
        TURNS, chat_template="tool_use", extra=1
    )
    assert named_one == "X 1"
    processor = folder_with(tmp_path / "json", {}, chat_template__json=json.dumps({"chat_template": "J"}))
    assert Tokenizer.from_pretrained(processor).chat_template == "J"


def test_no_template(tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder_with(tmp_path / "a", {}))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"no chat template; pass chat_template=..., or put a chat_template\.jinja"):
        tokenizer.apply_chat_template(TURNS)
    assert tokenizer.apply_chat_template(TURNS, chat_template="{{ messages | length }}") == "3"
    only = folder_with(tmp_path / "b", {"chat_template": [{"name": "rag", "template": "R"}]})
    with pytest.raises(ValueError, match=r"named ones it has: rag"):
        Tokenizer.from_pretrained(only).apply_chat_template(TURNS)


@pytest.mark.weights
@pytest.mark.parametrize("path", ["SmolLM2-135M-Instruct", "test-inputs/llama3"])
def test_the_template_of_a_real_folder(path):
    folder = WEIGHTS / path
    if not folder.is_dir():
        pytest.skip(f"no {folder}: see weights/README.md")
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages in (TURNS, [SYSTEM, *TURNS]):
        for prompt in (True, False):
            text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, add_special_tokens=False) == ids
