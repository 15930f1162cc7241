"""What the documents say holds: their Python runs, the tests and files that they name are there."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
ALONE = {"docs/pitfalls.md"}  # each block has names of its own; elsewhere blocks go on from those before
WITH_PYTHON = [
    pytest.param(name, marks=pytest.mark.weights if "weights/" in path.read_text() else ())
    for name, path in DOCUMENTS.items()
    if "```python\n" in path.read_text() and name != "README.md"  # whose values test_readme.py compares, too
]


def run(text: str, alone: bool) -> None:
    """Run the Python of a document. Of a block that begins with `# raises Error: start of its message` the last
    statement must raise that, and nothing before it."""
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


def absent_tests(text: str) -> list[str]:
    """The tests that a text names and that are not in the file it names."""
    named = dict.fromkeys(re.findall(r"\b(tests/\w+\.py)::(\w+)", text))
    sources = {file: (ROOT / file).read_text() if (ROOT / file).is_file() else "" for file, _ in named}
    return [f"{file}::{test}" for file, test in named if not re.search(rf"^def {test}\(", sources[file], re.MULTILINE)]


def absent_files(text: str, folder: Path) -> list[str]:
    """The relative links of a text that lead to no file."""
    links = re.findall(
        r"\]\(([^()#\s]+)(?:#[\w-]*)?\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    return [link for link in links if not re.match(r"[a-z]+:", link) and not (folder / link).exists()]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_document_runs(name, request, tmp_path, monkeypatch):
    text = DOCUMENTS[name].read_text()
    if "weights/" in text:
        (tmp_path / "weights").symlink_to(request.getfixturevalue("demo_folder").parent)
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()  # FlexAttention's own code is compiled at most 8 times, by all tests together
    run(text, name in ALONE)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_a_document_names_is_there(name):
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
    named = (
        "`tests/test_documents.py::test_the_python_of_a_document_runs`, `tests/no.py::test_a`, `tests/conftest.py::no`"
    )
    assert absent_tests(named) == ["tests/no.py::test_a", "tests/conftest.py::no"]
    links = (
        "[a](log.md) [b](no.md#part) [c](../tests/no.py) [d](https://pytorch.org/no) [e](#part)\n```\nf[0](x)\n```\n"
    )
    assert absent_files(links, ROOT / "docs") == ["no.md", "../tests/no.py"]
