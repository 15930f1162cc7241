"""Serve OpenAI-compatible completions over HTTP; all concurrent requests run in one batch.

pip install starlette uvicorn
MODEL=weights/SmolLM2-135M-Instruct uvicorn examples.serve:app
curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is", "max_tokens": 16, "stream": true}'
"""

import json
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llama_flex import Engine, Llama, Sampling, Tokenizer

folder = os.environ.get("MODEL", "weights/SmolLM2-135M-Instruct")
engine = Engine(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder), compile="EAGER" not in os.environ)


# Parameters that are accepted only with these values.
NEUTRAL = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "logprobs": None}
NEUTRAL |= {"presence_penalty": 0, "frequency_penalty": 0}


async def completions(http: Request) -> Response:
    """Answer one request, whole or as a stream of events."""
    if not isinstance(body := await http.json(), dict) or not isinstance(body.get("prompt"), str | list):
        raise ValueError("the body is a JSON object with a 'prompt', a text or a list of token ids")
    body = {name: value for name, value in body.items() if value is not None}
    if odd := {name: value for name, value in body.items() if value != NEUTRAL.get(name, value)}:
        raise ValueError(f"not served: {odd}")
    ids = body["prompt"] if isinstance(body["prompt"], list) else engine.tokenizer.encode(body["prompt"])
    sampling = Sampling(temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0), seed=body.get("seed"))
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    request = engine.submit(ids, max_new_tokens=body.get("max_tokens", 16), sampling=sampling, stop=stop)

    def answer(text: str, reason: str | None) -> dict:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {"id": f"cmpl-{request.number}", "object": "text_completion", "choices": [choice]}

    async def events():
        async for step in request:
            yield f"data: {json.dumps(answer(step.text, step.finish_reason))}\n\n"
        yield "data: [DONE]\n\n"

    if body.get("stream"):
        return StreamingResponse(events(), media_type="text/event-stream")
    return JSONResponse(answer("".join([step.text async for step in request]), request.finish_reason))


async def refuse(http: Request, error: Exception) -> Response:
    """Answer a bad request with the message of its ValueError."""
    return JSONResponse({"error": {"message": str(error)}}, 400)


route = Route("/v1/completions", completions, methods=["POST"])
app = Starlette(routes=[route], exception_handlers={ValueError: refuse})
