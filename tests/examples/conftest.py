"""A server of a tiny model, and OpenAI's client of it."""

import functools
import socket
import threading
import time

import pytest
import torch
from helpers import TINY, tiny_reference
from tokenizer_helpers import byte_level_json, write_folder

from llama_flex import Engine, Llama, Tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    """A folder with a tiny random model and a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_reference(vocab_size=640, max_position_embeddings=2048, **TINY["gqa"], head_dim=16).save_pretrained(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return write_folder(folder, config, tokenizer__json=byte_level_json())


@pytest.fixture(scope="module")
def engine(served_folder):
    """The engine that is served."""
    model = Llama.from_pretrained(served_folder, device="cpu", dtype=torch.float32)
    return Engine(model, Tokenizer.from_pretrained(served_folder), compile="auto")


@pytest.fixture(scope="module")
def url(engine):
    """The address of the server, which runs in a thread."""
    from serve_helpers import NAME, serve  # skips the test if the client or the server is not installed

    server = serve.Uvicorn(serve.Server(engine, NAME), log_level="critical")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:  # it warms up first
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(url):
    """OpenAI's client of the server."""
    from serve_helpers import openai

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def complete(client):
    """`complete_with` the client."""
    from serve_helpers import complete_with

    return functools.partial(complete_with, client)


@pytest.fixture
def chat(client):
    """A function that answers a message."""
    from serve_helpers import NAME

    def chat(content="Hi", **options):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 6} | options)

    return chat


@pytest.fixture
def cancelled(engine, monkeypatch):
    """The requests that are cancelled; steps take time, so that a client can leave between them."""
    found, cancel = [], engine.cancel
    monkeypatch.setattr(engine, "cancel", lambda request: (found.append(request), cancel(request)))
    step = engine.scheduler.step

    def slow():
        ended = step()
        time.sleep(0.02)
        return ended

    monkeypatch.setattr(engine.scheduler, "step", slow)
    return found
