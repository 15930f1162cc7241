"""docs/masks.md: each command draws the mask of the code above it, and the picture below it shows that mask."""

import inspect
import re
import shlex
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch
from helpers import ROOT, few

from llama_flex import Tokens, masks
from llama_flex.eval import show_mask

TEXT = (ROOT / "docs" / "masks.md").read_text()
START = TEXT.index("```python\nimport torch")
IMPORTS = TEXT[START:].split("```")[1].removeprefix("python\n")
SECTION = r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```\s+```bash\n(.*?)\n```\s+!\[[^\]]+\]\((.*?)\)\n"
SECTIONS = re.findall(SECTION, TEXT, re.DOTALL)


def cells(picture: Path, figure, count: int) -> torch.Tensor:
    """Tell which cells of a picture differ in colour from masked ones, `[T, T]`. figure: tells where the cells are."""
    pixels = matplotlib.image.imread(picture)[..., :3]
    height, width = pixels.shape[:2]
    masked = torch.tensor(list(bytes.fromhex(show_mask.MASKED_COLOUR))) / 255
    place = figure.axes[0].transData + figure.transFigure.inverted()
    visible = torch.zeros(count, count, dtype=torch.bool)
    for query in range(count):
        for key in range(count):
            x, y = place.transform((key, query))
            colour = torch.tensor(pixels[int((1 - y) * height), int(x * width)])
            visible[query, key] = (colour - masked).abs().max() > 0.02
    return visible


TITLES = [section[0] for section in SECTIONS]
SOME = ["Window and sinks", "A window for each head", "Tree"]


@pytest.mark.parametrize("title", few(SOME, [title for title in TITLES if title not in SOME]))
def test_command_code_and_picture_are_of_one_mask(title, tmp_path, monkeypatch, capsys):
    _, code, command, link = SECTIONS[TITLES.index(title)]
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "llama_flex.eval.show_mask"]
    assert words[-2:] == ["--output", f"docs/{link}"]
    drawn, draw = [], show_mask.draw

    def remember(mask, tokens, labels, **options):
        figure = draw(mask, tokens, labels, **options)
        drawn.append((tokens, options["head"], figure))
        return figure

    monkeypatch.setattr(show_mask, "draw", remember)
    picture = tmp_path / "mask.png"
    with matplotlib.rc_context(fname="docs/masks/matplotlibrc"):
        show_mask.main([*words[3:-1], str(picture)])
    assert capsys.readouterr().out.endswith(f"{picture} is written\n")
    [(tokens, head, figure)] = drawn

    names: dict = {}
    exec(IMPORTS + code, names)
    file = re.search(r"--mask docs/masks/cookbook\.py:(\w+)", command)
    if file:
        assert code in Path("docs/masks/cookbook.py").read_text()
    mask = names[file[1] if file else "mask"]
    expected = mask.dense(tokens, tokens, head + 1)[0, -1]
    count = len(expected)
    assert cells(picture, figure, count).equal(expected)
    assert cells(Path("docs", link), figure, count).equal(expected)
    assert Path("docs", link).stat().st_size < 25_000


def test_every_command_and_picture_belongs_to_a_section():
    commands = re.findall(
        r"^python -m llama_flex\.eval\.show_mask .*", TEXT, re.MULTILINE
    )  # as the command that draws all of them finds them
    assert commands == [section[2] for section in SECTIONS]
    pictures = [section[3] for section in SECTIONS]
    assert re.findall(r"!\[.*?\]\((.*?)\)", TEXT) == pictures
    assert sorted(f"masks/{path.name}" for path in (ROOT / "docs" / "masks").glob("*.png")) == sorted(pictures)


def test_every_named_mask_has_its_place():
    functions = [f for name, f in vars(masks).items() if inspect.isfunction(f) and not name.startswith("_")]
    named = [f.__name__ for f in functions if f.__annotations__.get("return") == "Mask"]
    assert len(named) > 10
    for name in named:
        assert any(f"masks.{name}(" in code for _, code, _, _ in SECTIONS), name


def test_blocks_in_the_terminal_are_as_shown(capsys):
    [(command, shown)] = re.findall(r"```\n\$ (python -m llama_flex\.eval\.show_mask .*?)\n(.*?)```", TEXT, re.DOTALL)
    show_mask.main(shlex.split(command)[3:])
    assert capsys.readouterr().out == shown


def test_links_within_the_cookbook_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^## (.*)", TEXT, re.M)
    }
    for target in re.findall(r"\]\(#(.*?)\)", TEXT):
        assert target in headings


@pytest.mark.parametrize("other", few([masks.sliding_window(5)], [masks.causal()]))
def test_a_picture_of_another_mask_would_be_noticed(other, tmp_path):
    tokens, picture = Tokens.arriving(12), tmp_path / "mask.png"
    figure = show_mask.draw(other, tokens)
    figure.savefig(picture)
    found = cells(picture, figure, 12)
    assert found.equal(other.dense(tokens, tokens, 1)[0, 0])
    assert not found.equal(cells(ROOT / "docs" / "masks" / "sliding_window.png", figure, 12))
