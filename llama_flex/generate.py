"""The command line, `python -m llama_flex.generate --model FOLDER --prompt TEXT`, and generation as a plain loop."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from .cli import arguments, prompts_file
from .cli.output import Output, leave, refuse

if TYPE_CHECKING:
    from .logits.parameters import Sampling
    from .model import Llama


def plain_loop(model: Llama, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
    """Yield the tokens that follow a prompt, up to an end-of-text id: prefill, sample, decode step by step.

    The reference for `Engine`, which gives the same tokens for many prompts at a time, in compiled steps, with each
    request's own mask, score function and stop rules. Raises ValueError for an id outside the vocabulary.
    """
    import torch

    from .logits.parameters import stack
    from .sampling import sample

    device, parameters = model.device, stack([sampling], model.device)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    ids = torch.tensor([list(prompt)], device=device)
    seen = torch.zeros(1, model.dims.vocab_size, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, cache=cache, logits_to_keep=1)  # [1, 1, V]
            seen.scatter_(1, ids, True)
            token, _ = sample(logits[:, 0], parameters, torch.tensor([step], device=device), seen)
        yield int(token)
        if int(token) in model.eos_token_ids:
            return
        ids = token[:, None]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for an error that the user can fix, 130 on Ctrl-C."""
    if sys.stderr is None:  # closed: print() would write to stdout instead
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        args = arguments.parse(argv)
        asked = arguments.read_jobs(args)
        live = len(asked) == 1 and not args.prompts_file and not args.json  # one prompt: print its text as it comes
        if args.resume:
            asked = prompts_file.resume(args.output, asked)
            if not asked:
                print(f"--output {args.output} has all results", file=sys.stderr)
                return 0
        with Output(args.output, append=args.resume) as output:
            from .cli.chat import Chat  # imports torch, so only after the arguments are checked
            from .cli.session import Session

            session = Session(args, output)
            try:
                Chat(session).run() if args.chat else session.complete(asked, live)
            except KeyboardInterrupt:
                session.report()
                raise
            session.report()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        return refuse(error)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return refuse(error)
        raise
    return 0


def run() -> NoReturn:
    """Run the command line and exit."""
    leave(main())


if __name__ == "__main__":
    run()
