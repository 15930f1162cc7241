"""The command line: `python -m llama_flex.generate --model FOLDER --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # torch and the rest of the package are imported once the arguments are known to be good
    from .cache import Cache
    from .engine import Completion, Engine, Step

COMPILE_FROM = 32  # new tokens from which `--compile auto` expects compiling to pay for itself


class UsageError(ValueError):
    """Something about the arguments or their files that the user can put right."""


@dataclass(frozen=True)
class Request:
    """One prompt as given: a text, or a conversation for the chat template."""

    id: Any
    prompt: str | list[dict[str, Any]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    p = _Parser(prog="python -m llama_flex.generate", description="Generate text with a LLaMA on FlexAttention.")
    p.add_argument("--model", required=True, help="Hugging Face folder, or hub repository owner/name")
    p.add_argument("--revision", help="of the hub repository")
    what = p.add_argument_group("what to complete")
    what.add_argument("--prompt", action="append", default=[], help="text to continue; repeat for several")
    what.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help=".jsonl (prompt or messages, id), else a line each"
    )
    what.add_argument("--chat", action="store_true", help="talk: reads messages from the terminal, keeps the history")
    what.add_argument("--instruct", action="store_true", help="put each prompt into the model's chat template")
    what.add_argument("--system", metavar="TEXT", help="system message; implies --instruct")
    how = p.add_argument_group("how", "defaults: the model's generation_config.json, else greedy")
    how.add_argument("--max-new-tokens", type=int, metavar="N")
    how.add_argument("--temperature", type=float, help="0: greedy")
    how.add_argument("--top-k", type=int)
    how.add_argument("--top-p", type=float)
    how.add_argument("--min-p", type=float)
    how.add_argument("--repetition-penalty", type=float)
    how.add_argument("--seed", type=int, help="prompt number i (from 0) uses seed + i")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; repeat for several")
    run = p.add_argument_group("running")
    run.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    run.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    run.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    run.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (default 8)")
    run.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    run.add_argument("--json", action="store_true", help="one JSON object a prompt: id, prompt, text, tokens, logprobs")
    run.add_argument("--quiet", action="store_true", help="no statistics on stderr")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 for what the user can put right, 130 on Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        args = _parser().parse_args(argv)
        requests = _requests(args)
        with _Output(args.output) as output:
            session = _Session(args, output)
            try:
                session.chat() if args.chat else session.complete(requests)
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


def _requests(args: argparse.Namespace) -> list[Request]:
    """The prompts asked for. Raises UsageError for none, an empty one, or a malformed file."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    requests = [Request(i, text) for i, text in enumerate(args.prompt)]
    if args.prompts_file:
        requests += _read_prompts(args.prompts_file, len(requests))
    if args.output and args.prompts_file and args.output.exists() and args.output.samefile(args.prompts_file):
        raise UsageError(f"--output {args.output} is the prompts file; give another")
    if args.chat and sys.stdin is None:
        raise UsageError("--chat reads from standard input, which is closed")
    if args.chat and (requests or args.json):
        raise UsageError("--chat reads its messages from the terminal; leave out --prompt, --prompts-file and --json")
    if not args.chat and not requests:
        raise UsageError("nothing to complete: give --prompt, --prompts-file or --chat")
    for request in requests:
        if not request.prompt:
            raise UsageError(f"prompt {request.id} is empty; give it some text, such as the model's first token")
    return requests


def _read_prompts(path: Path, first_id: int) -> Iterator[Request]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at U+2028, legal in JSON
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompts-file {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield Request(first_id + number - 1, line)
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from None
        row = row if isinstance(row, dict) else {"prompt": row}
        prompt: Any = row.get("messages", row.get("prompt"))
        chat = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
        if not isinstance(prompt, str) and not chat:
            raise UsageError(f"{path}, line {number}: needs a text 'prompt', or 'messages' that have a role each")
        yield Request(row.get("id", first_id + number - 1), prompt)


class _Output:
    """stdout or a file, opened before the model loads; what the file held stays until there is something to write."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
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
            if self.path is not None and not self.written and self.path.is_file():
                self.file.truncate(0)
            self.written = True
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"cannot write to {self.name}: {error.strerror}") from None


class _Session:
    """A loaded model and what was asked of it."""

    def __init__(self, args: argparse.Namespace, output: _Output) -> None:
        import torch

        from . import hub
        from .engine import Engine
        from .model import Llama
        from .sampling import Sampling
        from .tokenizer import Tokenizer

        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        asked = {name: getattr(args, name) for name in names}
        Sampling(**{name: value for name, value in asked.items() if value is not None})  # refuse before loading

        started = time.perf_counter()
        folder = hub.resolve(args.model, hub.MODEL_FILES + hub.TOKENIZER_FILES, revision=args.revision)
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
        """Statistics, unless unwanted or there are none."""
        if not self.args.quiet and self.statistics.first_seconds is not None:
            self.statistics.print()

    def complete(self, requests: list[Request]) -> None:
        """Complete all requests, a batch at a time."""
        args, size = self.args, self.args.batch_size
        steps = self.expected * -(-len(requests) // size)
        self.engine.compile = args.compile == "on" or (args.compile == "auto" and steps >= COMPILE_FROM)
        prompts = [self._encode(request) for request in requests]
        self.engine.check(prompts, args.max_new_tokens)  # all of them, before the first batch
        live = len(requests) == len(args.prompt) == 1 and not args.json
        for start in range(0, len(requests), size):
            self._complete_batch(requests[start : start + size], prompts[start : start + size], start, live)

    def _complete_batch(self, requests: list[Request], prompts: list[list[int]], start: int, live: bool) -> None:
        """Write the text of a single prompt as it comes (live), of several when all are done."""
        from .engine import Completion

        done, seed = [Completion() for _ in requests], self.sampling.seed
        each = [
            self.sampling if seed is None else replace(self.sampling, seed=seed + start + i) for i in range(len(done))
        ]
        steps = self.engine.stream(prompts, sampling=each, **self.options)
        try:
            for step in self.statistics.timed(steps, [len(p) for p in prompts]):
                done[step.row].add(step)
                if live and step.text:
                    self.output.write(step.text)
        finally:
            if not any(completion.tokens for completion in done):
                pass  # refused, or interrupted before the first token: what the output held stays
            elif live:
                self.output.write("\n")
            else:  # on Ctrl-C too: what is there is not lost, and says that it is not finished
                for request, completion in zip(requests, done, strict=True):
                    self.output.write(_row(request, completion, self.args.json))

    def _encode(self, request: Request) -> list[int]:
        system, prompt = self.args.system, request.prompt
        if isinstance(prompt, str) and not self.args.instruct and system is None:
            return self.tokenizer.encode(prompt)
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return self._encode_chat(messages if system is None else [{"role": "system", "content": system}, *messages])

    def _encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def chat(self) -> None:
        """Read messages, a line each, until the end of input; slots of what was already computed are kept."""
        self.engine.compile = self.args.compile != "off"
        messages = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        cache: Cache | None = None
        held: list[int] = []  # the tokens in the cache
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line.strip()})
            try:
                prompt = self._encode_chat(messages)
                self.engine.check([prompt], self.args.max_new_tokens)
            except ValueError as error:  # too long, say: the conversation goes on without this message
                _refuse(error)
                messages.pop()
                continue
            needed = min(len(prompt) + self.expected, self.engine.model.config.max_position_embeddings)
            if cache is None or needed > cache.max_length:
                cache, held = self.engine.new_cache(1, needed), []
            fresh = prompt[:-1]  # at least one token is computed anew, to have its logits
            differs = (i for i, (a, b) in enumerate(zip(held, fresh, strict=False)) if a != b)
            shared = next(differs, min(len(held), len(fresh)))
            cache.truncate(shared)
            reply, tokens = "", []
            steps = self.engine.stream([prompt[shared:]], cache=cache, sampling=self.sampling, **self.options)
            try:
                for step in self.statistics.timed(steps, [len(prompt) - shared]):
                    tokens.append(step.token)
                    reply += step.text
                    self.output.write(step.text)
            except KeyboardInterrupt:  # ends the reply, not the conversation
                pass
            # The last token was never fed; after an interrupt its step may be half done, and truncate() forgets it.
            held = prompt + tokens[:-1] if tokens else prompt[:shared]
            self.output.write("\n")
            messages.append({"role": "assistant", "content": reply})


def _row(request: Request, completion: Completion, as_json: bool) -> str:
    if not as_json:
        title = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].get("content", "")
        return f"### {request.id}: {' '.join(str(title).split())[:70]}\n{completion.text}\n\n"
    row = {"id": request.id, "prompt": request.prompt, "text": completion.text, "tokens": completion.tokens}
    row |= {"logprobs": [lp if math.isfinite(lp) else None for lp in completion.logprobs]}
    return json.dumps(row | {"finish_reason": completion.finish_reason}, ensure_ascii=False) + "\n"


class _Statistics:
    """What a run took, for stderr. Steps that compile are left out of the speeds: those are of a run under way."""

    def __init__(self, engine: Engine, load_seconds: float) -> None:
        self.engine = engine
        self.load_seconds = load_seconds
        self.first_seconds: float | None = None
        self.prompt_tokens = self.decoded_tokens = self.bytes_read = 0
        self.prefill_seconds = self.decode_seconds = 0.0

    def timed(self, steps: Iterator[Step], prompt_lengths: Sequence[int]) -> Iterator[Step]:
        """Pass on the steps of one batch, taking times."""
        counts = [0] * len(prompt_lengths)
        started, compiled = time.perf_counter(), self.engine.compile_seconds
        for step in steps:
            elapsed = time.perf_counter() - started
            compiling = self.engine.compile_seconds != compiled  # such a step says nothing about speed
            if not any(counts):
                self.first_seconds = elapsed if self.first_seconds is None else self.first_seconds
                self.prefill_seconds += 0 if compiling else elapsed
                self.prompt_tokens += 0 if compiling else sum(prompt_lengths)
            elif not compiling:
                self.decode_seconds += elapsed
            if counts[step.row] and not compiling:  # the first token of a row comes from the prefill
                self.decoded_tokens += 1
                if counts[step.row] == max(counts):  # the first row to go ahead: the weights were read once more
                    contexts = [n + c for n, c in zip(prompt_lengths, counts, strict=True)]
                    self.bytes_read += self.engine.model.bytes_per_step(contexts)
            counts[step.row] += 1
            yield step
            started, compiled = time.perf_counter(), self.engine.compile_seconds

    def print(self) -> None:
        """One line: load, compile, time to first token, prefill and decode speed, bytes read per second decoding."""
        parts = [f"load {self.load_seconds:.2f} s"]
        if self.engine.compile_seconds:
            parts.append(f"compile {self.engine.compile_seconds:.2f} s")
        if self.first_seconds is not None:
            parts.append(f"first token {self.first_seconds:.2f} s")
        if self.prefill_seconds:
            parts.append(f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / self.prefill_seconds:.1f} tok/s")
        if self.decode_seconds:
            speed, rate = self.decoded_tokens / self.decode_seconds, self.bytes_read / self.decode_seconds / 1e9
            parts.append(f"decode {self.decoded_tokens} tokens, {speed:.1f} tok/s, {rate:.1f} GB/s")
        print("; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
