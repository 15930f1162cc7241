"""docs/implementation.md names modules, functions, classes and files; they are there."""

import ast
import importlib
import inspect
import re
from collections import defaultdict

from helpers import CUDA_ONLY, ROOT

import llama_flex

TEXT = (ROOT / "docs" / "implementation.md").read_text()
# What looks like `module.function` or `Class.method` and is none of ours.
OTHERS = {
    ("module", "function"),
    ("Class", "method"),
    ("F", "linear"),
    ("torch", "mv"),
    ("torch", "mm"),
    ("torch", "vmap"),
}
FILE_ENDINGS = ("py", "cpp", "cu", "md", "json", "toml")


def named(text: str) -> set[tuple[str, str]]:
    """Return the pairs `module.function` and `Class.method` of a text, without its blocks of Python."""
    pairs = re.findall(r"\b([A-Za-z]\w*)\.([A-Za-z_]\w*)\b", re.sub(r"```python.*?```", "", text, flags=re.DOTALL))
    return {pair for pair in pairs if pair[1] not in FILE_ENDINGS} - OTHERS


def names_of_package() -> dict[str, set[str]]:
    """Return what each module, subpackage and class has, by its last name; those with the same one, such as cli.chat
    and text.chat, are taken together."""
    names = defaultdict(set, {"llama_flex": set(llama_flex.__all__)})
    for path in (ROOT / "llama_flex").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if path.stem in CUDA_ONLY:
            tree = ast.parse(path.read_text())
            names[path.stem] |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            continue
        imported = importlib.import_module(module)
        names[module.split(".")[-1]] |= set(dir(imported))
        for name, value in vars(imported).items():
            if inspect.isclass(value) and value.__module__ == module:
                names[name] |= set(dir(value))
    return names


def absent(pairs: set[tuple[str, str]]) -> list[str]:
    """Return those of the pairs whose first name is none of the package's, or has not the second."""
    names = names_of_package()
    return [f"{owner}.{name}" for owner, name in sorted(pairs) if name not in names.get(owner, ())]


def test_every_function_that_is_named_exists():
    assert len(named(TEXT)) > 50
    assert absent(named(TEXT)) == []


def test_a_name_of_nothing_would_be_noticed():
    there = "Cache.append library.causal masks.causal gemv.gemv engine.scheduler output.Output output.OutputProcessor "
    text = there + "llama_flex.Engine prompts_file.py Cache.apend library.casual gemv.launch nowhere.causal"
    assert absent(named(text)) == ["Cache.apend", "gemv.launch", "library.casual", "nowhere.causal"]


def test_every_file_that_is_named_exists():
    files = re.findall(r"\]\((\.\./[^)]+)\)", TEXT)
    assert len(files) > 15
    for file in files:
        assert (ROOT / "docs" / file).exists(), file
