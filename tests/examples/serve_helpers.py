"""Helpers of the server example's tests: its names, and answers of an engine to compare with."""

import time

import pytest

from llama_flex import Engine, Sampling

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from examples import serve as serve  # noqa: E402

PROMPTS = ["The capital of France is", "Water boils at", "Ξεσκεπάζω", "hello"]
NAME = "tiny"


def complete_with(client, prompt=PROMPTS[0], **options):
    """Complete a prompt."""
    return client.completions.create(model=NAME, prompt=prompt, **{"max_tokens": 6, "temperature": 0} | options)


def expected(engine, prompt, *, new=6, **sampling):
    """What an engine generates for a text or for ids."""
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    alone = Engine(engine.model, engine.tokenizer, compile="auto")
    return alone.generate([ids], max_new_tokens=new, sampling=Sampling(**sampling))[0]


def chat_ids(engine, content="Hi"):
    """The ids of a conversation of one message."""
    return engine.tokenizer.encode(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>", add_special_tokens=False)


def wait_until(condition):
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_free(engine):
    """Whether no request is left, and no page is in use."""
    manager = engine.scheduler.block_manager
    return engine.scheduler.idle and manager.available == manager.num_pages
