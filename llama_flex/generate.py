"""The command line: `python -m llama_flex.generate --model FOLDER --prompt TEXT`."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from . import __version__, jobs
from .jobs import Job, Question, UsageError

if TYPE_CHECKING:  # torch and the rest of the package are imported once the arguments are known to be good
    from .cache import Cache
    from .engine import Engine
    from .fusion import AnyPrompt
    from .request import Request
    from .sampling import Sampling
    from .streaming import Step

_PLACEHOLDER = "<the fused prompts>"  # where a chat template puts a message
# New tokens from which `--compile auto` compiles. Starting with the cache of compiled code takes 3 s more, on either
# device; a token then takes 91 ms less on 2 cores (135M), on an H200 49 (1B) to 106 (8B): 33, 61, 28 tokens.
COMPILE_FROM = 32


_HELP = "/clear forgets the conversation, /exit or the end of input ends it; anything else is a message"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            word = word.partition("=")[0]
            begun = [name for name in known if word.startswith("--") and name.startswith(word)]
            for name in (begun or difflib.get_close_matches(word, known))[:1]:
                message += f" (did you mean {name}?)"
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python -m llama_flex.generate",
        description="Generate text with a LLaMA on FlexAttention.",
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"llama_flex {__version__}")
    p.add_argument("--model", required=True, help="Hugging Face folder, or hub repository owner/name")
    p.add_argument("--revision", help="of the hub repository")
    what = p.add_argument_group("what to complete")
    what.add_argument("--prompt", action="append", default=[], help="text to continue; repeat for several")
    what.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help=".jsonl (id; prompt, messages or prompts), else a line each"
    )
    what.add_argument("--chat", action="store_true", help="talk: reads messages from the terminal, keeps the history")
    what.add_argument("--instruct", action="store_true", help="put each prompt into the model's chat template")
    what.add_argument("--system", metavar="TEXT", help="system message; implies --instruct")
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
    how.add_argument("--repetition-penalty", type=float)
    how.add_argument("--seed", type=int, help="prompt or chat message number i (from 0) uses seed + i")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; repeat for several")
    run = p.add_argument_group("running")
    run.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
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
    run.add_argument("--resume", action="store_true", help="leave out what --output already has, and add to it")
    run.add_argument(
        "--strict", action="store_true", help="refuse a prompts file with a bad row, instead of skipping it"
    )
    run.add_argument(
        "--explain", action="store_true", help="say on stderr what ran, and how near to the hardware's limit"
    )
    run.add_argument("--quiet", action="store_true", help="no statistics and no progress on stderr")
    return p


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers with commas between, such as 1,2,0.5") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 for what the user can put right, 130 on Ctrl-C."""
    if sys.stderr is None:  # closed: print() would write to stdout instead
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parser().parse_args(argv)
        asked = _jobs(args)
        live = len(asked) == 1 and not args.prompts_file and not args.json  # one prompt: its text as it comes
        if args.resume:
            asked = jobs.resume(args.output, asked)
            if not asked:
                print(f"--output {args.output} has all results", file=sys.stderr)
                return 0
        with _Output(args.output, append=args.resume) as output:
            session = _Session(args, output)
            try:
                session.chat() if args.chat else session.complete(asked, live)
            except KeyboardInterrupt:
                session.report()
                raise
            session.report()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        return _refuse(error)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _refuse(error)
        raise
    return 0


def _refuse(error: Exception) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def _refuse_message(error: ValueError) -> None:
    """The same of a message in a chat, where prompts have no number."""
    _refuse(UsageError(re.sub(r"^prompt 0:? ", "", str(error))))


def _jobs(args: argparse.Namespace) -> list[Job]:
    """What is asked for. Raises UsageError for nothing, an empty prompt, arguments that do not go together, and for
    malformed files."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    if not 0 < args.memory_fraction <= 1:
        raise UsageError(f"--memory-fraction must be above 0 and at most 1, not {args.memory_fraction}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if args.output and args.prompts_file and args.output.exists() and args.output.samefile(args.prompts_file):
        raise UsageError(f"--output {args.output} is the prompts file; give another")
    if args.chat and sys.stdin is None:
        raise UsageError("--chat reads from standard input, which is closed")
    if args.chat and (args.prompt or args.prompts_file or args.json or args.fuse):
        raise UsageError(
            "--chat reads its messages from the terminal; leave out --prompt, --prompts-file, --json, --fuse"
        )
    if args.resume and not (args.output and args.json):
        raise UsageError("--resume continues a file of JSON rows; give --output FILE --json too")
    question = None
    if args.fuse:
        question = Question([], args.fuse_prefix or "", args.fuse_suffix or "", args.fuse_weights)
    elif args.fuse_prefix or args.fuse_suffix or args.fuse_weights or args.fuse_positions:
        raise UsageError("--fuse-prefix, --fuse-suffix, --fuse-weights and --fuse-positions need --fuse")
    asked = [Job(i, text, i) for i, text in enumerate(args.prompt)]
    if asked and question is not None:
        asked = [Job(0, jobs.question({"prompts": args.prompt}, question, "--prompt"), 0)]
    for job in asked:
        if not job.prompt:
            raise UsageError(f"prompt {job.id} is empty; give it some text, such as the model's first token")
    if args.prompts_file:
        asked += jobs.read(args.prompts_file, len(asked), question, _bad_row(args))
    weighted = any(isinstance(job.prompt, Question) and job.prompt.weights for job in asked)
    if args.fuse in ("mean", "max") and (weighted or args.fuse_positions):
        raise UsageError(f"--fuse {args.fuse} has no weights and no positions; --fuse attention has")
    if not args.chat and not asked:
        raise UsageError("nothing to complete: give --prompt, --prompts-file or --chat")
    return asked


def _bad_row(args: argparse.Namespace) -> Callable[[UsageError], None]:
    """What is done about a row of the prompts file that cannot be completed."""

    def report(error: UsageError) -> None:
        if args.strict:
            raise error
        print(f"skipped: {error}", file=sys.stderr)

    return report


class _Output:
    """stdout or a file, opened before the model loads; what the file held stays until there is something to write."""

    def __init__(self, path: Path | None, append: bool) -> None:
        self.path, self.append = path, append
        self.name = "stdout" if path is None else f"--output {path}"
        self.existed = path is not None and path.exists()
        self.written = False
        if path is None and sys.stdout is None:
            raise UsageError("stdout is closed; give --output")
        try:
            self.file: IO[str] = sys.stdout if path is None else path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is None:
            return
        try:
            self.file.close()
        except OSError as error:  # what could not be written is still in the buffer
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None
        if not self.written and not self.existed:
            self.path.unlink()

    def write(self, text: str) -> None:
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # a terminal may not know every character
        try:
            if self.path is not None and not self.written and not self.append and self.path.is_file():
                self.file.truncate(0)
            self.written = True
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None


@dataclass
class _Memory:
    """What is computed of a conversation: its keys and values, and the ids of the tokens that they are of."""

    cache: Cache | None = None
    ids: list[int] = field(default_factory=list)
    compiled: bool = False  # whether the cache is of a size for compiled steps


class _Session:
    """A loaded model and what was asked of it."""

    def __init__(self, args: argparse.Namespace, output: _Output) -> None:
        import torch

        from . import hub
        from .config import LlamaConfig
        from .engine import Engine
        from .model import Llama
        from .sampling import Sampling
        from .tokenizer import Tokenizer

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        asked = {name: getattr(args, name) for name in names}
        Sampling(**{name: value for name, value in asked.items() if value is not None})  # refuse before loading

        started = time.perf_counter()
        folder = hub.resolve(args.model, hub.MODEL_FILES + hub.TOKENIZER_FILES, revision=args.revision)
        LlamaConfig.from_pretrained(folder)  # which says of a folder of something else what that is
        self.tokenizer = Tokenizer.from_pretrained(folder)
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        model = Llama.from_pretrained(folder, device=args.device, dtype=dtype)
        self.engine = Engine(model, self.tokenizer)
        self.statistics = _Statistics(self.engine, time.perf_counter() - started)
        self.sampling = Sampling.recommended(model.generation_config, **asked)
        self.expected = args.max_new_tokens or self.engine.default_new_tokens
        self.options = {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
        self.args, self.output = args, output

    def report(self) -> None:
        """Statistics, unless unwanted or there are none, and explanations, if wanted."""
        if not self.args.quiet and self.statistics.first_seconds is not None:
            self.statistics.print()
        if self.args.explain and self.engine.last is not None:
            print(self.engine.explain(self.statistics.bytes_per_second), file=sys.stderr)

    def complete(self, asked: list[Job], live: bool) -> None:
        """Complete all jobs. live: there is one, and its text is written as it comes; else a row as soon as it is done,
        in whatever order."""
        prompts = list(self._encoded(asked))
        if not prompts:
            self._nothing_left()
        elif live:
            self.engine.compile = self._compiles(1)
            self._complete_live(*prompts[0])
        else:
            self._complete_all(prompts)

    def _nothing_left(self) -> None:
        if not self.args.resume:  # it was said of each what is wrong with it
            raise UsageError("no prompt is left to complete")

    def _encoded(self, asked: list[Job]) -> Iterator[tuple[Job, AnyPrompt]]:
        """The jobs with their tokens; without those of a prompts file that cannot be completed."""
        for job in asked:
            try:
                prompt = self._encode(job)
                self.engine.check([prompt], self.args.max_new_tokens)
            except ValueError as error:
                self._refuse(job, error)
            else:
                yield job, prompt

    def _refuse(self, job: Job, error: ValueError) -> None:
        wrong = UsageError(f"{job.name}: " + str(error).removeprefix("prompt 0: "))
        if job.where == "--prompt":
            raise wrong from None
        _bad_row(self.args)(wrong)

    def _compiles(self, batches: int) -> bool:
        from .compiling import compiles_for

        asked, worthwhile = self.args.compile, self.expected * batches >= COMPILE_FROM
        return asked == "on" or (asked == "auto" and worthwhile and compiles_for(self.engine.model.device))

    def _sampling_of(self, number: int) -> Sampling:
        from .sampling import seeded

        return seeded(self.sampling, number)

    def _complete_live(self, job: Job, prompt: AnyPrompt) -> None:
        written, sampling = False, self._sampling_of(job.number)

        def start() -> Iterator[Step]:
            return self.engine.stream([prompt], sampling=sampling, **self.options)

        try:
            for step in self.statistics.timed(self._steps(start), [prompt]):
                written = True
                if step.text:
                    self.output.write(step.text)
        finally:
            if written:
                self.output.write("\n")

    def _steps(self, start: Callable[[], Iterator[Step]]) -> Iterator[Step]:
        """The steps of a stream; if it cannot be compiled and need not be, started anew, less those given already."""
        from .faults import CompileError

        given = 0
        while True:
            try:
                for n, step in enumerate(start()):
                    if n == given:
                        given += 1
                        yield step
                return
            except CompileError as error:
                self._go_on_uncompiled(error)

    def _go_on_uncompiled(self, error: Exception) -> None:
        """What `--compile auto` does where torch cannot compile; raises the error otherwise."""
        if self.args.compile != "auto" or not self.engine.compile:
            raise error
        self.engine.compile = False
        print(f"warning: goes on uncompiled, more slowly: {error}", file=sys.stderr)

    def _complete_all(self, prompts: list[tuple[Job, AnyPrompt]]) -> None:
        from tqdm import tqdm

        from .engine import Engine
        from .faults import CompileError
        from .fusion import as_ensemble
        from .scheduler import BATCH_SIZE

        args, model = self.args, self.engine.model
        size = args.batch_size or BATCH_SIZE[model.device.type]
        each = [as_ensemble(prompt).prompts for _, prompt in prompts]
        rows = max(min(size, sum(map(len, each))), *map(len, each))
        longest = max(len(p.ids) for members in each for p in members)
        self.engine = self.statistics.engine = Engine(
            model,
            self.tokenizer,
            compile=self._compiles(-(-len(prompts) // size)),
            max_batch_size=rows,
            max_length=longest + self.expected,
            memory_fraction=args.memory_fraction,
        )
        _ = self.engine.scheduler  # memory that is not there is no fault of a row
        going = {}
        for job, prompt in prompts:
            try:
                going[self.engine.submit(prompt, sampling=self._sampling_of(job.number), **self.options)] = job
            except ValueError as error:
                self._refuse(job, error)
        if not going:
            self._nothing_left()
        failed = []
        hidden = True if args.quiet or not args.prompts_file else None  # None: hidden if stderr is no terminal
        with tqdm(total=len(going), unit="prompt", disable=hidden) as progress:
            try:
                while going:
                    try:
                        ended = self.statistics.step()
                    except CompileError as error:  # what was under way waits again
                        self._go_on_uncompiled(error)
                        continue
                    for request in ended:
                        job = going.pop(request)
                        if request.error is not None:
                            failed.append(job.name + str(request.error).removeprefix(f"prompt {request.number}"))
                        with progress.external_write_mode():  # both may go to one terminal
                            self.output.write(jobs.result(job, request.completion, args.json))
                        progress.update()
                    progress.set_postfix_str(self.statistics.now(), refresh=False)
            finally:  # on Ctrl-C too: what is there is not lost, and says that it is not finished
                for request, job in going.items():
                    if request.steps:
                        self.output.write(jobs.result(job, request.completion, args.json))
                if going and args.json and args.output:
                    print(f"{len(going)} of {len(prompts)} prompts are not done; --resume goes on", file=sys.stderr)
        if failed:
            raise ValueError(f"{len(failed)} of {len(prompts)} prompts ended in an error; the first: {failed[0]}")

    def _encode(self, job: Job) -> AnyPrompt:
        if isinstance(job.prompt, Question):
            return self._encode_question(job.prompt)
        if isinstance(job.prompt, str) and not self._templated:
            return self.tokenizer.encode(job.prompt)
        messages = job.prompt if isinstance(job.prompt, list) else [{"role": "user", "content": job.prompt}]
        return self.tokenizer.encode(self._chat_text(messages), add_special_tokens=False)

    @property
    def _templated(self) -> bool:
        return self.args.instruct or self.args.system is not None

    def _chat_text(self, messages: jobs.Messages) -> str:
        system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        return self.tokenizer.apply_chat_template([*system, *messages])

    def _encode_question(self, question: Question) -> AnyPrompt:
        """Prefix, prompts and suffix; what a chat template puts around a message goes to the prefix and the suffix."""
        from .fusion import Ensemble, fuse

        before, after = "", ""
        if self._templated:
            around = self._chat_text([{"role": "user", "content": _PLACEHOLDER}]).split(_PLACEHOLDER)
            if len(around) != 2:
                raise UsageError(
                    "the chat template does not hold a message just once, so prompts cannot be fused in it"
                )
            before, after = around
        before, after = before + question.prefix, question.suffix + after
        encode = self.tokenizer.encode
        prefix = encode(before, add_special_tokens=not self._templated) if before else []
        suffix = encode(after, add_special_tokens=False) if after else []
        prompts = [encode(p, add_special_tokens=not self._templated and not before) for p in question.prompts]
        if self.args.fuse == "attention":
            options = {} if self.args.fuse_positions is None else {"positions": self.args.fuse_positions}
            return fuse(prompts, prefix=prefix, suffix=suffix, weights=question.weights, **options)
        return Ensemble([[*prefix, *prompt, *suffix] for prompt in prompts], self.args.fuse)

    def chat(self) -> None:
        """Read messages, a line each, until the end of input; slots of what was already computed are kept."""
        from .streaming import NonFiniteLogitsError

        engine = self.engine
        engine.compile = self._compiles(COMPILE_FROM)  # of a conversation, replies enough
        messages: jobs.Messages = []
        memory = _Memory()
        for turn, message in enumerate(self._messages(messages)):
            messages.append({"role": "user", "content": message})
            try:
                prompt = self._fitting(messages)
            except ValueError as error:  # too long, say: the conversation goes on without this message
                _refuse_message(error)
                messages.pop()
                continue
            reply, tokens, shared, sampling = "", [], self._recall(memory, prompt), self._sampling_of(turn)

            def start(prompt: list[int] = prompt, sampling: Sampling = sampling) -> Iterator[Step]:
                new = [prompt[self._recall(memory, prompt) :]]
                known = [memory.ids]
                return engine.stream(new, cache=memory.cache, cached_ids=known, sampling=sampling, **self.options)

            try:
                for step in self.statistics.timed(self._steps(start), [prompt[shared:]]):
                    tokens.append(step.token)
                    reply += step.text or ""
                    self.output.write(step.text or "")
            except KeyboardInterrupt:  # ends the reply, not the conversation
                pass
            except NonFiniteLogitsError as error:
                reply, memory.cache = "", None  # whose keys and values may hold NaN too
                _refuse_message(error)
            # The last token was never fed; after an interrupt its step may be half done, and truncate() forgets it.
            memory.ids += [*prompt[len(memory.ids) :], *tokens[:-1]] if tokens else []
            self.output.write("\n")
            if reply.strip():
                messages.append({"role": "assistant", "content": reply})
            else:  # which many templates refuse, as they do two messages of the user in a row
                messages.pop()
                print("no reply: the message is left out of the conversation", file=sys.stderr)

    @property
    def _context(self) -> int:
        """How many tokens a conversation may have."""
        return int(min(self.engine.model.context, self.engine.longest(self.args.max_new_tokens)))

    def _recall(self, memory: _Memory, prompt: list[int]) -> int:
        """How many tokens of a prompt need not be computed again: the memory is left with those alone."""
        engine = self.engine
        needed = min(len(prompt) + self.expected, self._context)
        if memory.cache is None or needed > memory.cache.max_length or memory.compiled != engine.compile:
            memory.cache, memory.ids, memory.compiled = engine.new_cache(1, needed), [], engine.compile
        fresh = prompt[:-1]  # at least one token is computed anew, to have its logits
        differs = (i for i, (a, b) in enumerate(zip(memory.ids, fresh, strict=False)) if a != b)
        shared = next(differs, min(len(memory.ids), len(fresh)))
        if engine.model.looks_ahead_by_default():
            shared = 0  # earlier tokens see the new ones
        memory.cache.truncate(shared)
        memory.ids = prompt[:shared]
        return shared

    def _messages(self, messages: jobs.Messages) -> Iterator[str]:
        """What the user says, line by line; commands are done here."""
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            match line.strip():
                case "/exit" | "/quit":
                    return
                case "/help":
                    print(_HELP, file=sys.stderr)
                case "/clear":
                    messages.clear()
                case "" if not line:
                    return
                case "":
                    pass
                case message:
                    yield message

    def _fitting(self, messages: jobs.Messages) -> list[int]:
        """The tokens of a conversation; its oldest exchanges are dropped if the context has no room for a reply to it.

        Raises ValueError, and leaves the conversation as it is, if there is none for a reply to the last message alone.
        """
        context, dropped = self._context, 0
        room = self.args.max_new_tokens or min(self.expected, context // 4)
        for dropped in range(0, len(messages), 2):  # the last one alone is the end
            prompt = self.tokenizer.encode(self._chat_text(messages[dropped:]), add_special_tokens=False)
            if len(prompt) + room <= context:
                break
        self.engine.check([prompt], self.args.max_new_tokens)
        del messages[:dropped]
        if dropped:
            print(f"a conversation has {context} tokens: {dropped} messages are forgotten", file=sys.stderr)
        return prompt


class _Statistics:
    """What a run took, for stderr. Steps that compile are left out of the speeds: those are of a run under way."""

    def __init__(self, engine: Engine, load_seconds: float) -> None:
        self.engine = engine
        self.load_seconds = load_seconds
        self.first_seconds: float | None = None
        self.first_compile_seconds = 0.0
        self.prompt_tokens = self.decoded_tokens = self.bytes_read = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.started: float | None = None
        self.batch_seconds = 0.0
        self.batch_new_tokens = 0

    def timed(self, steps: Iterator[Step], prompts: Sequence[AnyPrompt]) -> Iterator[Step]:
        """Pass on the steps of one batch, taking times."""
        from .fusion import as_ensemble

        lengths = [[len(p.ids) for p in as_ensemble(prompt).prompts] for prompt in prompts]
        counts = [0] * len(prompts)
        started, compiled = time.perf_counter(), self.engine.compile_seconds
        for step in steps:
            elapsed = time.perf_counter() - started
            compiling = self.engine.compile_seconds != compiled  # such a step says nothing about speed
            if not any(counts):
                self._note_first(elapsed)
                self.prefill_seconds += 0 if compiling else elapsed
                self.prompt_tokens += 0 if compiling else sum(map(sum, lengths))
            elif not compiling:
                self.decode_seconds += elapsed
            if counts[step.row] and not compiling:  # the first token of a row comes from the prefill
                self.decoded_tokens += 1
                if counts[step.row] == max(counts):  # the first row to go ahead: the weights were read once more
                    contexts = [n + c for ns, c in zip(lengths, counts, strict=True) for n in ns]
                    self.bytes_read += self.engine.model.bytes_per_step(contexts)
            counts[step.row] += 1
            yield step
            started, compiled = time.perf_counter(), self.engine.compile_seconds

    def step(self) -> list[Request]:
        """A step of what was submitted to the engine, taking times; the requests that it has ended."""
        scheduler = self.engine.scheduler
        started, compiled = time.perf_counter(), self.engine.compile_seconds
        self.started = started if self.started is None else self.started
        new = scheduler.new_tokens
        ended = self.engine.step()
        if scheduler.new_tokens and self.first_seconds is None:
            self._note_first(time.perf_counter() - self.started)
        if self.engine.compile_seconds == compiled:
            self.batch_seconds += time.perf_counter() - started
            self.batch_new_tokens += scheduler.new_tokens - new
        return ended

    def _note_first(self, seconds: float) -> None:
        if self.first_seconds is None:
            self.first_seconds, self.first_compile_seconds = seconds, self.engine.compile_seconds

    def now(self) -> str:
        """What the engine is doing, for a progress bar."""
        s = self.engine.scheduler
        rate = self.batch_new_tokens / self.batch_seconds if self.batch_seconds else 0.0
        return f"{rate:.0f} tok/s, {s.num_running} running, {s.num_waiting} waiting, {s.pool.available} pages free"

    @property
    def bytes_per_second(self) -> float | None:
        """How fast decoding read weights, keys and values; None if no step has been timed."""
        return self.bytes_read / self.decode_seconds if self.decode_seconds else None

    def print(self) -> None:
        """One line: load, time to first token, compiling (before and after that), prefill and decode speed, bytes read
        per second decoding."""
        parts, compiling = [f"load {self.load_seconds:.2f} s"], self.engine.compile_seconds
        if self.first_seconds is not None:
            before = f", {self.first_compile_seconds:.2f} s of it compiling" if self.first_compile_seconds else ""
            parts.append(f"first token {self.first_seconds:.2f} s{before}")
        if compiling:
            parts.append(f"compiling {compiling:.2f} s in all")
        if self.prefill_seconds:
            parts.append(f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / self.prefill_seconds:.1f} tok/s")
        if rate := self.bytes_per_second:
            speed = self.decoded_tokens / self.decode_seconds
            parts.append(f"decode {self.decoded_tokens} tokens, {speed:.1f} tok/s, {rate / 1e9:.1f} GB/s")
        if self.batch_seconds:
            s, speed = self.engine.scheduler, self.batch_new_tokens / self.batch_seconds
            parts.append(f"{s.prompt_tokens} tokens in, {s.new_tokens} out, {speed:.1f} tok/s")
        print("; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
