"""A run of the command line: load, encode, complete, report."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from tqdm import tqdm

from ..checkpoint import hub
from ..config import LlamaConfig
from ..engine.beams import BeamOptions
from ..engine.engine import Engine
from ..engine.fusion import AnyPrompt, Ensemble, as_ensemble, fuse
from ..engine.output import Completion, ScoredCompletion, Step
from ..engine.request import Request
from ..engine.scheduler import BATCH_SIZE
from ..logits.grammar import Grammar
from ..logits.parameters import Sampling, with_seed
from ..model import Llama
from ..tokenizer import Tokenizer
from ..usercode.errors import CompileError
from . import prompts_file
from .arguments import bad_row
from .output import Output
from .prompts_file import Job, Messages, Question, UsageError
from .statistics import Statistics

_PLACEHOLDER = "<the fused prompts>"  # where a chat template puts a message
# New tokens from which `--compile auto` compiles for a batch on a GPU. Starting with the cache of compiled code takes
# 3 s more; a token then takes 49 ms (1B) to 106 ms (8B) less on an H200: pays from 61 and 28 tokens.
COMPILE_FROM = 32

_Best: TypeAlias = ScoredCompletion | ValueError


def _grammar(args: argparse.Namespace) -> Grammar | None:
    """Return the grammar that is asked for. Raises UsageError if its file cannot be read, ValueError if it is wrong."""
    if args.regex is not None:
        return Grammar.regex(args.regex)
    path = args.json_schema or args.grammar
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {'--json-schema' if args.json_schema else '--grammar'} {path}: {error}"
        ) from None
    return Grammar.json_schema(text) if args.json_schema else Grammar.lark(text)


class Session:
    """A loaded model and the arguments of the command line."""

    def __init__(self, args: argparse.Namespace, output: Output) -> None:
        names = (
            *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "no_repeat_ngram_size", "banned_tokens", "min_new_tokens", "top_logprobs", "seed"),
        )
        asked: dict[str, Any] = {name: getattr(args, name) for name in names}
        asked |= {"logit_bias": args.logit_bias and dict(args.logit_bias), "grammar": _grammar(args)}
        Sampling(**{name: value for name, value in asked.items() if value is not None})  # refuse before loading

        started = time.perf_counter()
        folder = hub.resolve(args.model, hub.MODEL_FILES + hub.TOKENIZER_FILES, revision=args.revision)
        config = LlamaConfig.from_pretrained(folder)  # first, for its errors about folders that hold no model
        self.tokenizer = Tokenizer.from_pretrained(folder)
        stop_ids = [_stop_id(token, self.tokenizer, config.vocab_size) for token in args.stop_token]
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        model = Llama.from_pretrained(folder, device=args.device, dtype=dtype, quantize=args.quantize)
        if args.adapter is not None:
            model.adapters.activate(model.adapters.load(args.adapter))
        self.drafter: str | Llama | None = args.speculate
        if args.draft_model is not None:
            self.drafter = Llama.from_pretrained(args.draft_model, device=args.device, dtype=model.dtype)
        self.engine = Engine(model, self.tokenizer, kv_dtype=args.kv_dtype)  # until it is known what for
        self.statistics = Statistics(self.engine, time.perf_counter() - started)
        self.sampling = Sampling.recommended(model.generation_config, **asked)
        self.expected = args.max_new_tokens or self.engine.limits.default_new_tokens
        stop_ids += [] if args.ignore_eos else model.eos_token_ids
        self.options = {"max_new_tokens": args.max_new_tokens, "stop": args.stop, "stop_token_ids": stop_ids}
        self.prefill = args.prefill_response or ""
        self.args, self.output = args, output

    def report(self) -> None:
        """Print statistics, unless --quiet or there are none; with --explain, print explanations too."""
        if not self.args.quiet and self.statistics.first_seconds is not None:
            self.statistics.print()
        if self.args.explain and self.engine.runner.last is not None:
            print(self.engine.explain(self.statistics.bytes_per_second), file=sys.stderr)

    def complete(self, asked: list[Job], live: bool) -> None:
        """Complete all jobs. live: there is only one, and its text is written as it comes; else each row is written as
        soon as it is done, in any order."""
        prompts = list(self._encoded(asked))
        if not prompts:
            self._nothing_left()
        elif self.args.beams or self.args.best_of:
            self._complete_best(prompts, live)
        elif live:
            self.new_engine(self.compiles)
            self._complete_live(*prompts[0])
        else:
            self._complete_all(prompts)

    def _nothing_left(self) -> None:
        if not self.args.resume:  # what is wrong with each has been reported
            raise UsageError("no prompt is left to complete")

    def _encoded(self, asked: list[Job]) -> Iterator[tuple[Job, AnyPrompt]]:
        """Yield the jobs with their tokens, without those of a prompts file that cannot be completed."""
        for job in asked:
            try:
                prompt = self._encode(job)
                self.engine.check([prompt], self.args.max_new_tokens)
            except ValueError as error:
                self._refuse(job, error)
            else:
                yield job, prompt

    def _refuse(self, job: Job, error: ValueError) -> None:
        wrong = UsageError(_about(job, error))
        if job.where == "--prompt":
            raise wrong from None
        bad_row(self.args)(wrong)

    @property
    def compiles(self) -> bool | Literal["auto"]:
        """The value of `--compile`, as `Engine` takes it."""
        return "auto" if self.args.compile == "auto" else self.args.compile == "on"

    def sampling_of(self, number: int) -> Sampling:
        return with_seed(self.sampling, number)

    def _complete_live(self, job: Job, prompt: AnyPrompt) -> None:
        written, sampling = False, self.sampling_of(job.number)

        def start() -> Iterator[Step]:
            return self.engine.stream([prompt], sampling=sampling, **self.options)

        try:
            for step in self.statistics.timed(self.steps(start), [prompt]):
                if not written:
                    self.output.write(self.prefill)
                written = True
                if step.text:
                    self.output.write(step.text)
        finally:
            if written:
                self.output.write("\n")

    def steps(self, start: Callable[[], Iterator[Step]]) -> Iterator[Step]:
        """Yield the steps of a stream; if it cannot be compiled and need not be, restart it, and leave out the steps
        yielded already."""
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
        """Continue uncompiled after an error of the compiler, if `--compile auto` allows; raise the error otherwise."""
        if self.args.compile != "auto" or not self.engine.compile:
            raise error
        self.engine.compile = False
        print(f"warning: continuing uncompiled, which is slower: {error}", file=sys.stderr)

    def _complete_best(self, prompts: list[tuple[Job, AnyPrompt]], live: bool) -> None:
        """Write the best text of each job by --beams or --best-of, computed in batches of about `--batch-size` rows."""
        args, model = self.args, self.engine.model
        if args.beams:
            BeamOptions(num_beams=args.beams, length_penalty=self._length_penalty)  # raises what is wrong for all jobs
        elif args.best_of > 1 and not self.sampling.divisor:
            raise UsageError(f"--best-of: {args.best_of} greedy samples would be equal; give a --temperature above 0")
        size = args.batch_size or BATCH_SIZE[model.device.type]
        each = max(len(as_ensemble(prompt).prompts) for _, prompt in prompts) * (args.beams or args.best_of)
        longest = max(len(p.ids) for _, prompt in prompts for p in as_ensemble(prompt).prompts)
        self._resize(self.compiles, max(size, each), longest)
        failed, left = [], len(prompts)
        try:
            for job, best in itertools.chain.from_iterable(map(self._each, _batches(prompts, max(1, size // each)))):
                if isinstance(best, ValueError):
                    failed.append(_about(job, best))
                    best = ScoredCompletion(finish_reason="error")
                if live and failed:
                    raise ValueError(failed[0])
                best.text = self._begun(best)
                self.output.write(f"{best.text}\n" if live else prompts_file.result(job, best, args.json))
                left -= 1
        finally:  # on Ctrl-C too
            self._report_unfinished(left, len(prompts))
        _report_failed(failed, len(prompts))

    def _each(self, batch: Sequence[tuple[Job, AnyPrompt]]) -> Iterator[tuple[Job, _Best]]:
        """Yield the best text of each job, or why it has none: if a batch fails, its jobs run one by one."""
        try:
            found = self._best(batch)
        except CompileError as error:
            self._go_on_uncompiled(error)
            yield from self._each(batch)
        except ValueError as error:
            if len(batch) == 1:
                yield batch[0][0], error
            else:
                for each in batch:
                    yield from self._each([each])
        else:
            for (job, _), (best,) in zip(batch, found, strict=True):
                yield job, best

    @property
    def _length_penalty(self) -> float:
        return 1.0 if self.args.length_penalty is None else self.args.length_penalty

    def _best(self, batch: Sequence[tuple[Job, AnyPrompt]]) -> list[list[ScoredCompletion]]:
        args = self.args
        if args.best_of:
            sampling = self.sampling_of(batch[0][0].number * args.best_of)
            return self.engine.best_of([prompt for _, prompt in batch], args.best_of, sampling=sampling, **self.options)
        return self.engine.beam_search(
            [prompt for _, prompt in batch],
            num_beams=args.beams,
            length_penalty=self._length_penalty,
            repetition_penalty=args.repetition_penalty,
            **self.options,
        )

    def _complete_all(self, prompts: list[tuple[Job, AnyPrompt]]) -> None:
        args, model = self.args, self.engine.model
        size = args.batch_size or BATCH_SIZE[model.device.type]
        each = [as_ensemble(prompt).prompts for _, prompt in prompts]
        rows = max(min(size, sum(map(len, each))), *map(len, each))
        longest = max(len(p.ids) for members in each for p in members)
        few = model.device.type == "cuda" and self.expected * -(-len(prompts) // size) < COMPILE_FROM
        self._resize(False if few and self.compiles == "auto" else self.compiles, rows, longest)
        _ = self.engine.scheduler  # raises here if memory is short, which is no fault of a row
        going = {}
        for job, prompt in prompts:
            try:
                going[self.engine.submit(prompt, sampling=self.sampling_of(job.number), **self.options)] = job
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
                    except CompileError as error:  # requests under way are queued again
                        self._go_on_uncompiled(error)
                        continue
                    for request in ended:
                        job = going.pop(request)
                        if request.error is not None:
                            failed.append(_about(job, request.error))
                        with progress.external_write_mode():  # both may go to one terminal
                            self._write_result(job, request)
                        progress.update()
                    progress.set_postfix_str(self.statistics.now(), refresh=False)
            finally:  # on Ctrl-C too: partial results are written, marked as unfinished
                for request, job in going.items():
                    if request.steps:
                        self._write_result(job, request)
                self._report_unfinished(len(going), len(prompts))
        _report_failed(failed, len(prompts))

    def _resize(self, compile: bool | Literal["auto"], rows: int, longest: int) -> None:
        """Replace the engine by one for so many sequences at a time, of prompts of up to `longest` tokens."""
        self.new_engine(
            compile,
            max_batch_size=rows,
            max_length=longest + self.expected,
            memory_fraction=self.args.memory_fraction,
        )

    def new_engine(self, compile: bool | Literal["auto"], **sizes: Any) -> Engine:
        """Replace the engine by one that drafts tokens, if asked to; return it. sizes: as `Engine` takes them."""
        started, options = time.perf_counter(), {"kv_dtype": self.args.kv_dtype, "speculate": self.drafter}
        self.engine = Engine(self.engine.model, self.tokenizer, compile=compile, **options, **sizes)
        self.statistics.engine = self.engine
        self.statistics.load_seconds += time.perf_counter() - started  # of a copy in 4 bits
        return self.engine

    def _report_unfinished(self, count: int, total: int) -> None:
        """Say how to continue, if any prompts are unfinished."""
        if count and self.args.json and self.args.output:
            print(f"{count} of {total} prompts are unfinished; use --resume to continue", file=sys.stderr)

    def _write_result(self, job: Job, request: Request) -> None:
        completion = request.completion
        completion.text = self._begun(completion)
        self.output.write(prompts_file.result(job, completion, self.args.json))

    def _begun(self, completion: Completion) -> str:
        """Return the text of an answer with what it was to begin with."""
        return self.prefill + (completion.text or "")

    def _encode(self, job: Job) -> AnyPrompt:
        if isinstance(job.prompt, Question):
            return self._encode_question(job.prompt)
        if isinstance(job.prompt, str) and not self._templated:
            return self.tokenizer.encode(job.prompt)
        messages = job.prompt if isinstance(job.prompt, list) else [{"role": "user", "content": job.prompt}]
        return self.tokenizer.encode(self.chat_text(messages), add_special_tokens=False)

    @property
    def _templated(self) -> bool:
        return self.args.instruct or self.args.system is not None

    def chat_text(self, messages: Messages) -> str:
        """Return the text of a conversation up to the answer, or up to the end of what the answer is to begin with."""
        if self.args.system is not None:
            messages = [{"role": "system", "content": self.args.system}, *messages]
        if not self.prefill:
            return self.tokenizer.apply_chat_template(messages)
        if messages[-1].get("role") == "assistant":
            raise UsageError("--prefill-response begins an answer, but the last message is one already")
        text = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": self.prefill}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        if not text.endswith(self.prefill):
            raise UsageError("the chat template changes --prefill-response; leave out white space at its ends")
        return text

    def _encode_question(self, question: Question) -> AnyPrompt:
        """Encode prefix, prompts and suffix; the chat template's text around a message goes to prefix and suffix."""
        before, after = "", ""
        if self._templated:
            around = self.chat_text([{"role": "user", "content": _PLACEHOLDER}]).split(_PLACEHOLDER)
            if len(around) != 2:
                raise UsageError("--fuse needs a chat template that contains the message exactly once")
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


def _batches(prompts: Sequence[tuple[Job, AnyPrompt]], most: int) -> Iterator[list[tuple[Job, AnyPrompt]]]:
    """Yield up to `most` jobs at a time, of numbers in a row: those that are left out change no other one's seed."""
    batch: list[tuple[Job, AnyPrompt]] = []
    for each in prompts:
        if batch and (len(batch) == most or each[0].number != batch[-1][0].number + 1):
            yield batch
            batch = []
        batch.append(each)
    yield batch


def _about(job: Job, error: Exception) -> str:
    """Return an error's words with the name of its job, in place of the engine's number for it."""
    words = re.sub(r"^prompt \d+", "", str(error))
    return job.name + (words if words != str(error) else f": {words}")


def _report_failed(failed: Sequence[str], total: int) -> None:
    """Raise ValueError if any prompts failed."""
    if failed:
        raise ValueError(f"{len(failed)} of {total} prompts ended in an error; the first: {failed[0]}")


def _stop_id(token: str, tokenizer: Tokenizer, vocab_size: int) -> int:
    """Return the id of a token that is given as an id or as its text. Raises UsageError."""
    ids = [int(token)] if token.isascii() and token.isdecimal() else tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UsageError(f"--stop-token {token!r} is {len(ids)} tokens, not one; for a text of several use --stop")
    if ids[0] >= vocab_size:
        raise UsageError(f"--stop-token {token} is outside the vocabulary of {vocab_size} ids")
    return ids[0]
