"""Chat templates: Jinja text from a model's folder, rendered as in transformers, within limits.

A template is untrusted code. Jinja's sandbox keeps it away from Python, but does not keep it from running forever or
from building gigabytes. So it runs in a process of its own (chat_worker.py), which has limited memory and processor
time and cannot open files; a process that exceeds a limit is ended, and the next template gets a new one.
"""

import atexit
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.files import one_line

MAX_SECONDS = 5  # of processor time
MAX_BYTES = 1 << 27  # beyond what the process starts with
MAX_TEXT_BYTES = 1 << 23
OUT_OF_MEMORY = 3  # an exit code
_START = "import sys; sys.path[:] = sys.argv[2:]; from llama_flex.text.chat_worker import main; main(int(sys.argv[1]))"
# Letters, which no template escapes or cuts at, then white space, which tells whether it keeps that of messages.
_MARK = "FINAL_MESSAGE_ENDS_HERE "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """Return the text of a conversation. Environment, functions and variables are those of transformers 5.23's
    `render_jinja_template` (utils/chat_template_utils.py), which the tests compare with.

    Args:
        template: Jinja source.
        messages: dicts, as the template expects them; usually "role" and "content".
        tools: JSON schemas, each a dict. documents: dicts, usually "title" and "text".
        continue_final_message: end the text where the last message's "content" ends, or its field of that name, as
            transformers does; not together with add_generation_prompt.
        variables: anything else the template reads, such as bos_token or date_string.

    Raises:
        ValueError: no messages; something that is not plain data; the template is faulty, refuses the conversation
            (`raise_exception`), or needs more than MAX_SECONDS, MAX_BYTES (on Linux) or MAX_TEXT_BYTES; a last message
            to continue that has no text, or that the template leaves out.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message ends within the last message; it needs add_generation_prompt=False")
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError("a chat needs a non-empty list of messages, such as [{'role': 'user', 'content': 'Hi'}]")
    for name, entries in (("message", messages), ("tool", tools or ()), ("document", documents or ())):
        for entry in entries:
            if callable(entry):
                raise ValueError(
                    f"{name} {entry!r} is a Python function; pass its JSON schema instead: "
                    "{'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': {...}}}"
                )
            if not isinstance(entry, Mapping):
                raise ValueError(f"every {name} must be a dict, not {type(entry).__name__}: {entry!r:.80}")
    data = {"add_generation_prompt": bool(add_generation_prompt), "tools": tools, "documents": documents, **variables}
    try:
        data = {key: _plain(value, key) for key, value in {"messages": list(messages), **data}.items()}
        data["messages"] = [_with_reasoning(message) for message in data["messages"]]
        final = _mark_end(data["messages"][-1], continue_final_message, template) if continue_final_message else None
        request = marshal.dumps((template, data, MAX_SECONDS))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"the conversation is not plain data: {error}") from None
    if len(request) > MAX_BYTES // 4:
        raise ValueError(f"the conversation is {len(request) >> 20} MiB; the limit is {MAX_BYTES >> 22} MiB")
    text = _renderer().render(request)
    return text if final is None else _up_to_mark(text, final)


def _mark_end(message: dict[str, Any], field: bool | str, template: str) -> str:
    """Append a mark to a message's text, in place; return the text without it. Raises ValueError."""
    name = field if isinstance(field, str) else "content"
    if (final := message.get(name)) is None:
        raise ValueError(f"the last message has no {name!r} to continue")
    # A template reads reasoning under one of its names only.
    names = [n for n in _REASONING_FIELDS if message.get(n) == final] if name in _REASONING_FIELDS else [name]
    if not any(n in template for n in names):
        raise ValueError(f"the chat template does not read {name!r}, so it cannot be continued")
    if isinstance(final, list | tuple):
        block = next((part for part in reversed(final) if isinstance(part, dict) and "text" in part), None)
        if block is None:
            raise ValueError("the last message has no text to continue")
        final, block["text"] = block["text"], f"{block['text']}{_MARK}"
    else:
        message |= dict.fromkeys(names, f"{final}{_MARK}")
    if not isinstance(final, str):
        raise ValueError(f"the last message's {name!r} is {final!r:.80}, not text, so it cannot be continued")
    return final


def _up_to_mark(text: str, final: str) -> str:
    """Return the text of a conversation up to the mark, without white space at its end if the mark has lost its own:
    the template strips messages then."""
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError("the chat template omits all or part of the last message, so it cannot be continued")
    return text[:at] if text[at : at + len(_MARK)] == _MARK else text[:at].rstrip()


def _plain(value: Any, name: str) -> Any:
    """Return a copy in plain JSON types. Raises ValueError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_plain(item, name) for item in value)
    raise ValueError(
        f"{name} holds a {type(value).__name__}; a chat template takes only strings, numbers, lists and dicts"
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Copy reasoning, which goes by three names, to those that templates read, as transformers does."""
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Renderer:
    """A process that renders templates one after the other."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise ValueError("chat templates are rendered under resource limits that Windows does not have; use WSL")
        # The folder of this package, and no relative paths: the current folder may be untrusted.
        paths = [str(Path(__file__).parents[2]), *filter(os.path.isabs, sys.path)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, str(MAX_BYTES), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only this process
            )
        except OSError as error:
            raise ValueError(f"the process that renders chat templates did not start: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def render(self, request: bytes) -> str:
        """Return the answer to a request, and keep the process for more. Raises ValueError; if unanswered, ends it."""
        answered = False
        try:
            is_text, content = self._ask(request)
            answered = True
        finally:
            if not answered:  # Ctrl-C, too: a late answer would answer no request
                self.end()
        _idle.append(self)
        text = content.decode("utf-8", "surrogatepass")
        if not is_text:
            raise ValueError(one_line(f"the chat template failed{text}"))
        return text

    def _ask(self, request: bytes) -> tuple[bool, bytes]:
        try:
            self._stdin.write(len(request).to_bytes(8, "little") + request)
            self._stdin.flush()
        except BrokenPipeError:
            pass  # `_how_it_ended` tells why
        head = self._stdout.read(9)
        size = int.from_bytes(head[1:], "little")
        if len(head) == 9 and size > MAX_TEXT_BYTES:
            raise ValueError(f"the chat template failed: its text has more than {MAX_TEXT_BYTES >> 20} MiB")
        content = self._stdout.read(size)
        if len(head) < 9 or len(content) < size:
            raise ValueError(f"the chat template failed: {self._how_it_ended()}")
        return bool(head[0]), content

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return f"it runs for more than {MAX_SECONDS} seconds"
        if code == OUT_OF_MEMORY:
            return f"it takes more than {MAX_BYTES >> 20} MiB"
        return f"the process that renders it ended with {code}"

    @property
    def alive(self) -> bool:
        """Whether the process can take a request."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill the process, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Close the pipes to the process, and leave it: it has ended, or after a fork belongs to the parent."""
        self._process.returncode = self._process.returncode or 0  # if unknown, Popen would warn
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):  # from input that the process did not read before it ended
                pipe.close()


_idle: list[_Renderer] = []  # not one with a lock: each thread takes one, and a fork inherits no held lock


def _renderer() -> _Renderer:
    while _idle:
        with suppress(IndexError):  # another thread took the last
            if (renderer := _idle.pop()).alive:
                return renderer
    return _Renderer()


def _after_fork() -> None:
    for renderer in _idle:
        renderer.forget()
    _idle.clear()


@atexit.register
def _end() -> None:
    for renderer in _idle:
        renderer.end()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
