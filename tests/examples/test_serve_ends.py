"""Clients that leave the server example, errors on the way, its warm-up and its end."""

import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from serve_helpers import NAME, PROMPTS, complete_with, expected, is_free, openai, serve, wait_until

from llama_flex import Engine, Llama, Sampling, Tokenizer
from llama_flex.model import run_eager


@pytest.mark.parametrize("reads", [0, 3])
def test_a_client_that_leaves_a_stream_frees_its_pages(engine, complete, cancelled, reads):
    stream = complete(PROMPTS, n=2, max_tokens=1000, stream=True)
    for _ in range(reads):
        next(stream)
    wait_until(lambda: engine.scheduler.num_running)
    stream.close()
    wait_until(lambda: cancelled and is_free(engine))
    assert [request.finish_reason for request in cancelled] == ["cancelled"] * 8
    assert max(len(request.steps) for request in cancelled) < 1000


def test_a_client_that_leaves_before_its_answer_frees_its_pages(engine, complete, cancelled):
    with pytest.raises(openai.APITimeoutError):
        complete(PROMPTS, n=2, max_tokens=1000, timeout=0.3)
    wait_until(lambda: cancelled and is_free(engine))
    assert [request.finish_reason for request in cancelled] == ["cancelled"] * 8
    assert max(len(request.steps) for request in cancelled) < 1000


def test_a_client_that_leaves_does_not_disturb_the_others(engine, complete, cancelled):
    staying = complete(PROMPTS[1], max_tokens=20, stream=True)
    first = next(staying).choices[0].text
    leaving = complete(max_tokens=1000, stream=True)
    next(leaving)
    leaving.close()
    assert first + "".join(chunk.choices[0].text for chunk in staying) == expected(engine, PROMPTS[1], new=20).text
    wait_until(lambda: is_free(engine))
    assert len(cancelled) == 1


def test_an_error_ends_a_stream_with_an_event_and_an_answer_with_500(engine, complete, monkeypatch):
    step, count = engine.scheduler.step, 0

    def failing():
        nonlocal count
        count += 1
        if count % 4 == 3:
            raise RuntimeError("out of memory, say")
        return step()

    monkeypatch.setattr(engine.scheduler, "step", failing)
    texts = []
    with pytest.raises(openai.APIError, match="out of memory, say") as caught:
        texts.extend(chunk.choices[0].text for chunk in complete(max_tokens=20, stream=True))
    assert texts
    assert caught.value.type == "server_error"
    with pytest.raises(openai.InternalServerError, match="out of memory, say"):
        complete(max_tokens=20)
    monkeypatch.undo()
    wait_until(lambda: is_free(engine) or engine.step() is None)
    assert complete().choices[0].text == expected(engine, PROMPTS[0]).text


def test_logits_that_are_not_finite_are_the_servers_error(engine, complete):
    weight = engine.model.norm.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
            complete()
        with pytest.raises(openai.APIError, match="NaN or infinite"):
            list(complete(stream=True))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert complete().choices[0].text == expected(engine, PROMPTS[0]).text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_nothing_is_compiled_after_the_warm_up_and_who_leaves_frees_pages(served_folder):
    model, sizes = Llama.from_pretrained(served_folder, device="cuda"), {"max_batch_size": 2, "max_length": 256}
    engine = Engine(model, Tokenizer.from_pretrained(served_folder), compile="auto", prefill_tokens=64, **sizes)
    serve.warm_up(engine)
    shapes, server = set(engine.runner.shapes), serve.Server(engine, NAME)
    fields = {"prompt": PROMPTS[0], "max_tokens": 100, "n": 2}
    answered = serve.Call(server, fields, False)
    engine.run()
    assert all(request.finish_reason in ("stop", "length") for request in answered.requests)
    left = serve.Call(server, {**fields, "n": 1}, False)
    for _ in range(3):
        engine.step()
    left.leave()
    assert left.requests[0].finish_reason == "cancelled"
    assert is_free(engine)
    assert engine.runner.shapes == shapes


def test_nothing_is_left_to_compile_after_the_warm_up(engine, monkeypatch):
    sizes = {"max_batch_size": 9, "max_length": 256, "prefill_tokens": 128}
    warm = Engine(engine.model, engine.tokenizer, compile=True, **sizes)
    keys = set()
    # Compiling all of it takes minutes; whatever would be compiled is asked for here.
    monkeypatch.setattr(warm.runner, "run_for", lambda *key: keys.add(key) or run_eager)
    monkeypatch.setattr(warm.runner, "replays", lambda *_: False)
    serve.warm_up(warm)
    compiled = set(keys)
    assert len(warm.runner.shapes) == 5  # prompts of 64 and 128 tokens; 1, 8 and 9 rows
    for count in (1, 12):
        for n in range(count):
            sampling = Sampling(temperature=n % 2, seed=n)
            warm.submit([5 + n] * (1 + 20 * n), max_new_tokens=4 + n, sampling=sampling)
        warm.run()
    assert keys == compiled
    warm.submit([5], max_new_tokens=4, sampling=Sampling(temperature=1, top_p=0.5))
    warm.run()
    assert keys > compiled


@pytest.fixture
def command(served_folder):
    """The server as a command, once it is ready: its process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from examples import serve; serve.GRACE = 1; serve.main()"  # 1 second: calls end before they are answered
    arguments = [sys.executable, "-c", code, "--model", str(served_folder), "--port", str(port)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "running on" in line:
            break
    yield process, f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_command_and_what_it_answers(command, name):
    process, url = command
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert complete_with(client, max_tokens=4).usage.completion_tokens == 4
        streams = [complete_with(client, max_tokens=2000, stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
        process.send_signal(getattr(signal, name))
        assert process.wait(15) in (0, -getattr(signal, name))
        for stream in streams:
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
    log = process.stderr.read()
    assert "Finished server process" in log
    assert "Traceback" not in log
