"""Serve a model over HTTP as the OpenAI API: completions and chat, whole or streamed. All requests run in one batch.

pip install starlette uvicorn
python -m examples.serve --model weights/SmolLM2-135M-Instruct
curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is", "max_tokens": 16, "stream": true}'

The official client works as it is: OpenAI(base_url="http://localhost:8000/v1", api_key="none"). Its `extra_body` takes
the fields of `Sampling` that OpenAI lacks, such as min_p. What is not served is refused by name, never ignored.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Container, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llama_flex import Engine, Llama, Sampling, Tokenizer
from llama_flex.engine.output import Step
from llama_flex.usercode.arguments import whole_number

MAX_BODY = 8 << 20  # bytes
MAX_CHOICES = 1024  # of one call
GRACE = 5  # seconds that running requests have to end after SIGTERM or Ctrl-C
SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
# Parameters that are accepted only with the value that changes nothing, and labels, which change nothing.
NEUTRAL = {"best_of": 1, "echo": False, "suffix": "", "tools": [], "tool_choice": "none", "store": False}
LABELS = {"user", "safety_identifier", "prompt_cache_key"}
COMMON = {"model", "n", "stream", "stream_options", "stop", "max_tokens", "logprobs", *SAMPLING, *NEUTRAL, *LABELS}
COMPLETION = COMMON | {"prompt"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
ROLES = ("system", "user", "assistant")
# The JSON types of parameters, those that nothing else checks.
KINDS = {"stream": bool, "include_usage": bool, "stop": str | list, "prompt": str | list, "messages": list}
KINDS |= {"content": str | list, "text": str}
WORDS = {bool: "true or false", str: "a text", list: "a list", str | list: "a text or a list"}


class Refusal(ValueError):
    """A call that is not answered, in the terms of OpenAI's errors. param: the parameter that is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error_json(error: Exception) -> dict:
    """Return an error in OpenAI's shape; log it if it is the server's."""
    kind = "invalid_request_error" if getattr(error, "status", 500) < 500 else "server_error"
    if not isinstance(error, Refusal):
        logging.getLogger("uvicorn.error").error("a call failed", exc_info=error)
    about = {name: getattr(error, name, None) for name in ("param", "code")}
    return {"error": {"message": str(error) or type(error).__name__, "type": kind, **about}}


def json_response(content: dict, status: int = 200) -> Response:
    """Return a JSON response in ASCII: a name may hold what UTF-8 cannot."""
    return Response(json.dumps(content), status, media_type="application/json")


def check(fields: Any, known: Container[str], where: str = "") -> dict:
    """Return the fields of an object that are not null. Raises Refusal for unknown ones and for other JSON types."""
    if not isinstance(fields, dict):
        raise Refusal(f"{where or 'the body'} must be an object, not {fields!r:.60}", where or None)
    fields, prefix = {name: value for name, value in fields.items() if value is not None}, where and f"{where}."
    for name, value in fields.items():
        if name not in known or value != NEUTRAL.get(name, value):
            raise Refusal(f"{prefix}{name} = {value!r:.60} is not served", prefix + name, "unsupported_parameter")
        if not isinstance(value, kind := KINDS.get(name, object)):
            raise Refusal(f"{prefix}{name} must be {WORDS[kind]}, not {value!r:.60}", prefix + name)
    return fields


async def read_json(http: Request) -> Any:
    """Return the JSON of a body."""
    body, size = bytearray(), 0
    try:
        async for chunk in http.stream():  # to its end: a client hears no answer before it has sent everything
            size += len(chunk)
            body += chunk if size <= MAX_BODY else b""
    except ClientDisconnect:
        raise Refusal("the client has left") from None
    if size > MAX_BODY:
        raise Refusal(f"the body has {size} bytes; the limit is {MAX_BODY}", code="request_too_large", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}") from None


class Call:
    """One call of a client: its requests, n for each prompt, and their steps as OpenAI's JSON."""

    def __init__(self, server: "Server", fields: dict, chat: bool) -> None:
        """Submit the requests. Raises ValueError for what is not served."""
        fields = check(fields, CHAT if chat else COMPLETION)
        server.check_model(fields.get("model", server.model))
        self.server, self.engine, self.chat, self.stream = server, server.engine, chat, fields.get("stream", False)
        options = check(fields.get("stream_options", {}), {"include_usage"}, "stream_options")
        if options and not self.stream:
            raise Refusal("stream_options needs stream: true", "stream_options")
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": "text_completion"}
        if chat:
            self.head["object"] = "chat.completion.chunk" if self.stream else "chat.completion"
        self.head |= {"created": int(time.time()), "model": server.model}
        self.usage_of_stream = options.get("include_usage", False)
        self.prompts = [server.render(fields.get("messages", []))] if chat else server.encode(fields.get("prompt", []))
        limit = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
        if {"max_completion_tokens", "max_tokens"} <= fields.keys():
            raise Refusal("give max_completion_tokens or max_tokens, not both", "max_tokens")
        limits = [server.new_tokens(ids, limit, fields.get(limit, None if chat else 16)) for ids in self.prompts]
        stop = fields.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if len(stop) > 4:
            raise Refusal(f"stop has {len(stop)} texts; the limit is 4", "stop")
        count = whole_number("n", fields.get("n", 1), least=1)
        if count * len(self.prompts) > MAX_CHOICES:
            raise Refusal(f"{count * len(self.prompts)} choices; the limit is {MAX_CHOICES}", "n")
        sampling = Sampling(**{"temperature": 1.0} | {name: fields[name] for name in SAMPLING & fields.keys()})
        self.requests = []
        try:
            for ids, most in zip(self.prompts, limits, strict=True):
                options = {"sampling": sampling, "max_new_tokens": most, "stop": stop}
                self.requests += self.engine.submit_samples(ids, count, **options)
        except ValueError:
            self.leave()
            raise

    def leave(self) -> None:
        """Cancel the requests that are not finished, and free their pages."""
        if not all(request.finished for request in self.requests):
            for request in self.requests:
                self.engine.cancel(request)
            self.engine.step()

    async def attend(self, http: Request) -> None:
        """Wait until the client has its answer or has left, then leave."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.server.calls.discard(self)
        await asyncio.to_thread(self.leave)

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """Yield each new step with the number of its choice. Raises the error that ended a request."""
        taken, finished = [0] * len(self.requests), False
        while not finished:
            finished = all(request.finished for request in self.requests)  # asked first: no step comes after that
            for number, request in enumerate(self.requests):
                for step in request.steps[taken[number] :]:
                    taken[number] += 1
                    yield number, step
                if request.error is not None:
                    raise request.error
            if not finished:
                await self.engine.scheduler.advance()
        if any(request.finish_reason == "cancelled" for request in self.requests):
            raise Refusal("the server is shutting down", status=503)

    def choice(self, number: int, steps: Sequence[Step]) -> dict:
        """Return steps of a choice as JSON; of no steps the beginning of a streamed message."""
        text = "".join(step.text or "" for step in steps)
        content: dict = {"text": text}
        if self.chat:
            role = {"role": "assistant"} if not (self.stream and steps) else {}
            content = {"delta" if self.stream else "message": {**role, "content": text}}
        return {
            "index": number,
            **content,
            "logprobs": None,
            "finish_reason": steps[-1].finish_reason if steps else None,
        }

    def usage(self) -> dict:
        """Return the numbers of tokens; a prompt counts once, however many choices it has."""
        prompt, new = sum(map(len, self.prompts)), sum(len(request.steps) for request in self.requests)
        first = zip(self.prompts, self.requests[:: len(self.requests) // len(self.prompts)], strict=True)
        cached = sum(min(request.num_cached_tokens, len(ids)) for ids, request in first)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {"usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}}}

    async def whole(self) -> Response:
        """Return the answer once all requests are finished."""
        try:
            async for _ in self.steps():
                pass
        except Exception as error:  # noqa: BLE001  - raised, it would end the connection
            return await self.server.refuse(None, error)
        choices = [self.choice(number, request.steps) for number, request in enumerate(self.requests)]
        return json_response(self.head | {"choices": choices} | self.usage())

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error is the last one."""

        def event(choices: list[dict], usage: dict) -> str:
            return f"data: {json.dumps(self.head | {'choices': choices} | (usage if self.usage_of_stream else {}))}\n\n"

        try:
            for number in range(len(self.requests) if self.chat else 0):
                yield event([self.choice(number, [])], {"usage": None})
            async for number, step in self.steps():
                if step.text or step.finish_reason:
                    yield event([self.choice(number, [step])], {"usage": None})
            if self.usage_of_stream:
                yield event([], self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001  - raised, it would end the connection
            yield f"data: {json.dumps(error_json(error))}\n\n"


class Server:
    """The routes of the API over an engine. model: the name by which clients know it."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.model, self.started = engine, model, int(time.time())
        self.tokenizer, self.calls = engine.tokenizer, set[Call]()
        self.context = min(engine.model.context, engine.scheduler.max_length)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
        ]
        return Starlette(
            routes=routes, exception_handlers=dict.fromkeys((Refusal, HTTPException, Exception), self.refuse)
        )

    def close(self) -> None:
        """End all calls with an error."""
        for request in [request for call in self.calls for request in call.requests]:
            self.engine.cancel(request)

    async def refuse(self, http: Request | None, error: Exception) -> Response:
        """Answer with an error."""
        if isinstance(error, HTTPException):
            error = Refusal(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code)
        return json_response(error_json(error), getattr(error, "status", 500))

    async def completions(self, http: Request) -> Response:
        """Continue prompts, or a conversation."""
        fields = await read_json(http)
        try:
            call = await asyncio.to_thread(Call, self, fields, http.url.path == "/v1/chat/completions")
        except Refusal:
            raise
        except ValueError as error:  # its words begin with the name of a parameter, or of nothing that the client gave
            raise Refusal(
                str(error), next((name for name in fields if str(error).startswith(f"{name} ")), None)
            ) from None
        self.calls.add(call)
        call.attending = asyncio.create_task(call.attend(http))
        return StreamingResponse(call.events(), media_type="text/event-stream") if call.stream else await call.whole()

    async def models(self, http: Request) -> Response:
        """List the one model, or describe it."""
        model = {"id": self.model, "object": "model", "created": self.started, "owned_by": "llama_flex"}
        if "name" not in http.path_params:
            return json_response({"object": "list", "data": [model]})
        self.check_model(http.path_params["name"])
        return json_response(model)

    async def health(self, http: Request) -> Response:
        """Count the requests and the free pages."""
        scheduler = self.engine.scheduler
        counts = {"running": scheduler.num_running, "waiting": scheduler.num_waiting}
        return json_response({"status": "ok", **counts, "free_pages": scheduler.block_manager.available})

    def check_model(self, name: Any) -> None:
        """Refuse any other model."""
        if name != self.model:
            raise Refusal(f"model {name!r:.200} is not served; use {self.model!r}", "model", "model_not_found", 404)

    def encode(self, prompts: str | list) -> list[list[int]]:
        """Return the token ids of each prompt: a text, token ids, or a list of such."""
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not (prompts and all(isinstance(each, str | list) for each in prompts)):
            raise Refusal(f"prompt must be a text, token ids, or a list of such, not {prompts!r:.60}", "prompt")
        return [self.tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]

    def render(self, messages: list) -> list[int]:
        """Return the token ids of a conversation, whose messages hold a text or parts of type "text"."""
        plain = []
        for n, message in enumerate(messages):
            message = check(message, {"role", "content"}, where := f"messages[{n}]")
            if message.get("role") not in ROLES or "content" not in message:
                raise Refusal(f"{where} needs a content, and a role of {ROLES}, not {message!r:.100}", where)
            content = message["content"]
            if isinstance(content, list):
                parts = [check(part, {"type", "text"}, f"{where}.content[{i}]") for i, part in enumerate(content)]
                if not all(part.get("type") == "text" and "text" in part for part in parts):
                    raise Refusal(f"{where}.content must be a text, or parts of type 'text'", f"{where}.content")
                content = "\n".join(part["text"] for part in parts)
            plain.append({"role": message["role"], "content": content})
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(plain), add_special_tokens=False)

    def new_tokens(self, ids: list[int], name: str, limit: Any) -> int:
        """Return how many new tokens a prompt may get: `limit`, which the client calls `name`, or as many as fit."""
        room = self.context - len(ids)
        most = whole_number(name, limit, least=1) if limit is not None else max(room, 1)
        if most > room:
            words = f"{len(ids)} tokens of the prompt and {most} new ones exceed the context of {self.context}"
            raise Refusal(words, name, "context_length_exceeded")
        return most


class Uvicorn(uvicorn.Server):
    """The HTTP server. After SIGTERM or Ctrl-C it takes no more calls, and ends those that go on for GRACE seconds."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(uvicorn.Config(server.app(), timeout_graceful_shutdown=2 * GRACE, **options))
        self.server = server

    async def shutdown(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.server.close)
        await super().shutdown(sockets)


def warm_up(engine: Engine) -> None:
    """Run steps of every size that is compiled, greedy and sampled; just one request if nothing is compiled."""
    batch, longest = engine.scheduler.batch, min(engine.model.context, engine.scheduler.max_length) - 2
    lengths, sizes = (batch.prefill_sizes, batch.decode_sizes) if engine.compile else ([1], [])
    for sampling in [Sampling(), Sampling(temperature=1.0)][: 1 + engine.compile]:
        for length in lengths:
            engine.forget()  # or this prompt would share the last one's keys and values
            engine.submit([0] * min(length, longest), max_new_tokens=2, sampling=sampling)
            engine.run()
        for size in sizes:  # all decode together once the last prompt is computed
            new = min(2 + -(-size // batch.max_chunks), longest)
            for _ in range(size):
                engine.submit([0], max_new_tokens=new, sampling=sampling, stop_token_ids=())
            engine.run()
    engine.forget()


def main() -> None:
    """Load a model, warm it up, and serve it until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, or a repository of the hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch-size", type=int, help="the most sequences that run at a time")
    args = parser.parse_args()
    model, tokenizer = Llama.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    engine = Engine(model, tokenizer, compile="auto", max_batch_size=args.max_batch_size)
    warm_up(engine)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, once it has shut down
        Uvicorn(Server(engine, Path(args.model).name), host=args.host, port=args.port).run()


if __name__ == "__main__":
    main()
