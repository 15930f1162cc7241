"""The examples do what they say."""

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest
from conftest import DEMO

from llama_flex import Engine, Llama, Tokenizer

ROOT = Path(__file__).parent.parent


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def posted(app, body: dict) -> tuple[int, str]:
    """The status and the body of an answer, as an ASGI server asks for them."""
    sent, given = [], [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if given:
            return given.pop()
        return await asyncio.Future()  # the client stays

    async def send(message):
        sent.append(message)

    path = "/v1/completions"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": []}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


@pytest.mark.weights
def test_the_server_completes_many_prompts_at_a_time(monkeypatch):
    pytest.importorskip("starlette")
    monkeypatch.setenv("MODEL", str(DEMO))
    monkeypatch.setenv("EAGER", "1")
    app = example("serve").app
    prompts = ["The capital of France is", "Water boils at", "One, two, three,"]
    common = {"max_tokens": 6, "temperature": 0}

    async def ask():
        bodies = [common | {"prompt": p, "stream": n == 1} for n, p in enumerate(prompts)]
        bodies += [common | {"prompt": prompts[2], "stop": ","}, {"prompt": ""}, common, common | {"max_tokens": 10**6}]
        bodies[-1]["prompt"] = "x"
        return await asyncio.gather(*(posted(app, body) for body in bodies))

    whole, streamed, counted, stopped, *refused = asyncio.run(ask())
    engine = Engine(Llama.from_pretrained(DEMO), Tokenizer.from_pretrained(DEMO))
    expected = [engine.generate([engine.tokenizer.encode(p)], max_new_tokens=6)[0].text for p in prompts]
    events = [line.removeprefix("data: ") for line in streamed[1].split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == expected[1]
    assert choices[-1]["finish_reason"] == "length"
    answers = [json.loads(body)["choices"][0] for _, body in (whole, counted, stopped)]
    assert [answer["text"] for answer in answers] == [expected[0], expected[2], expected[2].partition(",")[0]]
    assert answers[2]["finish_reason"] == "stop"
    assert [status for status, _ in refused] == [400, 400, 400]
    assert all(json.loads(body)["error"]["message"] for _, body in refused)
