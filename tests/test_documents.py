"""The documents hold: their Python runs; the tests, files and modules that they name are there."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT

DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
ALONE = {"docs/pitfalls.md"}  # each block has names of its own; elsewhere a block uses the names of those before
LONG = {"docs/pitfalls.md", "docs/inside.md"}  # take half a minute each
WITH_PYTHON = [name for name, path in DOCUMENTS.items() if "```python\n" in path.read_text()]


def case(name: str):
    """Return a document as the value of a parameter, with the marks of what it needs."""
    marks = [pytest.mark.weights] if "weights/" in DOCUMENTS[name].read_text() else []
    return pytest.param(name, marks=[*marks, pytest.mark.exhaustive] if name in LONG else marks)


def run(text: str, alone: bool) -> None:
    """Run the Python of a document. In a block that begins with `# raises Error: start of its message` the last
    statement must raise that error, and no statement before it may. alone: each block has names of its own."""
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        names = {} if alone else names
        said = re.match(r"# raises (\w+): (.+)\n", block)
        if said is None:
            exec(block, names)
            continue
        *before, last = ast.parse(block).body
        exec(compile(ast.Module(before, []), "<block>", "exec"), names)
        with pytest.raises(Exception, match="^" + re.escape(said[2])) as caught:
            exec(compile(ast.Module([last], []), "<block>", "exec"), names)
        assert type(caught.value).__name__ == said[1]


def source_of(place: str) -> str:
    """Return the source of a file of tests, or of all files of a folder of them."""
    path = ROOT / place
    return "".join(file.read_text() for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py"))))


def absent_tests(text: str) -> list[str]:
    """Return what a text names and is not there: files and folders of tests, as `tests/x.py` or `tests/text`; tests, as
    `tests/x.py::test_name`; parts of their names, as `pytest tests/x.py tests/text -k "a or b"`."""
    named = [((file,), rf"{test}\(", test) for file, test in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", text)]
    for places, words in re.findall(r'pytest ((?:tests/[\w/.]+ )+)[^`"]*-k "?([^`"]+)', text):
        named += [(tuple(places.split()), rf"test_\w*{word}", word) for word in words.split(" or ")]
    absent = [
        name
        for places, pattern, name in named
        if not any(re.search(rf"^def {pattern}", source_of(place), re.MULTILINE) for place in places)
    ]
    places = set(re.findall(r"(?<!\.\./)\btests/[\w/]*\w(?:\.py)?", text))
    return absent + sorted(place for place in places if not (ROOT / place).exists())


def absent_files(text: str, folder: Path) -> list[str]:
    """Return the relative links of a text that lead to no file, and the modules that it runs and that are not there."""
    names = re.findall(r"python -m ((?:llama_flex|tools)(?:\.\w+)+)", text)
    modules = [name.replace(".", "/") + ".py" for name in names]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^()#\s]+)(?:#[\w-]*)?\)", text) if not re.match(r"[a-z]+:", link)]
    return [x for x in links if not (folder / x).exists()] + [x for x in modules if not (ROOT / x).exists()]


# Not the README, of which test_readme.py looks at the values, too.
@pytest.mark.parametrize("name", [case(name) for name in WITH_PYTHON if name != "README.md"])
def test_the_python_of_a_document_runs(name, request, tmp_path, monkeypatch):
    text = DOCUMENTS[name].read_text()
    if "weights/" in text:
        (tmp_path / "weights").symlink_to(request.getfixturevalue("demo_folder").parent)
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # FlexAttention's own code is compiled at most 8 times in one process
    run(text, name in ALONE)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_in_documents_exist(name):
    path = DOCUMENTS[name]
    assert absent_tests(path.read_text()) == []
    assert absent_files(path.read_text(), path.parent) == []


BLOCKS = {
    "an assertion": ("assert 1 == 2", AssertionError),
    "nothing raised": ("# raises ValueError: invalid literal\nint('1')", pytest.fail.Exception),
    "another error": ("# raises TypeError: invalid literal\nint('a')", AssertionError),
    "another message": ("# raises ValueError: no number\nint('a')", AssertionError),
    "raised too early": ("# raises ValueError: invalid literal\nint('a')\nint('b')", ValueError),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_wrong_block_would_be_noticed(name):
    block, error = BLOCKS[name]
    with pytest.raises(error):
        run(f"Text.\n\n```python\n{block}\n```\n", alone=False)


def test_names_go_on_from_block_to_block_unless_each_stands_alone():
    text = "```python\n# raises ValueError: invalid literal\nx = 'a'\nint(x)\n```\n\n```python\nassert x == 'a'\n```\n"
    run(text, alone=False)
    with pytest.raises(NameError):
        run(text, alone=True)


def test_names_of_nothing_would_be_noticed():
    named = "`tests/test_documents.py::test_names_of_nothing_would_be_noticed`, `tests/no.py::test_a`, "
    named += '`tests/test_documents.py::test_names`, `pytest tests/test_documents.py tests/no.py -k "nothing or wring"`'
    named += '`pytest tests/text tests/no -m gpu -k "stream or strim"`, `tests/text/test_chat.py::test_dates`'
    absent = ["test_a", "test_names", "wring", "strim", "tests/no", "tests/no.py"]
    assert absent_tests(named) == absent
    links = "[a](log.md) [b](no.md#part) [c](../tests/no.py) [d](https://pytorch.org/no) [e](#part)\n"
    links += "```\nf[0](x)\n```\n`python -m tools.no`, `python -m llama_flex.eval.parity`, "
    links += "`python -m llama_flex.generate`. `python -m llama_flex.eval.no`, `python -m llama_flex.eval.lm_eval`.\n"
    absent = ["no.md", "../tests/no.py", "tools/no.py", "llama_flex/eval/no.py"]
    assert absent_files(links, ROOT / "docs") == absent
