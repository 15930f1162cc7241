"""docs/implementation.md names functions and files; they are there."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "implementation.md").read_text()
MODULES = {
    path.stem: importlib.import_module(f"llama_flex.{path.stem}")
    for path in (ROOT / "llama_flex").glob("*.py")
    if path.stem not in ("__init__", "gemv")  # gemv imports Triton, which comes with torch's CUDA builds only
}
CLASSES = {
    name: value for module in MODULES.values() for name, value in vars(module).items() if isinstance(value, type)
}


def test_every_function_that_is_named_exists():
    named = re.findall(r"\b([A-Za-z]\w*)\.([A-Za-z_]\w*)\b", re.sub(r"```python.*?```", "", TEXT, flags=re.DOTALL))
    others = {
        ("module", "function"),
        ("Class", "method"),
        ("F", "linear"),
        ("torch", "mv"),
        ("torch", "mm"),
        ("torch", "vmap"),
        ("config", "json"),
    }
    ours = {pair for pair in named if pair[1] != "py"} - others
    assert len(ours) > 50
    for owner, name in ours - {("gemv", "launch")}:
        assert hasattr((MODULES | CLASSES)[owner], name), f"{owner}.{name}"
    assert "def launch(" in (ROOT / "llama_flex" / "gemv.py").read_text()


def test_every_file_that_is_named_exists():
    files = re.findall(r"\]\((\.\./[^)]+)\)", TEXT)
    assert len(files) > 15
    for file in files:
        assert (ROOT / "docs" / file).is_file(), file
