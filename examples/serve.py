"""Serve a model over HTTP as the OpenAI API: completions and chat, whole or streamed. All requests run in one batch.

pip install starlette uvicorn llguidance
python -m examples.serve --model weights/SmolLM2-135M-Instruct
curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is", "max_tokens": 16, "stream": true}'

The official client works as it is: OpenAI(base_url="http://localhost:8000/v1", api_key="none"). Its `extra_body` takes
the fields of `Sampling` that OpenAI lacks, such as min_p, and `structured_outputs` with a json, regex or (Lark)
grammar. What is not served, such as tools, is refused by name, never ignored.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llama_flex import Engine, Grammar, Llama, Sampling, Tokenizer
from llama_flex.engine.output import Step
from llama_flex.usercode.arguments import whole_number

MAX_BODY, MAX_CHOICES, MAX_TOP_LOGPROBS = 8 << 20, 1024, 20  # bytes; of one call; of one token
GRACE = 5  # seconds that calls have to end after SIGTERM or Ctrl-C

# The parameters of calls, with their JSON types; `object` where something else checks the value.
SAMPLING = {field.name for field in dataclasses.fields(Sampling)} - {"grammar", "processors", "top_logprobs"}
NEUTRAL = {
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "store": False,
}  # no other value
LABELS = ("user", "safety_identifier", "prompt_cache_key")  # change nothing
COMMON = {"model": str, "n": object, "max_tokens": object, "stop": str | list, "stream": bool, "stream_options": dict}
COMMON |= {"structured_outputs": dict, **dict.fromkeys([*SAMPLING, *NEUTRAL, *LABELS], object)}
COMPLETION = COMMON | {"prompt": str | list, "logprobs": object}
CHAT = COMMON | {"messages": list, "logprobs": bool, "top_logprobs": object, "max_completion_tokens": object}
CHAT |= {"response_format": dict}
WORDS = {bool: "true or false", dict: "an object", list: "a list", str: "a text", str | list: "a text or a list"}
ROLES = ("system", "user", "assistant")
GRAMMARS = {"json": Grammar.json_schema, "regex": Grammar.regex, "grammar": Grammar.lark}


class Refusal(ValueError):
    """A call that is not answered, in the terms of OpenAI's errors. param: the parameter that is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status_code = param, code, status


def json_response(content: dict, status: int = 200) -> Response:
    """Return a JSON response in ASCII: a name may hold what UTF-8 cannot."""
    return Response(json.dumps(content), status, media_type="application/json")


def error_json(error: Exception) -> dict:
    """Return an error in OpenAI's shape; log it if it was not expected."""
    is_client = getattr(error, "status_code", 500) < 500
    if not isinstance(error, Refusal | HTTPException):
        logging.getLogger("uvicorn.error").error("a call failed", exc_info=error)
    about = {"type": "invalid_request_error" if is_client else "server_error", "param": getattr(error, "param", None)}
    return {"error": {"message": str(error) or repr(error), **about, "code": getattr(error, "code", None)}}


async def refuse(_: Any, error: Exception) -> Response:
    """Answer with an error."""
    return json_response(error_json(error), getattr(error, "status_code", 500))


async def read_json(http: Request) -> Any:
    """Return the JSON of a body."""
    body, size = bytearray(), 0
    try:
        async for chunk in http.stream():  # to its end: a client hears no answer before it has sent everything
            size += len(chunk)
            body += chunk if size <= MAX_BODY else b""
        fields = json.loads(body) if size <= MAX_BODY else None
    except (ValueError, RecursionError, ClientDisconnect) as error:
        raise Refusal(f"the body is not JSON: {error!r:.200}") from None
    if size > MAX_BODY:
        raise Refusal(f"the body has {size} bytes; the limit is {MAX_BODY}", code="request_too_large", status=413)
    return fields


def check(fields: Any, kinds: Mapping[str, Any], where: str = "") -> dict:
    """Return the fields of an object that are not null. Raises Refusal for unknown ones and for other JSON types."""
    if not isinstance(fields, dict):
        raise Refusal(f"{where or 'the body'} must be an object, not {fields!r:.60}", where or None)
    fields, prefix = {name: value for name, value in fields.items() if value is not None}, where and f"{where}."
    for name, value in fields.items():
        if name not in kinds or value != NEUTRAL.get(name, value):
            raise Refusal(f"{prefix}{name} = {value!r:.60} is not served", prefix + name, "unsupported_parameter")
        if not isinstance(value, kinds[name]):
            raise Refusal(f"{prefix}{name} must be {WORDS[kinds[name]]}, not {value!r:.60}", prefix + name)
    return fields


def read_sampling(fields: dict, top_logprobs: int) -> Sampling:
    """Return the sampling parameters of a call."""
    values = {"temperature": 1.0} | {name: fields[name] for name in SAMPLING & fields.keys()}
    if isinstance(bias := values.get("logit_bias"), dict):  # JSON's names are texts
        values["logit_bias"] = {int(id) if id.isdecimal() else id: value for id, value in bias.items()}
    given = check(fields.get("structured_outputs", {}), dict.fromkeys(GRAMMARS, object), "structured_outputs")
    match fields.get("response_format", {"type": "text"}):
        case {"type": "text", **others} if not others:
            pass
        case {"type": "json_object", **others} if not others:
            given["response_format"] = {"type": "object"}
        case {"type": "json_schema", "json_schema": spec, **others} if not others:
            kinds = {"name": str, "description": str, "strict": bool, "schema": dict}
            given["response_format"] = check(spec, kinds, "response_format.json_schema").get("schema", {})
        case form:
            words = "a type of text, json_object or json_schema and its json_schema"
            raise Refusal(f"response_format must have {words}, not {form!r:.60}", "response_format")
    if len(given) > 1:
        raise Refusal(f"one grammar is served, not {', '.join(given)}", "structured_outputs")
    grammar = next((GRAMMARS.get(name, Grammar.json_schema)(value) for name, value in given.items()), None)
    return Sampling(**values, grammar=grammar, top_logprobs=top_logprobs)


class Call:
    """One call of a client: its requests, n for each prompt, and their steps as OpenAI's JSON."""

    def __init__(self, server: "Server", fields: Any, chat: bool) -> None:
        """Submit the requests. Raises ValueError for what is not served."""
        fields = check(fields, CHAT if chat else COMPLETION)
        server.check_model(fields.get("model", server.model))
        self.server, self.engine, self.chat, self.stream = server, server.engine, chat, fields.get("stream", False)
        options = check(fields.get("stream_options", {}), {"include_usage": bool}, "stream_options")
        if options and not self.stream:
            raise Refusal("stream_options needs stream: true", "stream_options")
        self.streams_usage = options.get("include_usage", False)
        kind = "text_completion" if not chat else "chat.completion.chunk" if self.stream else "chat.completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind}
        self.head |= {"created": int(time.time()), "model": server.model}

        name, self.has_logprobs = "top_logprobs" if chat else "logprobs", fields.get("logprobs", False) is not False
        self.top = whole_number(name, fields.get(name, 0), least=0)
        if self.top > MAX_TOP_LOGPROBS or (self.top and not self.has_logprobs):
            raise Refusal(f"{name} must be at most {MAX_TOP_LOGPROBS}, and needs logprobs, not {self.top}", name)
        self.token_bytes = server.token_bytes if self.has_logprobs else []
        sampling = read_sampling(fields, self.top)
        stop = [fields["stop"]] if isinstance(fields.get("stop"), str) else fields.get("stop", [])
        if len(stop) > 4:
            raise Refusal(f"stop has {len(stop)} texts; the limit is 4", "stop")
        if {"max_completion_tokens", "max_tokens"} <= fields.keys():
            raise Refusal("give max_completion_tokens or max_tokens, not both", "max_tokens")
        name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
        limit = whole_number(name, fields[name], least=1) if name in fields else None if chat else 16

        self.prompts = [server.render(fields.get("messages", []))] if chat else server.encode(fields.get("prompt", []))
        for ids in self.prompts:
            if len(ids) + (limit or 1) > server.context:
                words = (
                    f"{len(ids)} tokens of the prompt and {limit or 1} new ones exceed the context of {server.context}"
                )
                raise Refusal(words, name, "context_length_exceeded")
        self.n = whole_number("n", fields.get("n", 1), least=1)
        if self.n * len(self.prompts) > MAX_CHOICES:
            raise Refusal(f"n: {self.n * len(self.prompts)} choices; the limit is {MAX_CHOICES}", "n")
        self.requests, self.offsets = [], [0] * (self.n * len(self.prompts))
        try:
            for ids in self.prompts:
                options = {"max_new_tokens": limit or server.context - len(ids), "sampling": sampling, "stop": stop}
                self.requests += self.engine.submit_samples(ids, self.n, **options)
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
                if type(request.error) is ValueError:  # of its grammar, or its parameters leave no token
                    raise Refusal(str(request.error))
                if request.error is not None:
                    raise request.error
            if not finished:
                await self.engine.scheduler.advance()
        if any(request.finish_reason == "cancelled" for request in self.requests):
            raise Refusal("the server is shutting down", status=503)

    async def whole(self) -> Response:
        """Return the answer once all requests are finished."""
        try:
            async for _ in self.steps():
                pass
        except Exception as error:  # noqa: BLE001  - raised, it would end the connection
            return await refuse(None, error)
        choices = [self.choice(number, request.steps) for number, request in enumerate(self.requests)]
        return json_response(self.head | {"choices": choices, "usage": self.usage()})

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error is the last one."""

        def event(choices: list[dict], usage: dict | None = None) -> str:
            extra = {"usage": usage} if self.streams_usage else {}
            return f"data: {json.dumps({**self.head, 'choices': choices, **extra})}\n\n"

        try:
            for number in range(len(self.requests) if self.chat else 0):
                yield event([self.choice(number, [])])
            async for number, step in self.steps():
                if step.text or step.finish_reason or self.has_logprobs:
                    yield event([self.choice(number, [step])])
            if self.streams_usage:
                yield event([], self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001  - raised, it would end the connection
            yield f"data: {json.dumps(error_json(error))}\n\n"

    def choice(self, number: int, steps: Sequence[Step]) -> dict:
        """Return steps of a choice as JSON; of no steps the beginning of a streamed message."""
        text = "".join(step.text or "" for step in steps)
        role = {} if self.stream and steps else {"role": "assistant"}
        content = {"delta" if self.stream else "message": {**role, "content": text}} if self.chat else {"text": text}
        logprobs = self.logprobs(number, steps) if self.has_logprobs else None
        reason = steps[-1].finish_reason if steps else None
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, number: int, steps: Sequence[Step]) -> dict:
        """Return the log-probabilities of steps as JSON, without the end-of-text token."""
        steps = [step for step in steps if step.token not in self.engine.model.eos_token_ids]
        tokens = [self.token(step.token, step.logprob) for step in steps]
        tops = [[self.token(*each) for each in step.top_logprobs or ()] for step in steps]
        if self.chat:
            return {"content": [{**token, "top_logprobs": top} for token, top in zip(tokens, tops, strict=True)]}
        texts = [token["token"] for token in tokens]
        *offsets, self.offsets[number] = itertools.accumulate(map(len, texts), initial=self.offsets[number])
        found = {"tokens": texts, "token_logprobs": [token["logprob"] for token in tokens], "text_offset": offsets}
        top = [{each["token"]: each["logprob"] for each in top} for top in tops] if self.top else None
        return {**found, "top_logprobs": top}

    def token(self, id: int, logprob: float) -> dict:
        """Return a token as JSON, which has no infinity."""
        content = self.token_bytes[id] if id < len(self.token_bytes) else b""
        return {"token": content.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": [*content]}

    def usage(self) -> dict:
        """Return the numbers of tokens; a prompt counts once, however many choices it has."""
        prompt, new = sum(map(len, self.prompts)), sum(len(request.steps) for request in self.requests)
        pairs = zip(self.prompts, self.requests[:: self.n], strict=True)
        details = {"cached_tokens": sum(min(request.num_cached_tokens, len(ids)) for ids, request in pairs)}
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return {**counts, "prompt_tokens_details": details}


class Server:
    """The routes of the API over an engine. model: the name by which clients know it."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self.tokenizer, self.model, self.started = engine, engine.tokenizer, model, int(time.time())
        self.context = min(engine.model.context, engine.scheduler.max_length)
        self.calls: set[Call] = set()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/completions", functools.partial(self.complete, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(self.complete, chat=True), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
        ]
        return Starlette(routes=routes, exception_handlers=dict.fromkeys((Refusal, HTTPException, Exception), refuse))

    async def complete(self, http: Request, *, chat: bool) -> Response:
        """Continue prompts, or a conversation."""
        fields = await read_json(http)
        try:
            call = await asyncio.to_thread(Call, self, fields, chat)  # templates, grammars and long texts take a while
        except Refusal:
            raise
        except ValueError as error:  # most begin with the name of a parameter
            param = str(error).partition(" ")[0]
            raise Refusal(str(error), param if param in fields else None) from None
        self.calls.add(call)
        call.attending = asyncio.create_task(call.attend(http))
        return StreamingResponse(call.events(), media_type="text/event-stream") if call.stream else await call.whole()

    async def models(self, http: Request) -> Response:
        """List the one model, or describe it."""
        model = {"id": self.model, "object": "model", "created": self.started, "owned_by": "llama_flex"}
        self.check_model(http.path_params.get("name", self.model))
        return json_response(model if http.path_params else {"object": "list", "data": [model]})

    async def health(self, http: Request) -> Response:
        """Count the requests and the free pages."""
        scheduler = self.engine.scheduler
        counts = {"running": scheduler.num_running, "waiting": scheduler.num_waiting}
        return json_response({"status": "ok", **counts, "free_pages": scheduler.block_manager.available})

    def close(self) -> None:
        """End all calls with an error."""
        for request in [request for call in self.calls for request in call.requests]:
            self.engine.cancel(request)

    def check_model(self, name: str) -> None:
        """Refuse any other model."""
        if name != self.model:
            raise Refusal(f"model {name!r:.200} is not served; use {self.model!r}", "model", "model_not_found", 404)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token."""
        return self.tokenizer.token_bytes()

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
            where = f"messages[{n}]"
            message = check(message, {"role": str, "content": str | list}, where)
            if message.get("role") not in ROLES or "content" not in message:
                raise Refusal(f"{where} needs a content, and a role of {ROLES}, not {message!r:.100}", where)
            parts = message["content"]
            if isinstance(parts, list):
                parts = [
                    check(part, {"type": str, "text": str}, f"{where}.content[{i}]") for i, part in enumerate(parts)
                ]
                if not all(part.get("type") == "text" and "text" in part for part in parts):
                    raise Refusal(f"{where}.content must be a text, or parts of type 'text'", f"{where}.content")
                parts = "\n".join(part["text"] for part in parts)
            plain.append({"role": message["role"], "content": parts})
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(plain), add_special_tokens=False)


class Uvicorn(uvicorn.Server):
    """The HTTP server. After SIGTERM or Ctrl-C it takes no more calls, and ends those that go on for GRACE seconds."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(uvicorn.Config(server.app(), timeout_graceful_shutdown=2 * GRACE, **options))
        self.server = server

    async def shutdown(self, sockets: list | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.server.close)
        await super().shutdown(sockets)


def warm_up(engine: Engine) -> None:
    """Run steps of every size that is compiled, greedy and sampled; just one request if nothing is compiled. What
    filters samples, such as top_p, is compiled when it is first asked for."""
    batch, longest = engine.scheduler.batch, min(engine.model.context, engine.scheduler.max_length) - 1
    lengths, sizes = (batch.prefill_sizes, batch.decode_sizes) if engine.compile else ([2], [])
    for sampling in [Sampling(), Sampling(temperature=1.0)][: 1 + engine.compile]:
        for length in lengths:
            engine.forget()  # or this prompt would share the last one's keys and values
            engine.submit([0] * min(length, longest), max_new_tokens=1, sampling=sampling)
            engine.run()
        for size in sizes:
            for _ in range(size):  # a prompt of one token is decoded
                engine.submit([0], max_new_tokens=1, sampling=sampling)
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
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, once it has shut down
        warm_up(engine)
        Uvicorn(Server(engine, Path(args.model).name), host=args.host, port=args.port).run()


if __name__ == "__main__":
    main()
