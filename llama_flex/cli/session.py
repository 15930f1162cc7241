"""A run of the command line: load, encode, complete, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from tqdm import tqdm

from ..checkpoint import hub
from ..config import LlamaConfig
from ..engine.engine import Engine
from ..engine.fusion import AnyPrompt, Ensemble, as_ensemble, fuse
from ..engine.output import Step
from ..engine.scheduler import BATCH_SIZE
from ..model import Llama
from ..sampling import Sampling, with_seed
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


class Session:
    """A loaded model and the arguments of the command line."""

    def __init__(self, args: argparse.Namespace, output: Output) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        asked = {name: getattr(args, name) for name in names}
        Sampling(**{name: value for name, value in asked.items() if value is not None})  # refuse before loading

        started = time.perf_counter()
        folder = hub.resolve(args.model, hub.MODEL_FILES + hub.TOKENIZER_FILES, revision=args.revision)
        LlamaConfig.from_pretrained(folder)  # first, for its errors about folders that hold no model
        self.tokenizer = Tokenizer.from_pretrained(folder)
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        model = Llama.from_pretrained(folder, device=args.device, dtype=dtype, quantize=args.quantize)
        if args.adapter is not None:
            model.adapters.activate(model.adapters.load(args.adapter))
        self.engine = Engine(model, self.tokenizer, kv_dtype=args.kv_dtype)
        self.statistics = Statistics(self.engine, time.perf_counter() - started)
        self.sampling = Sampling.recommended(model.generation_config, **asked)
        self.expected = args.max_new_tokens or self.engine.limits.default_new_tokens
        self.options = {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
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
        elif live:
            self.engine.compile = self.compiles
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
        wrong = UsageError(f"{job.name}: " + str(error).removeprefix("prompt 0: "))
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

    def _complete_all(self, prompts: list[tuple[Job, AnyPrompt]]) -> None:
        args, model = self.args, self.engine.model
        size = args.batch_size or BATCH_SIZE[model.device.type]
        each = [as_ensemble(prompt).prompts for _, prompt in prompts]
        rows = max(min(size, sum(map(len, each))), *map(len, each))
        longest = max(len(p.ids) for members in each for p in members)
        few = model.device.type == "cuda" and self.expected * -(-len(prompts) // size) < COMPILE_FROM
        self.engine = self.statistics.engine = Engine(
            model,
            self.tokenizer,
            kv_dtype=args.kv_dtype,
            compile=False if few and self.compiles == "auto" else self.compiles,
            max_batch_size=rows,
            max_length=longest + self.expected,
            memory_fraction=args.memory_fraction,
        )
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
                            failed.append(job.name + str(request.error).removeprefix(f"prompt {request.number}"))
                        with progress.external_write_mode():  # both may go to one terminal
                            self.output.write(prompts_file.result(job, request.completion, args.json))
                        progress.update()
                    progress.set_postfix_str(self.statistics.now(), refresh=False)
            finally:  # on Ctrl-C too: partial results are written, marked as unfinished
                for request, job in going.items():
                    if request.steps:
                        self.output.write(prompts_file.result(job, request.completion, args.json))
                if going and args.json and args.output:
                    print(
                        f"{len(going)} of {len(prompts)} prompts are unfinished; use --resume to continue",
                        file=sys.stderr,
                    )
        if failed:
            raise ValueError(f"{len(failed)} of {len(prompts)} prompts ended in an error; the first: {failed[0]}")

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
        system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        return self.tokenizer.apply_chat_template([*system, *messages])

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
