"""A conversation in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..cache import Cache
from ..engine.output import NonFiniteLogitsError, Step
from ..logits.parameters import Sampling
from ..usercode.errors import CompileError
from .output import refuse
from .prompts_file import Messages, UsageError
from .session import Session

_HELP = "/clear forgets the conversation, /exit or the end of input ends it; anything else is a message"


def _refuse_message(error: ValueError) -> None:
    """Refuse a chat message; leave out the number of the prompt, which means nothing in a chat."""
    refuse(UsageError(re.sub(r"^prompt 0:? ", "", str(error))))


@dataclass
class _Memory:
    """The keys and values of a conversation, and the ids of their tokens."""

    cache: Cache | None = None
    ids: list[int] = field(default_factory=list)
    compiled: bool = False  # whether the cache is of a size for compiled steps


class Chat:
    """A conversation with a loaded model."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self) -> None:
        """Read messages, one per line, until the end of input; keep the slots of tokens already computed."""
        session = self.session
        engine = session.new_engine(session.compiles)
        messages: Messages = []
        memory = _Memory()
        for turn, message in enumerate(self._messages(messages)):
            messages.append({"role": "user", "content": message})
            try:
                prompt = self._fitting(messages)
            except ValueError as error:  # too long, say: the conversation goes on without this message
                _refuse_message(error)
                messages.pop()
                continue
            reply, tokens, shared, sampling = (
                session.prefill,
                [],
                self._recall(memory, prompt),
                session.sampling_of(turn),
            )
            session.output.write(reply)

            def start(prompt: list[int] = prompt, sampling: Sampling = sampling) -> Iterator[Step]:
                new = [prompt[self._recall(memory, prompt) :]]
                known = [memory.ids]
                return engine.stream(new, cache=memory.cache, cached_ids=known, sampling=sampling, **session.options)

            try:
                for step in session.statistics.timed(session.steps(start), [prompt[shared:]]):
                    tokens.append(step.token)
                    reply += step.text or ""
                    session.output.write(step.text or "")
            except KeyboardInterrupt:  # ends the reply, not the conversation
                pass
            except CompileError:
                raise
            except ValueError as error:  # a grammar that allows no token, say: the conversation goes on
                reply = ""
                if isinstance(error, NonFiniteLogitsError):
                    memory.cache = None  # its keys and values may hold NaN too
                _refuse_message(error)
            # The last token was never fed; after an interrupt its step may be half done, and truncate() forgets it.
            memory.ids += [*prompt[len(memory.ids) :], *tokens[:-1]] if tokens else []
            session.output.write("\n")
            if reply.strip():
                messages.append({"role": "assistant", "content": reply})
            else:  # many templates refuse an empty one, and two messages of the user in a row
                messages.pop()
                print("no reply; the message was dropped from the conversation", file=sys.stderr)

    @property
    def _context(self) -> int:
        """The maximum number of tokens in a conversation."""
        engine, args = self.session.engine, self.session.args
        return int(min(engine.model.context, engine.limits.longest(args.max_new_tokens)))

    def _recall(self, memory: _Memory, prompt: list[int]) -> int:
        """Return how many tokens of a prompt need not be computed again; truncate the memory to those."""
        engine = self.session.engine
        needed = min(len(prompt) + self.session.expected, self._context)
        if memory.cache is None or needed > memory.cache.max_length or memory.compiled != engine.compile:
            memory.cache, memory.ids, memory.compiled = engine.new_cache(1, needed), [], engine.compile
        fresh = prompt[:-1]  # at least one token is computed anew, for its logits
        differs = (i for i, (a, b) in enumerate(zip(memory.ids, fresh, strict=False)) if a != b)
        shared = next(differs, min(len(memory.ids), len(fresh)))
        if engine.model.looks_ahead_by_default():
            shared = 0  # earlier tokens see the new ones
        memory.cache.truncate(shared)
        memory.ids = prompt[:shared]
        return shared

    def _messages(self, messages: Messages) -> Iterator[str]:
        """Yield the user's messages, line by line; carry out commands."""
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

    def _fitting(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation; drop its oldest exchanges until the context has room for a reply.

        Raises ValueError, and leaves the conversation as it is, if even the last message alone leaves no room for one.
        """
        session, context, dropped = self.session, self._context, 0
        room = session.args.max_new_tokens or min(session.expected, context // 4)
        for dropped in range(0, len(messages), 2):  # down to the last one alone
            prompt = session.tokenizer.encode(session.chat_text(messages[dropped:]), add_special_tokens=False)
            if len(prompt) + room <= context:
                break
        session.engine.check([prompt], session.args.max_new_tokens)
        del messages[:dropped]
        if dropped:
            print(f"context limit of {context} tokens reached; dropped the {dropped} oldest messages", file=sys.stderr)
        return prompt
