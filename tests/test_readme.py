"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.weights
def test_the_python_of_the_readme_runs(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    assert "Paris" in capsys.readouterr().out
    assert names["logits"].shape == (1, 5, 49152)
    assert not names["local"].equal(names["logits"])
    assert [len(done.tokens) for done in names["batch"]] == [8, 8]
    assert names["fork"].length.tolist() == [4, 4, 4]
    assert "Paris" in names["answer"][0].text


def test_every_file_of_the_package_is_on_the_map():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "llama_flex").glob("*.py"):
        assert path.name == "__init__.py" or f"(llama_flex/{path.name})" in readme
