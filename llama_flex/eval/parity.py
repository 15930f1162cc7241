"""Compare this package with transformers on the same weights and tokens: `python -m llama_flex.eval.parity MODEL`.

First compares site by site, from the embeddings to the logits, and explains what the first site that diverges points
to. Then compares what must give the same logits: chunks, single tokens, ragged batches, compiled code, far positions;
and tokens, both generated and of texts.

A site may differ from transformers' eager attention by FACTOR times the reference's own spread there: the largest
difference between that run and the same with sdpa attention, in 16 bits also the same in float32 (since this package
rounds less often), and at least FLOOR units in the last place of the largest value (before the first attention, eager
and sdpa are the same). The other comparisons of logits have the limit of the last site.

--inject makes a fault on this package's side, in memory, which must be found.
Exit code: 0 if everything agrees, 1 if something diverges, 2 for an argument that cannot be used.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import sentencepiece
import torch
from torch import Tensor

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward
except ModuleNotFoundError as error:
    needs = f"llama_flex.eval.parity needs transformers ({error}): pip install 'llama_flex[parity]'"
    if __name__ == "__main__":
        sys.exit(f"error: {needs}")
    raise ImportError(needs) from error

from .. import masks
from ..cache import Cache
from ..checkpoint import hub
from ..config import LlamaConfig
from ..engine.engine import Engine
from ..engine.graphs import Graphs
from ..interp.capture import Capture
from ..layers import RMSNorm
from ..logits.parameters import Sampling
from ..masks.mask import Mask
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.arguments import whole_number
from .check_mask import Parser
from .samples import CONFIGS, PARAPHRASES

# On a CPU, a correct model is bit-exact in float32 and within 0.41 of the limit in bfloat16; from 33 tokens on, each of
# the faults exceeds the limit at least 2.9 times, in both.
FACTOR, FLOOR = 4, 2
CHECKS_HEAD = f"{'what must be the same':36}{'difference':>10}{'limit':>10}"
SKIPPED = "  ...  what follows from it: --all"
LENGTH, STEPS, FAR = 256, 32, 32768  # tokens to compare, the most new tokens, the first of the far positions
FAULTS = {
    "q-rows": "the rows of q_proj's first head interleaved",
    "theta": "RoPE's theta doubled",
    "eps": "an eps of 0.01 in all norms",
    "window": "a sliding window one token wider than the reference's",
    "gate-up": "gate_proj and up_proj exchanged",
}
IN_ONE_LAYER = ("q-rows", "gate-up")
PROJECTIONS = ("q", "k", "v")
OUTPUT, AFTER_ATTENTION, ACTIVATIONS = "attention output", "residual after attention", "MLP activations"
EMBEDDINGS, AFTER_MLP, NORM, LOGITS = "embeddings", "residual after MLP", "final norm", "logits"
CAPTURED = {name: name for name in PROJECTIONS} | {  # in the order of computation
    OUTPUT: "z",
    AFTER_ATTENTION: "resid_mid",
    ACTIVATIONS: "mlp_post",
    AFTER_MLP: "resid_post",
}
CAUSES = {
    EMBEDDINGS: "the embedding, or other token ids",
    AFTER_ATTENTION: "o_proj",
    ACTIVATIONS: "gate_proj and up_proj (exchanged?), or the norm before them",
    AFTER_MLP: "down_proj",
    NORM: "the final norm: its eps or weight",
    LOGITS: "lm_head, or the embedding tied to it",
}
TEXTS = (
    *PARAPHRASES,
    "Съешь же ещё этих мягких французских булок, 天地玄黃 いろはにほへと 키스의 نصٌّ حكيمٌ",
    "Cafe\u0301 nai\u0308ve 👩‍👩‍👧‍👦 🇩🇪 👍🏽 \u200b\u00a0\ufeff\U0010ffff",
    "two  spaces,   three\t\ttabs\r\nlines\n\n\n   and the end   ",
    "def f(x: int) -> int:\n    return x ** 2  # I'm WE'LL 1,234.5e-6",
)
WITH_SPECIAL_TOKENS = (" leading space", "{bos}begins {eos}and ends{eos}", "a {bos} b{eos}\n{bos}")
SAID = (("user", "Is it raining?"), ("assistant", "  No.\n"), ("user", "Warum nicht? 🌧"))
CHAT = [{"role": role, "content": content} for role, content in SAID]

_FILES = hub.MODEL_FILES + hub.TOKENIZER_FILES

Sites: TypeAlias = dict[tuple[int | None, str], Tensor]  # [1, T, ...] by layer and name, in the order of computation


@dataclass(frozen=True)
class Site:
    """The difference between both sides at one site. layer: None before the first layer and after the last.

    relative_error: the root mean square of the difference over that of the reference. first_position, heads: where the
    limit is exceeded; heads is None if all exceed it.
    """

    layer: int | None
    name: str
    max_error: float
    relative_error: float
    spread: float
    limit: float
    diverges: bool
    first_position: int | None
    heads: list[int] | None


@dataclass(frozen=True)
class Check:
    """Something that must be the same: the largest difference, and its limit."""

    name: str
    difference: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        return f"{self.name:36}{self.difference:10.1e}{self.limit:10.1e}{'' if self.agrees else '  diverges'}"


@dataclass(frozen=True)
class Report:
    """The comparison of a checkpoint with transformers over a number of tokens; `str` explains it."""

    tokens: int
    device: str
    sites: Sequence[Site]
    checks: Sequence[Check]

    @property
    def agrees(self) -> bool:
        """Whether nothing diverges."""
        return not any(site.diverges for site in self.sites) and all(check.agrees for check in self.checks)

    def __str__(self) -> str:
        checks = ["", CHECKS_HEAD, *map(str, self.checks)] if self.checks else []
        return "\n".join([table(self.sites, every=False), *checks, "", verdict(self.sites, self.checks)])


class Reference:
    """transformers' model of a folder, run in several ways whose differences are its spread; eager attention first."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval().requires_grad_(False)
        wide = [("eager", copy.deepcopy(model).float())] if dtype.itemsize < 4 else []
        self.ways = [("eager", model), ("sdpa", model), *wide]

    def runs(self, ids: Tensor, **options: Any) -> Iterator[Sites]:
        """Record every site, from the embeddings to the logits, once in each way."""
        return (_record(kind, model, ids, options) for kind, model in self.ways)


def _record(kind: str, model: Any, ids: Tensor, options: dict[str, Any]) -> Sites:
    """Record every site of transformers' model with one kind of attention."""
    found: Sites = {}
    attend = eager_attention_forward if kind == "eager" else AttentionInterface()[kind]

    def recording(module: Any, *heads: Any, **kwargs: Any) -> Any:  # heads: q, k, v and a mask
        for name, x in zip(PROJECTIONS, heads, strict=False):
            found[module.layer_idx, name] = x.transpose(1, 2)
        output, weights = attend(module, *heads, **kwargs)
        found[module.layer_idx, OUTPUT] = output
        return output, weights

    def before(module: Any, layer: int | None, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _, args: found.update({(layer, name): args[0]}))

    def after(module: Any, layer: int | None, name: str) -> Any:
        return module.register_forward_hook(lambda _, args, output: found.update({(layer, name): output}))

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", AttentionMaskInterface()[kind])
    model.set_attn_implementation("recording")
    with ExitStack() as hooks:
        hooks.enter_context(after(model.model.embed_tokens, None, EMBEDDINGS))
        for i, layer in enumerate(model.model.layers):
            hooks.enter_context(before(layer.post_attention_layernorm, i, AFTER_ATTENTION))
            hooks.enter_context(before(layer.mlp.down_proj, i, ACTIVATIONS))
            hooks.enter_context(after(layer, i, AFTER_MLP))
        hooks.enter_context(after(model.model.norm, None, NORM))
        found[None, LOGITS] = model(ids, use_cache=False, **options).logits
    return found


def walk(model: Llama, ids: Tensor, mask: Mask | None = None) -> Sites:
    """Record every site of our model, from the embeddings to the logits."""
    capture = Capture("resid_pre", *CAPTURED.values())
    logits = model(ids, mask=mask, capture=capture)
    count = model.config.num_hidden_layers
    found: Sites = {(None, EMBEDDINGS): capture["resid_pre", 0]}
    found |= {(i, name): capture[site, i] for i in range(count) for name, site in CAPTURED.items()}
    return found | {(None, NORM): model.norm(found[count - 1, AFTER_MLP]), (None, LOGITS): logits}


def difference(x: Tensor, y: Tensor) -> Tensor:
    """Return the absolute difference in float64; where it is not finite, float32's largest number."""
    most = torch.finfo(torch.float32).max
    return (x.double() - y.double()).abs().nan_to_num(nan=most).clamp(max=most)


def largest(x: Tensor, y: Tensor) -> float:
    """Return the largest absolute difference."""
    return difference(x, y).max().item()


def spread_and_limit(reference: Tensor, others: Iterable[Tensor]) -> tuple[float, float]:
    """Return how much the reference's ways differ, and the limit for ours: 0 if the reference is not finite."""
    spread = max(largest(reference, other) for other in others)
    if not reference.isfinite().all():
        return spread, 0.0
    floor = FLOOR * torch.finfo(reference.dtype).eps * reference.abs().max().item()
    return spread, FACTOR * max(spread, floor)


def compare(ours: Sites, reference: Sites, others: Sequence[Sites]) -> list[Site]:
    """Compare every site, in the order of computation."""
    compared = []
    for key, expected in reference.items():
        error = difference(ours[key], expected)
        spread, limit = spread_and_limit(expected, [other[key] for other in others])
        wrong = (error > limit)[0]
        at = wrong.flatten(1).any(1).nonzero().flatten().tolist()
        heads = wrong.any(2).any(0) if wrong.dim() == 3 else torch.ones(1)
        some = None if heads.all() or not at else heads.nonzero().flatten().tolist()
        tiny = torch.finfo(torch.float32).tiny
        relative = (error.square().mean() / expected.double().square().mean().clamp(min=tiny)).sqrt().item()
        first = at[0] if at else None
        compared.append(Site(*key, error.max().item(), relative, spread, limit, bool(at), first, some))
    return compared


def verdict(compared: Sequence[Site], checks: Sequence[Check] = ()) -> str:
    """Explain the first site that diverges; if all sites agree, name the checks that do not."""
    first = next((site for site in compared if site.diverges), None)
    if first is None:
        failed = ", ".join(check.name for check in checks if not check.agrees)
        return f"all sites agree, but not: {failed}" if failed else "nothing diverges"
    at_once = PROJECTIONS if first.name in PROJECTIONS else (first.name,)
    wrong = [site for site in compared if site.diverges and site.layer == first.layer and site.name in at_once]
    names, start = [site.name for site in wrong], min(site.first_position or 0 for site in wrong)
    where = "" if first.layer is None else f"layer {first.layer}, "
    heads = f"in heads {first.heads}, " if first.heads is not None and names[0] in PROJECTIONS else ""
    found = f"{where}{' and '.join(names)}: first to diverge, {heads}from position {start} on"
    return f"{found}. This points to {_cause(names, start)}."


def _cause(names: Sequence[str], start: int) -> str:
    """Say what a divergence points to when everything before it is right. start: its first position."""
    if names[0] in CAUSES:
        return CAUSES[names[0]]
    if names[0] == OUTPUT:
        other = "the scale of the scores" if start else "which heads share keys"
        return f"the mask, which is wrong from query {start} on, or {other}"
    if len(names) == 3:
        return "the norm before attention: its eps or weight; or the biases of q, k and v"
    if "v" not in names and start > 0:  # a rotation by 0 changes nothing
        return "RoPE: its theta or scaling"
    norms = [f"{name}_norm" for name in names if name != "v"]
    or_norm = f", or {' and '.join(norms)}, if the model has them" if norms else ""
    return f"the rows of {' and '.join(f'{name}_proj' for name in names)} (permuted?){or_norm}"


def make_fault(model: Llama, fault: str, layer: int) -> None:
    """Make one of FAULTS in the model, except for `window`, which is in the masks."""
    block = list(model.blocks())[layer]
    if fault == "q-rows":
        q = block.attention.qkv.weight[: model.config.head_dim]
        q.copy_(q.view(2, -1, q.shape[1]).transpose(0, 1).reshape(q.shape))
    elif fault == "theta":
        rope = replace(model.config.rope_parameters, rope_theta=2 * model.config.rope_parameters.rope_theta)
        context = model.config.max_position_embeddings
        model.rotary.inv_freq.copy_(rope.inverse_frequencies(model.config.head_dim, context=context))
    elif fault == "eps":
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.eps = 0.01
    elif fault == "gate-up":
        weight = block.mlp.gate_up.weight
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))


def windows(count: int, model: Llama) -> tuple[Mask, Tensor]:
    """Return our sliding window, and transformers' additive mask `[1, 1, T, T]` of one that is a token narrower."""
    width, index = min(8, count // 2), torch.arange(count, device=model.device)
    distance = index[:, None] - index
    hidden = ((distance < 0) | (distance >= width))[None, None]
    added = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
    return masks.sliding_window(width + 1), added.masked_fill(hidden, torch.finfo(model.dtype).min)


def logits_checks(model: Llama, reference: Reference, ids: Tensor, limit: float, compile: bool) -> Iterator[Check]:
    """Check everything that must give the same logits; yield each result as soon as it is known."""
    count, full, graphs, plan = ids.shape[1], model(ids), Graphs(), model.attention_plan()
    steps, third = min(STEPS, count - 1), -(-count // 3)

    def eager(part: Tensor, cache: Cache) -> Tensor:
        return model(part, cache=cache)

    def compiled(part: Tensor, cache: Cache) -> Tensor:
        with cache.appending(part.shape[1]):
            x, _ = model.step(part, None, None, None, cache, plan, "flex", graphs.of(part.shape))
            return model.head(x)

    def cached(parts: Sequence[Tensor], forward: Callable[[Tensor, Cache], Tensor]) -> float:
        cache = model.new_cache(1, count)
        return largest(torch.cat([forward(part.clone(), cache) for part in parts], 1), full)

    one_by_one = [ids[:, :-steps], *ids[:, -steps:].split(1, 1)]
    yield Check("prefill in three chunks", cached(ids.split(third, 1), eager), limit)
    yield Check(f"the last {steps} one by one", cached(one_by_one, eager), limit)
    if compile:
        yield Check(f"compiled, the last {steps} one by one", cached(one_by_one, compiled), limit)
    other = ids.flip(1)
    ragged = model(torch.cat([ids, other]), lengths=torch.tensor([count, third]))
    alone = torch.cat([full[0], model(other[:, :third])[0]])
    yield Check("a ragged batch", largest(torch.cat([ragged[0], ragged[1, :third]]), alone), limit)
    positions = torch.arange(FAR, FAR + count, device=ids.device)[None]
    expected, *others = (run[None, LOGITS] for run in reference.runs(ids, position_ids=positions))
    far = largest(model(ids, positions=positions), expected)
    yield Check(f"positions from {FAR} on", far, spread_and_limit(expected, others)[1])
    if not (few := new_tokens(model.context)):
        return
    options = {"max_new_tokens": few, "sampling": Sampling(), "stop_token_ids": ()}
    new = torch.tensor([Engine(model).generate([ids[0].tolist()], **options)[0].tokens], device=ids.device)
    expected = next(reference.runs(torch.cat([ids, new[:, :-1]], 1)))[None, LOGITS][:, count - 1 :]
    # How much less likely than the reference's own token, in logits; rounding may move both.
    lost = largest(expected.amax(2), expected.gather(2, new[:, :, None])[:, :, 0])
    yield Check(f"{few} greedy tokens, logits lost", lost, 2 * limit)


def tokenizer_checks(folder: Path, tokenizer: Tokenizer) -> Iterator[Check]:
    """Count the texts whose ids differ from the reference's, and compare the text of a conversation.

    For a tokenizer.json, the reference is PreTrainedTokenizerFast. For a tokenizer.model it is sentencepiece, without
    special tokens and chats: transformers would rebuild a LlamaTokenizer from the vocabulary, which treats spaces and
    special tokens differently from the file.
    """
    if not (folder / "tokenizer.json").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        wrong = sum(tokenizer.encode(text, add_special_tokens=False) != pieces.encode(text) for text in TEXTS)
        yield Check(f"texts with other ids, of {len(TEXTS)}", wrong, 0)
        return
    theirs: Any = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    special = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
    texts = [*TEXTS, *(text.format(**special) for text in WITH_SPECIAL_TOKENS)]
    wrong = sum(tokenizer.encode(text) != theirs.encode(text) for text in texts)
    yield Check(f"texts with other ids, of {len(texts)}", wrong, 0)
    if tokenizer.chat_template is not None:
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        yield Check("chats with another text, of 1", int(tokenizer.apply_chat_template(CHAT) != expected), 0)


def random_checkpoint(name: str, seed: int, folder: Path) -> None:
    """Save a shape of `samples.CONFIGS`, scaled down, with random weights. Raises ValueError for an unknown name."""
    if name not in CONFIGS:
        raise ValueError(f"random:{name} is not known; choose random: and one of {', '.join(CONFIGS)}")
    shape = LlamaConfig.from_dict(CONFIGS[name] | {"bos_token_id": None, "eos_token_id": None})
    scale = min(16, shape.hidden_size // 128)
    sizes = {name: getattr(shape, name) // scale for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": min(4, shape.num_hidden_layers), "head_dim": min(64, shape.head_dim)}
    heads = 2 * shape.num_attention_heads // shape.num_key_value_heads
    model = Llama(replace(shape, **sizes, num_attention_heads=heads, num_key_value_heads=2)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # the caller's own random numbers stay as they are
    for weight in model.parameters():
        mean, std = (1.0, 0.2) if weight.dim() == 1 else (0.0, weight.shape[1] ** -0.5)
        weight.normal_(mean, std, generator=generator)
    model.save_pretrained(folder)


def new_tokens(context: int) -> int:
    """Return how many tokens to generate: a short context is shared with the tokens compared, which are at least 2."""
    return max(0, min(STEPS, context // 2, context - 2))


def token_ids(model: Llama, tokenizer: Tokenizer | None, text: str | None, length: int | None, seed: int) -> list[int]:
    """Return the first tokens of the text, or random ones without a tokenizer. Raises ValueError for a wrong number."""
    context, new = model.context, new_tokens(model.context)
    if context < 2:
        raise ValueError(f"a context of {context} has no room for the 2 tokens that are needed; give another model")
    count = length or min(LENGTH, context - new)
    if tokenizer is None and text is not None:
        raise ValueError("the model has no tokenizer for a text (--text); leave that out, and tokens are random")
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
    else:
        ids = tokenizer.encode(" ".join(PARAPHRASES) if text is None else text)[:count]
    least = max(2, length or 0)
    if len(ids) < least:
        raise ValueError(f"found {len(ids)} tokens, {least} are needed; give a longer --text, or another --length")
    if len(ids) + new > context:
        most = context - new
        raise ValueError(f"{len(ids)} tokens and {new} new ones exceed the context; give --length {most} or less")
    return ids


def check_shapes(ours: LlamaConfig, theirs: LlamaConfig) -> None:
    """Raise ValueError for models whose sites cannot be compared."""
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *heads):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            raise ValueError(f"{name} is {a} in MODEL and {b} in --against; give models of one shape")


def fault_and_layer(given: str, layers: int) -> tuple[str, int]:
    """Parse FAULT[:LAYER]; the default is the layer in the middle. Raises ValueError."""
    fault, colon, layer = given.partition(":")
    if fault not in FAULTS:
        raise ValueError(f"--inject {fault} is not known; choose one of {', '.join(FAULTS)}")
    if colon and fault not in IN_ONE_LAYER:
        raise ValueError(f"--inject {given}: the fault is in all layers; leave out :{layer}")
    if colon and not (layer.isdecimal() and int(layer) < layers):
        raise ValueError(f"--inject {given}: the model has layers 0 to {layers - 1}")
    return fault, int(layer) if colon else layers // 2


def table(compared: Sequence[Site], every: bool) -> str:
    """Format a line per layer, for the site that is nearest to its limit or furthest beyond it.

    The first layer that diverges is shown with all its sites; of those after it, only the last site is. every: show all
    sites of all layers.
    """
    first = next((site for site in compared if site.diverges), compared[-1])
    worst = {site.layer: site for site in sorted(compared, key=lambda site: site.max_error / (site.limit or 1))}
    lines, after = [f"layer  {'site':25}{'max error':>10}{'relative':>10}{'spread':>10}{'limit':>10}"], False
    for site in compared:
        after = after or site is first
        if every or site.layer in (None, first.layer) or (site is worst[site.layer] and not after):
            numbers = (site.max_error, site.relative_error, site.spread, site.limit)
            start = f"{'' if site.layer is None else site.layer:>5}  {site.name:25}"
            lines.append(start + "".join(f"{number:10.1e}" for number in numbers) + "  diverges" * site.diverges)
        elif after and lines[-1] != SKIPPED:
            lines.append(SKIPPED)
    return "\n".join(lines)


def _parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m llama_flex.eval.parity", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"a folder, a name on the hub, or random: and one of {', '.join(CONFIGS)}")
    add("--against", metavar="PATH", help="a folder, or a name on the hub, for transformers (default: MODEL)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--length", type=int, metavar="N", help=f"tokens, at least 2 (default: {LENGTH}, or what there is)")
    add("--seed", type=int, default=0, help="seed of random weights and tokens (default: 0)")
    add("--text", type=Path, metavar="FILE", help="the text to compare on (default: one of this tool's)")
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    add("--inject", metavar="FAULT[:LAYER]", help=f"compare the sites with a fault. {faults}")
    add("--no-compile", action="store_true", help="skip the comparison of compiled code, which takes most of the time")
    add("--all", action="store_true", help="print all sites")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


@contextmanager
def _folder_of(path_or_repo: str | Path, seed: int) -> Iterator[Path]:
    """Yield the folder of a checkpoint; one of random weights is removed afterwards."""
    if not str(path_or_repo).startswith("random:"):
        yield hub.resolve(path_or_repo, _FILES)
        return
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(str(path_or_repo).removeprefix("random:"), seed, Path(folder))
        yield Path(folder)


@torch.no_grad()
def compare_checkpoint(
    path_or_repo: str | Path,
    *,
    against: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    length: int | None = None,
    text: str | None = None,
    seed: int = 0,
    compile: bool = True,
    inject: str | None = None,
    progress: Callable[[str], None] = lambda lines: None,
    every_site: bool = False,
) -> Report:
    """Compare a checkpoint, a folder or a hub repository, with transformers; see the module's description.

    path_or_repo: or `random:` and a name in `samples.CONFIGS`, for random weights. against: another checkpoint of the
    same shape for transformers. length: the number of tokens to compare, default 256 or what there is. text: default
    one of this tool's; without a tokenizer, random ids by `seed`. compile: also compare compiled code, which takes most
    of the time. inject: a fault to make in memory, `FAULT[:LAYER]`; then only the sites are compared. progress: called
    with lines as results come. every_site: include all sites of all layers in them.
    Raises ValueError for a wrong argument, and whatever `Llama.from_pretrained` raises.
    """
    if length is not None:
        whole_number("length", length, least=1)
    with _folder_of(path_or_repo, seed) as folder:
        model = Llama.from_pretrained(folder, device=device, dtype=dtype)
        other = folder if against is None else hub.resolve(against, _FILES)
        if other != folder:
            check_shapes(model.config, LlamaConfig.from_pretrained(other))
            Llama.from_pretrained(other, device="cpu")  # raises for missing tensors, which transformers would make up
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        tokenizer = Tokenizer.from_pretrained(folder) if has_tokenizer else None
        ids = torch.tensor([token_ids(model, tokenizer, text, length, seed)], device=model.device)
        mask, options, what = None, dict[str, Any](), ""
        if inject is not None:
            fault, layer = fault_and_layer(inject, model.config.num_hidden_layers)
            make_fault(model, fault, layer)
            what = f", {FAULTS[fault]}" + f" in layer {layer}" * (fault in IN_ONE_LAYER)
            if fault == "window":
                mask, options["attention_mask"] = windows(ids.shape[1], model)
        progress(f"{path_or_repo}{what}, against {against or 'the same'} in transformers {transformers.__version__}")
        progress(f"{dtype}, {model.device}, {ids.shape[1]} tokens".removeprefix("torch."))
        reference = Reference(other, model.dtype, model.device)
        expected, *others = reference.runs(ids, **options)
        sites, checks = compare(walk(model, ids, mask), expected, others), list[Check]()
        progress(f"\n{table(sites, every_site)}\n")
        if inject is None:
            progress(CHECKS_HEAD)
            of_logits = logits_checks(model, reference, ids, sites[-1].limit, compile)
            for check in chain(of_logits, () if tokenizer is None else tokenizer_checks(folder, tokenizer)):
                checks.append(check)
                progress(str(check))
    return Report(ids.shape[1], str(model.device), sites, checks)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    say: Callable[[str], None] = (lambda lines: None) if args.json else partial(print, flush=True)
    try:
        report = compare_checkpoint(
            args.model,
            against=args.against,
            dtype=getattr(torch, args.dtype),
            device=args.device,
            length=args.length,
            text=None if args.text is None else args.text.read_text(encoding="utf-8"),
            seed=args.seed,
            compile=not args.no_compile,
            inject=args.inject,
            progress=say,
            every_site=args.all,
        )
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    found = verdict(report.sites, report.checks)
    say(f"\n{found}" if report.checks else found)
    if args.json:
        given = {name: getattr(args, name) for name in ("model", "against", "dtype", "inject")}
        given |= {"device": report.device, "tokens": report.tokens, "agrees": report.agrees, "verdict": found}
        of_checks = [asdict(check) | {"agrees": check.agrees} for check in report.checks]
        print(json.dumps(given | {"sites": [asdict(site) for site in report.sites], "checks": of_checks}))
    return int(not report.agrees)


if __name__ == "__main__":
    sys.exit(main())
