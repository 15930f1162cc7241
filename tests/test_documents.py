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
    """What a text names and is not there: tests, as `tests/x.py::test_name`, and the words of their names, as
    `pytest tests/x.py -k "a or b"`."""
    named = [((file,), rf"{test}\(", test) for file, test in re.findall(r"\b(tests/\w+\.py)::(\w+)", text)]
    for files, words in re.findall(r'pytest ((?:tests/\w+\.py )+)[^`"]*-k "?([^`"]+)', text):
        named += [(tuple(files.split()), rf"test_\w*{word}", word) for word in words.split(" or ")]
    sources = {
        file: (ROOT / file).read_text() if (ROOT / file).is_file() else "" for files, *_ in named for file in files
    }
    return [
        name
        for files, pattern, name in named
        if not any(re.search(rf"^def {pattern}", sources[file], re.MULTILINE) for file in files)
    ]


def absent_files(text: str, folder: Path) -> list[str]:
    """The relative links of a text that lead to no file, and the modules that it runs and that are not there."""
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m ((?:llama_flex|tools)\.\w+)", text)]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^()#\s]+)(?:#[\w-]*)?\)", text) if not re.match(r"[a-z]+:", link)]
    return [x for x in links if not (folder / x).exists()] + [x for x in modules if not (ROOT / x).exists()]


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
    named = "`tests/test_documents.py::test_names_of_nothing_would_be_noticed`, `tests/no.py::test_a`, "
    named += '`tests/test_documents.py::test_names`, `pytest tests/test_documents.py tests/no.py -k "nothing or wring"`'
    assert absent_tests(named) == ["test_a", "test_names", "wring"]
    links = "[a](log.md) [b](no.md#part) [c](../tests/no.py) [d](https://pytorch.org/no) [e](#part)\n"
    links += "```\nf[0](x)\n```\n`python -m tools.no`, `python -m tools.parity`\n"
    assert absent_files(links, ROOT / "docs") == ["no.md", "../tests/no.py", "tools/no.py"]
