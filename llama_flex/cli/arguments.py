"""The arguments of the command line, checked before anything is loaded."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..kernels import build
from . import prompts_file
from .prompts_file import Job, Question, UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            word = word.partition("=")[0]
            begun = [name for name in known if word.startswith("--") and name.startswith(word)]
            for name in (begun or difflib.get_close_matches(word, known))[:1]:
                message += f" (did you mean {name}?)"
        raise UsageError(message)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and begin to build the kernels that a CPU will need, while torch is imported."""
    args = parser().parse_args(argv)
    if args.device == "cpu" or (args.device is None and not Path("/proc/driver/nvidia").exists()):
        build.begin(_dtype(args) if args.dtype == "auto" else args.dtype)
    return args


def _dtype(args: argparse.Namespace) -> str:
    """Guess a model's dtype; if it is wrong, the kernels are built later."""
    try:
        config = json.loads((Path(args.model) / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        return "bfloat16"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = _Parser(
        prog="llama-flex" if Path(sys.argv[0]).stem == "llama-flex" else "python -m llama_flex.generate",
        description="Generate text with a LLaMA on FlexAttention.",
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"llama_flex {__version__}")
    p.add_argument("--model", required=True, help="Hugging Face folder, or hub repository owner/name")
    p.add_argument("--revision", help="of the hub repository")
    what = p.add_argument_group("what to complete")
    what.add_argument(
        "--prompt", action="append", default=[], help="text to continue; - for standard input; repeat for several"
    )
    what.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help=".jsonl (id; prompt, messages or prompts), else a line each"
    )
    what.add_argument("--chat", action="store_true", help="talk: reads messages from the terminal, keeps the history")
    what.add_argument("--instruct", action="store_true", help="put each prompt into the model's chat template")
    what.add_argument("--system", metavar="TEXT", help="system message; implies --instruct")
    what.add_argument("--prefill-response", metavar="TEXT", help="every answer in a chat template begins with it")
    fuse = p.add_argument_group("several prompts, one answer")
    fuse.add_argument(
        "--fuse",
        nargs="?",
        const="attention",
        choices=("attention", "mean", "max"),
        help="all --prompt (each row's prompts of a .jsonl) give one answer: the generated text attends to all of them "
        "(attention, the default), or follows the mean or maximum of what they predict",
    )
    fuse.add_argument("--fuse-prefix", metavar="TEXT", help="before all prompts, seen by each")
    fuse.add_argument("--fuse-suffix", metavar="TEXT", help='after all prompts, sees them all; such as "Answer:"')
    fuse.add_argument("--fuse-positions", choices=("continue", "parallel"), help="default: continue")
    fuse.add_argument(
        "--fuse-weights", type=_numbers, metavar="W,W,...", help="how much each prompt counts (default 1)"
    )
    how = p.add_argument_group(
        "how",
        "defaults: what the model's generation_config.json recommends (do_sample alone means temperature 1 and top-k "
        "50, as in transformers), else greedy",
    )
    how.add_argument("--max-new-tokens", type=int, metavar="N")
    how.add_argument("--temperature", type=float, help="0: greedy")
    how.add_argument("--top-k", type=int)
    how.add_argument("--top-p", type=float)
    how.add_argument("--min-p", type=float)
    how.add_argument("--typical-p", type=float)
    how.add_argument("--repetition-penalty", type=float)
    how.add_argument("--presence-penalty", type=float, metavar="N", help="from -2 to 2, of tokens generated already")
    how.add_argument("--frequency-penalty", type=float, metavar="N", help="the same, for each time")
    how.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens come twice")
    how.add_argument(
        "--logit-bias", action="append", type=_bias, metavar="ID=VALUE", help="added to a token's logit; repeatable"
    )
    how.add_argument(
        "--ban-token", action="append", type=int, metavar="ID", dest="banned_tokens", help="never sampled; repeatable"
    )
    how.add_argument("--min-new-tokens", type=int, metavar="N", help="before an end-of-text token")
    form = how.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the text is JSON that conforms to a schema")
    form.add_argument("--regex", metavar="PATTERN", help="the text matches a regular expression")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="the text conforms to a Lark grammar")
    how.add_argument("--seed", type=int, help="prompt or chat message number i (from 0) uses seed + i")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; repeat for several")
    how.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="ends the text, as end-of-text tokens do: an id, or a text that is one token; repeat for several",
    )
    how.add_argument("--ignore-eos", action="store_true", help="end-of-text tokens of the model do not end the text")
    best = p.add_argument_group("the best of several texts")
    best.add_argument("--beams", type=int, metavar="N", help="beam search with N beams: likely texts, not sampled ones")
    best.add_argument(
        "--length-penalty", type=float, metavar="P", help="of beams, as in transformers: favours long texts (default 1)"
    )
    best.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="of N samples, the one with the highest mean log-probability; number j of prompt i has seed + N * i + j",
    )
    run = p.add_argument_group("running")
    run.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    formats = (
        "the layers' matrices in fewer bits: int8, fp8, nf4, or int4, in groups of 32 with zero points; int4-64, "
        "int4-128, int8-64, int8-128; without zero points int4-128-symmetric; int8-dynamic, fp8-dynamic: the inputs of "
        "products, too; with embedding and output matrix int4+int8, or another two, but for nf4"
    )
    run.add_argument("--quantize", metavar="FORMAT", help=formats)
    run.add_argument(
        "--kv-dtype", choices=("fp8",), help="keys and values in 8 bits: room for twice as many tokens as in 16"
    )
    run.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter (PEFT) of the model, or its hub repository")
    drafts = run.add_mutually_exclusive_group()
    drafts.add_argument(
        "--speculate",
        choices=("lookup", "self"),
        help="a step verifies several drafted tokens, which changes none: what followed in the text before, or drafts "
        "of a copy of the model in 4 bits",
    )
    drafts.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="the same, for one prompt, with drafts of a smaller model that has the same vocabulary",
    )
    run.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    run.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences at a time, as far as memory goes (8; on a GPU 256)"
    )
    run.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="F", help="of the free memory, for tokens (default 0.9)"
    )
    run.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    run.add_argument("--json", action="store_true", help="one JSON object a prompt: id, prompt, text, tokens, logprobs")
    run.add_argument("--top-logprobs", type=int, metavar="N", help="with --json: the N most likely tokens of each step")
    run.add_argument("--resume", action="store_true", help="leave out what --output already has, and add to it")
    run.add_argument(
        "--strict", action="store_true", help="refuse a prompts file with a bad row, instead of skipping it"
    )
    run.add_argument(
        "--explain", action="store_true", help="say on stderr what ran, and how near to the hardware's limit"
    )
    run.add_argument("--quiet", action="store_true", help="no statistics and no progress on stderr")
    return p


def _bias(text: str) -> tuple[int, float]:
    try:
        id, _, value = text.partition("=")
        return int(id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a token id and a number, such as 42=-1.5") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers separated by commas, such as 1,2,0.5") from None


def read_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the jobs that are asked for. Raises UsageError for none, an empty prompt, arguments that do not go
    together, and malformed files."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    if not 0 < args.memory_fraction <= 1:
        raise UsageError(f"--memory-fraction must be above 0 and at most 1, not {args.memory_fraction}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if args.output and args.prompts_file and args.output.exists() and args.output.samefile(args.prompts_file):
        raise UsageError(f"--output {args.output} is the prompts file; choose another")
    if args.chat and sys.stdin is None:
        raise UsageError("--chat reads from standard input, which is closed")
    if args.chat and (args.prompt or args.prompts_file or args.json or args.fuse):
        raise UsageError(
            "--chat reads its messages from the terminal; leave out --prompt, --prompts-file, --json, --fuse"
        )
    if args.top_logprobs and not args.json:
        raise UsageError("--top-logprobs go into rows of JSON; it needs --json")
    if args.resume and not (args.output and args.json):
        raise UsageError("--resume continues a file of JSON rows; it needs --output FILE and --json")
    biased = [id for id, _ in args.logit_bias or ()]
    if twice := [id for id in biased if biased.count(id) > 1]:
        raise UsageError(f"--logit-bias has token {twice[0]} more than once; give one value")
    _check_best(args)
    _check_drafts(args)
    question = None
    if args.fuse:
        question = Question([], args.fuse_prefix or "", args.fuse_suffix or "", args.fuse_weights)
    elif args.fuse_prefix or args.fuse_suffix or args.fuse_weights or args.fuse_positions:
        raise UsageError("--fuse-prefix, --fuse-suffix, --fuse-weights and --fuse-positions need --fuse")
    args.prompt = _with_stdin(args.prompt)
    asked = [Job(i, text, i) for i, text in enumerate(args.prompt)]
    if asked and question is not None:
        asked = [Job(0, prompts_file.question({"prompts": args.prompt}, question, "--prompt"), 0)]
    for job in asked:
        if not job.prompt:
            raise UsageError(f"prompt {job.id} is empty; give it some text, such as the model's first token")
    if args.prompts_file:
        asked += prompts_file.read(args.prompts_file, len(asked), question, bad_row(args))
    weighted = any(isinstance(job.prompt, Question) and job.prompt.weights for job in asked)
    if args.fuse in ("mean", "max") and (weighted or args.fuse_positions):
        raise UsageError(f"--fuse {args.fuse} takes neither weights nor positions; use --fuse attention")
    if not args.chat and not asked:
        raise UsageError("nothing to complete: give --prompt, --prompts-file or --chat")
    if args.prefill_response == "":
        raise UsageError("--prefill-response is empty; leave it out")
    templated = args.chat or args.instruct or args.system is not None
    if args.prefill_response and not (templated or all(isinstance(job.prompt, list) for job in asked)):
        raise UsageError(
            "--prefill-response begins an answer in the chat template; it needs --chat, --instruct, --system, or "
            "'messages' in all rows"
        )
    return asked


def _with_stdin(prompts: list[str]) -> list[str]:
    """Return the prompts with the text of standard input, less the line break at its end, in the place of `-`."""
    if "-" not in prompts:
        return prompts
    if prompts.count("-") > 1:
        raise UsageError("--prompt - reads all of standard input; give it once")
    if sys.stdin is None:
        raise UsageError("--prompt - reads from standard input, which is closed")
    try:
        text = sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt - cannot read standard input: {error}") from None
    return [text.removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]


def _check_best(args: argparse.Namespace) -> None:
    """Raise UsageError for options of --beams and --best-of that do not go together."""
    if args.length_penalty is not None and args.beams is None:
        raise UsageError("--length-penalty needs --beams")
    for name, number, least in (("--beams", args.beams, 2), ("--best-of", args.best_of, 1)):
        if number is not None and number < least:
            raise UsageError(f"{name} must be at least {least}, not {number}")
        if number is not None and args.chat:
            raise UsageError(f"--chat streams its answers; leave out {name}")
    if args.beams is None:
        return
    others = (
        *("best_of", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "presence_penalty"),
        *("frequency_penalty", "no_repeat_ngram_size", "logit_bias", "banned_tokens", "min_new_tokens"),
        *("json_schema", "regex", "grammar", "top_logprobs"),
    )
    if given := [name for name in others if getattr(args, name) is not None]:
        options = ", ".join("--" + name.replace("banned_tokens", "ban_token").replace("_", "-") for name in given)
        raise UsageError(f"--beams takes of these only --repetition-penalty; leave out {options}")
    if args.fuse in ("mean", "max"):
        raise UsageError(f"--fuse {args.fuse} has no beams; use --fuse attention")


def _check_drafts(args: argparse.Namespace) -> None:
    """Raise UsageError for options with which no tokens could be drafted."""
    if args.speculate is None and args.draft_model is None:
        return
    name = "--speculate" if args.draft_model is None else "--draft-model"
    others = "beams", "no_repeat_ngram_size", "json_schema", "regex", "grammar"
    if given := ["--" + other.replace("_", "-") for other in others if getattr(args, other)]:
        raise UsageError(f"{name} cannot draft with {', '.join(given)}; leave out one or the other")
    if args.chat and args.draft_model is not None:
        raise UsageError("--draft-model does not see what --chat keeps of the conversation; use --speculate")
    several = args.prompts_file or args.json or args.best_of or (len(args.prompt) > 1 and not args.fuse)
    if several and args.draft_model is not None:
        raise UsageError("--draft-model drafts for one prompt, printed as it comes; for others use --speculate")


def bad_row(args: argparse.Namespace) -> Callable[[UsageError], None]:
    """Return the handler of a row of the prompts file that cannot be completed: raise if --strict, else skip it."""

    def report(error: UsageError) -> None:
        if args.strict:
            raise error
        print(f"skipped: {error}", file=sys.stderr)

    return report
