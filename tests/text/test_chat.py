"""A conversation is rendered as transformers renders it with the same template."""

import datetime
import re
from typing import NamedTuple

import jinja2
import pytest
from chat_helpers import SYSTEM, TOOLS, TURNS, reference

from llama_flex.text.chat import render_chat

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


CALL = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln"}}}],
    },
    {"role": "tool", "content": {"temperature": 21.5, "sky": None, "dry": True}},
]
CONVERSATIONS = {"one": TURNS[:1], "turns": TURNS, "system": [SYSTEM, *TURNS], "call": [SYSTEM, *TURNS, *CALL]}


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
    # The comparison means something only if the environment matters: white space control, filters.
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


def test_dates():
    assert render_chat("{{ strftime_now('%d %B %Y') }}", TURNS) == datetime.datetime.now().strftime("%d %B %Y")
    dated = render_chat(LLAMA_3, TURNS, bos_token="<s>", date_string="26 Jul 2024")
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in dated


def test_values_that_are_almost_plain_data_are_converted():
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
    with pytest.raises(ValueError, match="the conversation is 60 MiB; the limit is 32 MiB"):
        render_chat("", [{"content": "x" * (60 << 20)}])


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


# --- a last message that is continued ---


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


def test_reasoning_can_be_continued():
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
        ({"role": "assistant", "content": 5}, {}, "5, not text"),
        ({"role": "assistant", "content": [{"type": "image"}]}, {}, "no text to continue"),
        ({"role": "assistant", "content": "x"}, {"continue_final_message": "thinking"}, "has no 'thinking'"),
    ],
)
def test_a_message_that_cannot_be_continued_is_named(message, arguments, reason):
    arguments = {"add_generation_prompt": False, "continue_final_message": True} | arguments
    with pytest.raises(ValueError, match=re.escape(reason)):
        render_chat(OWN["trims"], [*TURNS[:1], message], **arguments)
