"""The process that renders chat templates: what is faulty, what would not end, threads, forks, limits."""

import multiprocessing
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest
from chat_helpers import TURNS
from helpers import ROOT, few

from llama_flex.text import chat
from llama_flex.text.chat import render_chat


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


# --- templates that would not end ---


# Two equal tuples that take 2 ** 40 steps to compare, to hash or to print.
NESTED = "{% set ns = namespace(a=(), b=()) %}{% for i in range(40) %}{% set ns.a = (ns.a, ns.a) %}"
NESTED += "{% set ns.b = (ns.b, ns.b) %}{% endfor %}"
ALIKE = "range(0, 50000 * 2305843009213693951, 2305843009213693951)"  # numbers with the same hash
ENDLESS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    NESTED + "{{ ns.a == ns.b }}",
    "{{ 5 | round(-100000000) }}",
]
MORE_ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    "{% set ns = namespace(n=[]) %}{% for a in range(60) %}{% set ns.n = [ns.n, ns.n] %}{% endfor %}{{ ns.n }}",
    *(NESTED + end for end in ("{{ ns.a in [ns.b] }}", "{{ {ns.a: 1} }}", "{{ ns.a | upper }}")),
    *(NESTED + end for end in ("{{ {1: ns.a}.values() }}", "{{ '{!r}'.format(ns.a) }}", "{{ raise_exception(ns.a) }}")),
    *(NESTED + end for end in ("{{ [ns.a] | select('eq', ns.b) | list }}", "{{ [ns.b].index(ns.a) }}")),
    "{% set ns = namespace(a=()) %}{% macro m() %}{% set ns.a = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(ns.a, ns.a) }}{% endfor %}{{ {ns.a: 1} }}",
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
    "{{ 'x' | center(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ range(10000000000) }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
]
MORE_GROWING = [
    "{{ 10000000000 * 'x' }}",
    "{{ [0] * 10000000000 }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x'.encode().zfill(10000000000) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:{}}'.format(1, 10000000000) }}",
    "{{ '{x:10000000000}'.format_map({'x': 1}) }}",
    "{{ '\t'.expandtabs(10000000000) }}",
    "{{ [1] | tojson(indent=10000000000) }}",
    "{{ 'a\nb' | indent(10000000000) }}",
    "{{ [1] | batch(10000000000, 'x') | list }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
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


@pytest.mark.parametrize("template", few([*ENDLESS, *GROWING], [*MORE_ENDLESS, *MORE_GROWING]))
def test_templates_that_would_not_end_are_stopped(template, monkeypatch):
    """Check that a template ends within bounds of time and memory; some of them are done before they reach one."""
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    started = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time: others may use the machine meanwhile
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
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 6
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))  # the next one is rendered as usual


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS[0], "it runs for more than 1 seconds"),
        (GROWING[0], "it takes more than 128 MiB"),
        ("{{ ('€' * 3000000) }}", "its text has more than 8 MiB"),
    ],
)
def test_the_limit_that_was_exceeded_is_named(template, reason, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match=f"^the chat template failed: {reason}$"):
        render_chat(template, TURNS)


# --- the process ---


def test_the_process_that_renders_can_open_nothing():
    """Check the limits that hold even for a template that escapes from Jinja's sandbox."""
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
    """Check every filter and test of Jinja: an import would fail once no file can be opened."""
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
    """Render the number of messages, and `n`."""
    return render_chat("{{ messages | length }}{{ n }}", TURNS, n=n)


def test_threads_and_forks_each_get_their_own_text(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1)
    expected = [f"{len(TURNS)}{n}" for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(length, range(40))) == expected

    def endless() -> None:
        with pytest.raises(ValueError, match="seconds"):
            render_chat(ENDLESS[0], TURNS)

    rendering = threading.Thread(target=endless)
    rendering.start()  # processes that are forked meanwhile do not wait for it
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(length, range(8)) == expected[:8]
    rendering.join()
    assert length(7) == expected[7]


def test_modules_in_the_current_folder_are_not_imported(tmp_path):
    """Check a process whose sys.path begins with "", as in `python -c` and in notebooks."""
    (tmp_path / "jinja2.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    code = "import os, sys; from llama_flex.text.chat import render_chat; assert sys.path[0] == ''; "
    code += "os.chdir(sys.argv[1]); print(render_chat('{{ messages | length }}', [{}]))"
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=path)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", ["-t 4", "-v 8000000", "-n 30"])
def test_limits_of_the_shell_stay(limit):
    code = "from llama_flex.text.chat import render_chat; print(render_chat('{{ messages | length }}', [{}]))"
    command = f"ulimit {limit}; {sys.executable} -W error -c {shlex.quote(code)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_ctrl_c_while_rendering(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        render_chat(ENDLESS[0], TURNS)
    assert time.monotonic() - start < 3
    assert render_chat("{{ messages | length }}", TURNS) == str(len(TURNS))
