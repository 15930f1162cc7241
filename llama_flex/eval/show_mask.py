"""Draw a mask over tokens, as text or as a picture: `python -m llama_flex.eval.show_mask --mask "causal()" --length 8`.

FlexAttention works in blocks of 128 x 128: it computes full blocks without evaluating the mask, evaluates it for each
cell of partial blocks, and skips empty ones. T tokens, as queries (down) and as keys (across), in N blocks.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

import torch
from torch import Tensor

from .. import masks
from ..engine.fusion import Positions, Prompt, fuse
from ..interp.capture import Capture
from ..masks.cells import Sparsity
from ..masks.layout import BLOCK
from ..masks.library import GENERATED
from ..masks.mask import Mask
from ..model import Llama
from ..tokenizer import Tokenizer
from ..tokens import Tokens
from .check_mask import Parser, attempt, load

if TYPE_CHECKING:  # matplotlib is an optional extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
# Up to this many tokens the terminal shows cells and a picture names the tokens; the longest label, in characters.
LABELLED, LABEL_WIDTH = 64, 16
DRAWN = 2048  # the most tokens in a picture
EMPTY, PARTIAL, FULL = range(3)  # kinds of blocks
SHADES = (0.01, 0.05, 0.2, 0.5)  # the weights at which a darker character begins
# The colours of segments 0, 1, ...
COLOURS = ("4c78a8", "f58518", "54a24b", "b279a2", "e45756", "72b7b2", "c9a227", "9d755d")
GENERATED_COLOUR, MASKED_COLOUR, EMPTY_COLOUR = "5f6773", "e4e9ef", "ffffff"
INK, DARK = "#222222", 0.6  # the colour of lines; the brightness of a full block beside a partial one


def _run(function: Callable[..., T], *args: Any) -> T:
    """Call a function that runs the user's mask; return its result. Raises ValueError for whatever the mask raises."""
    value, fault = attempt(function, *args)
    if fault:
        raise ValueError(f"the mask fails: {fault.message}")
    return cast(T, value)


def look(mask: Mask, tokens: Tokens, head: int = 0) -> tuple[Tensor, Tensor, Sparsity]:
    """Evaluate a mask for one head over tokens `[1, T]`.

    Returns booleans for the cells of the first 2,048 tokens at most, the kind of each block `[N, N]`, and the number of
    blocks of each kind. Raises ValueError for a mask that fails.
    """
    if tokens.index.shape[0] != 1 or not tokens.index.numel() or head < 0:
        raise ValueError(f"needs a row of at least one token, head 0 or more; found {list(tokens.index.shape)}, {head}")
    first = Tokens(*(x[:, :DRAWN] for x in tokens))
    cells = _run(mask.dense, first, first, head + 1)[0, -1].cpu()
    full, some = (x[0, -1].cpu() for x in _run(mask.blocks, tokens, tokens, head + 1))
    whole, listed = int(full.sum()), int(some.sum())
    return cells, full.int() + some, Sparsity(whole, listed - whole, some.numel() - listed)


def _check_fit(count: int, most: int, labels: Sequence[str] | None, weights: Tensor | None) -> None:
    """Raise ValueError for too many tokens, and for labels or weights of another length."""
    if count > most:
        raise ValueError(f"{count} tokens are too many: there are pictures of {DRAWN}, weights in text of {LABELLED}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} tokens; give one each")
    if weights is not None and weights.shape != (count, count):
        raise ValueError(f"weights must be [{count}, {count}], found {list(weights.shape)}")


@torch.no_grad()
def attention_weights(model: Llama, ids: Sequence[int], tokens: Tokens, mask: Mask, layer: int, head: int) -> Tensor:
    """Return the attention weights `[T, T]` of one head, float32 or wider, with the mask in all layers.

    Raises ValueError for a layer or head that the model does not have.
    """
    positions, segments = tokens.position, tokens.segment
    capture = Capture("attention", layers=layer, heads=head, where=range(len(ids)))
    model.probes([capture], (), 1)  # raises for a wrong layer or head before an error could be blamed on the mask
    given = torch.tensor([list(ids)])
    _run(partial(model, given, positions=positions, segments=segments, mask=mask, capture=capture, backend="dense"))
    return capture["attention", layer][0, :, 0].cpu()


def text(
    mask: Mask,
    tokens: Tokens,
    labels: Sequence[str] | None = None,
    *,
    head: int = 0,
    weights: Tensor | None = None,
    title: str | None = None,
    colour: bool = False,
) -> str:
    """Show the mask over tokens `[1, T]` in lines of text: its cells for at most 64 tokens, else its blocks.

    labels: a name for each token. weights `[T, T]`, for at most 64 tokens: shown as shades instead of the cells.
    title: default the mask's name. colour: give each segment an ANSI colour.
    Raises ValueError for a mask that fails, and for labels and weights that do not fit.
    """
    (cells, kinds, sparsity), segments = look(mask, tokens, head), tokens.segment[0].tolist()
    _check_fit(len(segments), LABELLED if weights is not None else sys.maxsize, labels, weights)
    if len(segments) > LABELLED:
        step, space, grid, signs = BLOCK, "", kinds, "·▒█"
        legend = f"blocks of {BLOCK} x {BLOCK}: █ full   ▒ partial   · empty"
    elif weights is None:
        step, space, grid, signs, legend = 1, " ", cells.int(), "·■", "■ visible   · masked"
    else:
        shades = 1 + torch.bucketize(weights, torch.tensor(SHADES).to(weights), right=True)
        step, space, grid, signs = 1, " ", shades * cells, "· ░▒▓█"
        legend = "weights: █ from {3:.0%}   ▓ from {2:.0%}   ▒ from {1:.0%}   ░ from {0:.0%}   · masked".format(*SHADES)
    columns = [_aligned(["#", *range(0, len(segments), step)])]
    if step == 1 and any(segments):
        columns.append(_aligned(["seg", *segments]))
    if step == 1 and labels is not None:
        columns.append(_aligned(["token", *map(_cut, labels)], left=True))
    heading, *names = map(" ".join, zip(*columns, strict=True))
    inks = [_ink(segment) if colour else "{}" for segment in segments[::step]]
    lines = [title or repr(mask)]
    if step == 1:  # the numbers of the keys, digits written downwards
        digits = zip(*_aligned(range(len(segments))), strict=True)
        *above, last = (" ".join(map(str.format, inks, line)) for line in digits)
        lines += [f"{' ' * len(heading)} {line}" for line in above] + [f"{heading} {last}"]
    for ink, name, row in zip(inks, names, grid.tolist(), strict=True):
        drawn = (signs[i] if signs[i] in "· " else key.format(signs[i]) for key, i in zip(inks, row, strict=True))
        lines.append(f"{ink.format(name)} {space.join(drawn)}".rstrip())
    return "\n".join([*lines, legend, str(sparsity)])


def _aligned(column: Iterable[object], *, left: bool = False) -> list[str]:
    """Pad all entries to the width that the widest has in a terminal."""
    names, wide = list(map(str, column)), unicodedata.east_asian_width
    widths = [sum(0 if unicodedata.combining(c) else 1 + (wide(c) in "WF") for c in name) for name in names]
    pads = [" " * (max(widths) - width) for width in widths]
    return [name + pad if left else pad + name for name, pad in zip(names, pads, strict=True)]


def _cut(label: str) -> str:
    """Shorten a label to fit, with escapes for characters that cannot be printed."""
    label = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in label)
    return label if len(label) <= LABEL_WIDTH else label[: LABEL_WIDTH - 1] + "…"


def _ink(segment: int) -> str:
    """Return a format string that colours its argument, in the nearest of the 6 x 6 x 6 colours of terminals."""
    r, g, b = (round(c / 51) for c in bytes.fromhex(_colour_of(segment)))
    return f"\x1b[38;5;{16 + 36 * r + 6 * g + b}m{{}}\x1b[0m"


def _colour_of(segment: int) -> str:
    return GENERATED_COLOUR if segment == GENERATED else COLOURS[segment % len(COLOURS)]


def draw(
    mask: Mask,
    tokens: Tokens,
    labels: Sequence[str] | None = None,
    *,
    head: int = 0,
    weights: Tensor | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the mask over tokens `[1, T]` as a picture; `.savefig(path)` writes it. For the arguments see `text`.

    Cells have the colour of the key's segment, or the shade of the weight.
    Raises ValueError as `text` does, without matplotlib, and for more than 2,048 tokens.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install 'llama_flex[tools]'") from error
    segments = tokens.segment[0].tolist()
    count = len(segments)
    _check_fit(count, DRAWN, labels, weights)
    cells, kinds, sparsity = look(mask, tokens, head)
    different = sorted(set(segments), key=lambda segment: (segment == GENERATED, segment))
    palette, number = _rgb(*map(_colour_of, different)), torch.tensor(list(map(different.index, segments)))
    size = min(max(0.2 * count, 4.0), 7.0)
    figure = Figure(figsize=(size + 3.2, size + 1.6), dpi=160, layout="compressed", facecolor="white")
    axes, picture = figure.add_subplot(), torch.zeros(count, count, 3)
    # Areas: a name, the cells, the colours `[segments or 1, 3]`.
    if weights is None:
        kind = kinds.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:count, :count]
        within = ", in a partial block" if len(kinds) > 1 else ""
        areas = [
            ("full block", kind == FULL, DARK * palette),
            (f"visible{within}", cells & (kind == PARTIAL), palette),
            (f"masked{within}", ~cells & (kind == PARTIAL), _rgb(MASKED_COLOUR)),
            ("empty block: not computed", kind == EMPTY, _rgb(EMPTY_COLOUR)),
        ]
    else:
        areas, picture = [("masked", ~cells, _rgb(MASKED_COLOUR))], _shaded(axes, weights)
    for _, where, colours in areas:
        picture = torch.where(where[..., None], colours.expand_as(palette)[number], picture)
    axes.imshow(picture.numpy(), extent=(-0.5, count - 0.5, count - 0.5, -0.5))
    _frame(axes, palette[number])
    _ticks(axes, palette[number], labels)
    entries = {name: colours[:4] for name, where, colours in areas if where.any()}
    if len(different) > 1:
        names = ["generated (segment -1)" if segment == GENERATED else f"segment {segment}" for segment in different]
        entries |= dict(zip(names[:12], palette[:, None], strict=False))
    _legend(axes, entries)
    name = "\n".join(textwrap.wrap(title or repr(mask), 64))
    figure.suptitle(name, family="monospace", fontsize=11, parse_math=False)
    figure.supxlabel(f"{count} tokens; {sparsity}", fontsize=9, color="#444444")
    return figure


def _rgb(*colours: str) -> Tensor:
    return torch.tensor([[c / 255 for c in bytes.fromhex(colour)] for colour in colours])


def _shaded(axes: Axes, weights: Tensor) -> Tensor:
    """Return the colours of weights, `[T, T, 3]`, and add a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm

    # A square-root scale: beside a sink, which takes most of the weight, everything else would look the same.
    scale = ScalarMappable(PowerNorm(0.5, 0, max(float(weights.max()), 1e-6)), "YlGnBu")
    bar = axes.figure.colorbar(scale, cax=axes.inset_axes((1.03, 0.0, 0.03, 0.5)))
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return torch.from_numpy(scale.to_rgba(weights.numpy())[..., :3]).float()


def _frame(axes: Axes, colours: Tensor) -> None:
    """Draw lines between cells if they are few, the edges of blocks, a frame, and strips of the segments' colours."""
    count, end = len(colours), len(colours) - 0.5
    edges = [i - 0.5 for i in range(BLOCK, count, BLOCK)]
    for lines in (axes.hlines, axes.vlines):
        if count <= LABELLED:
            lines([i + 0.5 for i in range(count - 1)], -0.5, end, colors="white", linewidth=1.0)
        lines(edges, -0.5, end, colors=INK, linewidth=min(0.8, 16 / (len(edges) + 1)))
        lines([-0.5, end], -0.5, end, colors=INK, linewidth=1.0, capstyle="projecting")
    near = -0.5 - max(0.3, 0.008 * count)
    far = near - max(0.6, 0.022 * count)
    axes.imshow(colours[None].numpy(), extent=(-0.5, end, near, far))
    axes.imshow(colours[:, None].numpy(), extent=(far, near, end, -0.5))
    axes.set(xlim=(far, end), ylim=(end, far))
    axes.spines[:].set_visible(False)


def _ticks(axes: Axes, colours: Tensor, labels: Sequence[str] | None) -> None:
    """Label the axes with the tokens' labels, or with about eight numbers, a power of two apart."""
    count = len(colours)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("key: the token attended to", fontsize=9)
    axes.set_ylabel("query: the token that attends", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    step = 1 if count <= 16 else 1 << (count // 5).bit_length() - 1
    axes.set(xticks=range(0, count, step), yticks=range(0, count, step))
    if labels is not None and count <= LABELLED:
        for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
            axis.set_ticks(range(count), list(map(_cut, labels)), rotation=rotation, parse_math=False)
            for label, colour in zip(axis.get_ticklabels(), (0.75 * colours).tolist(), strict=True):
                label.set_color(colour)  # darker: readable on white


def _legend(axes: Axes, entries: dict[str, Tensor]) -> None:
    """Add a legend beside the picture: names, each with squares of its colours."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    style = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False, "fontsize": 8}
    style |= {"handler_map": {tuple: HandlerTuple(ndivide=None, pad=0)}}
    square = partial(Patch, edgecolor="#888888", linewidth=0.5)
    axes.legend([tuple(square(facecolor=c) for c in e.tolist()) for e in entries.values()], entries.keys(), **style)


def segment_list(given: str) -> list[int]:
    """Parse segments written as 0,0,1 or 0*2,1. Raises ValueError."""
    pairs = [part.partition("*") for part in given.split(",")]
    return [int(segment) for segment, _, count in pairs for _ in range(int(count or 1))]


def layer_and_head(given: str) -> tuple[int, int]:
    """Parse LAYER:HEAD. Raises ValueError."""
    layer, head = map(int, given.split(":"))
    return layer, head


def _parser() -> Parser:
    parser = Parser(prog="python -m llama_flex.eval.show_mask", description="Draw a mask over tokens.")
    add = parser.add_argument
    names = 'Python with the names of llama_flex.masks, Mask and torch, such as "sliding_window(4) | sink(1)"'
    names += "; or FILE.py:NAME, a Mask or a predicate (q, kv) there "
    names += "(default: causal(), with --fuse fused(), with --weights that of the layer)"
    add("--mask", metavar="EXPR", help=names)
    add("--mask-mod", action="store_true", help="--mask is FlexAttention's mask_mod(b, h, q_idx, kv_idx)")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--head", type=int, default=0, metavar="H", help="show what that query head sees (default: 0)")
    which(
        "--weights",
        type=layer_and_head,
        metavar="LAYER:HEAD",
        help="show attention weights of --model instead of cells",
    )
    over = parser.add_mutually_exclusive_group(required=True).add_argument
    over("--length", type=int, metavar="N", help="draw over N tokens, without text")
    over("--segments", type=segment_list, metavar="0,0,1", help="over tokens of these segments; also as 0*100,1*50")
    over("--model", metavar="FOLDER", help="over the tokens of --text; a Hugging Face folder, or owner/name on the hub")
    add("--text", action="append", default=[], help="repeat it for several texts: segments 0, 1, ...")
    add("--fuse", action="store_true", help="the texts are fused prompts: see llama_flex.fuse")
    add("--fuse-prefix", metavar="TEXT", help="a text that all prompts see")
    add("--fuse-suffix", metavar="TEXT", help="a text that sees all prompts")
    add("--fuse-positions", choices=get_args(Positions), help="default: continue")
    add("--output", type=Path, metavar="FILE", help="a picture, such as mask.png or mask.svg, instead of text")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line; for a mistake of the user's, exit with code 2 and a message of one line."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if bool(args.model) != bool(args.text) or ((args.fuse or args.weights) and not args.model):
            raise ValueError("--model needs --text; --text, --fuse and --weights need --model")
        if not args.fuse and (args.fuse_prefix or args.fuse_suffix or args.fuse_positions):
            raise ValueError("--fuse-prefix, --fuse-suffix and --fuse-positions need --fuse")
        mask, (ids, tokens, labels) = _mask(args), _tokens(args)
        options = {"head": args.head, "title": f"{mask}: head {args.head}" if args.head else None}
        if args.weights:
            layer, head = args.weights
            model = Llama.from_pretrained(args.model, device="cpu", dtype=torch.float32)
            if args.mask is None and not args.fuse and layer < len(model.layers):
                mask = model.default_masks[layer]
            weights = attention_weights(model, ids, tokens, mask, layer, head)
            options = {"head": head, "weights": weights, "title": f"{mask}: weights of layer {layer}, head {head}"}
        if args.output is None:
            colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            print(text(mask, tokens, labels, colour=colour, **options))
        else:
            draw(mask, tokens, labels, **options).savefig(args.output)
            print(f"{look(mask, tokens, options['head'])[2]}\n{args.output} is written")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def _mask(args: Namespace) -> Mask:
    """Return the mask that the arguments ask for. Raises ValueError."""
    if args.mask is None:
        return masks.fused() if args.fuse else masks.causal()
    file = re.fullmatch(r".+\.py:(\w+)", args.mask)
    # `eval` runs the user's own expression on the user's own machine.
    value = load(args.mask) if file else _run(eval, args.mask, {**vars(masks), "torch": torch})
    if isinstance(value, Mask) and not args.mask_mod:
        return value
    make = Mask.from_mask_mod if args.mask_mod else Mask
    return make(value, file[1] if file else args.mask)  # a lambda is named by its expression, not "<lambda>"


def _tokens(args: Namespace) -> tuple[Sequence[int], Tokens, list[str] | None]:
    """Return token ids, the tokens' attributes, and a label for each; without a model there are no ids and labels."""
    if args.model is None:
        given = [0] * args.length if args.segments is None else args.segments
        return [], Tokens.arriving(len(given), segments=torch.tensor(given)), None
    tokenizer = Tokenizer.from_pretrained(args.model)
    # Without a prefix, each prompt begins a text, with BOS; after a prefix none does.
    parts = [tokenizer.encode(part, add_special_tokens=not args.fuse_prefix) for part in args.text]
    if args.fuse:
        prefix = tokenizer.encode(args.fuse_prefix) if args.fuse_prefix else []
        suffix = tokenizer.encode(args.fuse_suffix or "", add_special_tokens=False)
        prompt = fuse(parts, prefix=prefix, suffix=suffix, positions=args.fuse_positions or "continue")
    else:
        ids = [id for part in parts for id in part]
        prompt = Prompt(ids, range(len(ids)), [number for number, part in enumerate(parts) for _ in part])
    tokens = Tokens.arriving(len(prompt.ids), segments=torch.tensor(prompt.segments))
    tokens = tokens._replace(position=torch.tensor([prompt.positions], dtype=torch.int32))
    # SentencePiece writes a space as "▁", which it drops when it decodes a single piece.
    pieces = [(tokenizer.token(id), tokenizer.decode([id], skip_special_tokens=False)) for id in prompt.ids]
    labels = [piece if "▁" in piece else decoded for piece, decoded in pieces]
    return prompt.ids, tokens, [label.translate(str.maketrans("▁ \n", "␣␣↵")) for label in labels]


if __name__ == "__main__":
    main()
