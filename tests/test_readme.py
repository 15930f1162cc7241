"""The README's Python runs as it stands, and its map has the subpackages and the core files of the package."""

import re

import pytest
from helpers import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.weights
@pytest.mark.exhaustive  # takes half a minute
def test_the_python_of_the_readme_runs(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    assert "Paris" in capsys.readouterr().out
    assert names["logits"].shape == (1, 5, 49152)
    assert not names["local"].equal(names["logits"])
    assert [len(done.tokens) for done in names["batch"]] == [8, 8]
    assert names["fork"].length.tolist() == [4, 4, 4]
    assert "Paris" in names["answer"][0].text


def absent_from_map(readme: str) -> list[str]:
    """Return the subpackages that a README does not link to as `(llama_flex/masks)` or `(llama_flex/masks/)`,
    and the core files, such as `(llama_flex/model.py)`."""
    package = ROOT / "llama_flex"
    folders = [path.parent.name for path in package.glob("*/__init__.py")]
    files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    return [
        name for name in sorted([*folders, *files]) if not re.search(rf"\(llama_flex/{re.escape(name)}/?\)", readme)
    ]


def test_every_room_and_core_file_of_the_package_is_on_the_map():
    assert absent_from_map(README) == []


def test_a_file_missing_from_the_map_would_be_noticed():
    assert {"masks", "engine", "model.py"} <= set(absent_from_map("[masks](llama_flex/masks.py), model.py, llama_flex"))
    assert {"masks", "engine", "model.py"}.isdisjoint(
        absent_from_map("[masks/](llama_flex/masks), [engine/](llama_flex/engine/), [model.py](llama_flex/model.py)")
    )
