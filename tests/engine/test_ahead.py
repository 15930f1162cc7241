"""Streams that begin uncompiled where "auto" compiles, and the takeover by steps that were compiled meanwhile."""

import contextlib
import copy
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from torch._inductor.exc import InductorError

from llama_flex import Engine, Mask, Sampling
from llama_flex.engine import model_runner
from llama_flex.engine.ahead import CompileAhead, end_thread
from llama_flex.engine.graphs import Graphs
from llama_flex.usercode.errors import CompileError

PROMPTS = [[5, 6, 7], [*range(9, 134)]]
RANDOM = Sampling(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2)

EARLY = """
import sys, torch
from llama_flex import Engine, Llama, LlamaConfig
from llama_flex.engine import model_runner
model_runner.COMPILES_BY_ITSELF["cpu"] = True
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 9000, **sizes}
engine = Engine(Llama(LlamaConfig.from_dict(config)).requires_grad_(False), compile="auto")
for n, _ in enumerate(engine.stream([[5, 6]], max_new_tokens=4000, stop_token_ids=())):
    if n == int(sys.argv[1]):
        break
assert any(thread.name.startswith("llama_flex") for thread in __import__("threading").enumerate())
print("done", flush=True)
if sys.argv[2] == "interrupted":
    raise KeyboardInterrupt
"""


@pytest.fixture
def steps(monkeypatch):
    """Let "auto" compile on a CPU as it does on a GPU, after this many steps."""
    monkeypatch.setitem(model_runner.COMPILES_BY_ITSELF, "cpu", True)
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 5)
    return 5


def tokens(engine, new, prompts=PROMPTS, **options):
    return [done.tokens for done in engine.generate(prompts, max_new_tokens=new, stop_token_ids=(), **options)]


SPLIT = Sampling(processors=[lambda ids, logits: logits.roll(len(ids))], frequency_penalty=1.0, top_logprobs=2)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), RANDOM, pytest.param(SPLIT, marks=pytest.mark.exhaustive)],
    ids=["greedy", "random", "split"],
)
def test_compiled_steps_take_over_between_two_tokens(tiny_pair, steps, sampling):
    model = tiny_pair("gqa")[1]
    engine, dense = Engine(model, compile="auto"), Engine(model, backend="dense")
    expected = tokens(dense, 12, sampling=sampling)
    assert tokens(engine, 12, sampling=sampling) == expected
    assert list(engine.runner.uncompiled.steps.values()) == [steps]
    (shape,) = engine.runner.shapes
    assert shape[:2] == (2, 1)  # decoding; prompts ran uncompiled
    count = engine.graphs.count
    assert f"{steps} steps not compiled, recorded, as were their prompts; attention backend 'dense'" in engine.explain()
    assert tokens(engine, 12, sampling=sampling) == expected
    assert engine.graphs.count == count
    assert engine.runner.uncompiled.steps.total() == steps


def test_a_short_text_compiles_nothing(tiny_pair, steps):
    engine = Engine(tiny_pair("gqa")[1], compile="auto")
    assert engine.compile
    tokens(engine, steps + 1)
    assert engine.graphs.count == 0
    assert not engine.runner.uncompiled.compiling
    tokens(engine, 2, [[5]])
    assert engine.graphs.count == 0  # another shape has steps of its own


def test_when_compiled_steps_take_over_does_not_depend_on_the_compiler(tiny_pair, steps, monkeypatch):
    finish, begun = CompileAhead.finish, []

    def slow(self):
        begun.append(self)
        finish(self)

    monkeypatch.setattr(CompileAhead, "finish", slow)
    engine = Engine(tiny_pair("gqa")[1], compile="auto")
    stream = engine.stream(PROMPTS, max_new_tokens=12, stop_token_ids=())
    for n, _ in enumerate(stream):
        # The first token is the prompts'; each step gives two.
        assert bool(begun) == (n >= 2 * (steps + 1))
    assert len(begun) == 1


def test_functions_of_users_and_long_prompts_are_compiled_at_once(tiny_pair, steps, monkeypatch):
    model = tiny_pair("gqa")[1]
    own = Mask(lambda q, kv: kv.index <= q.index, never_looks_ahead=True)
    engine = Engine(model, compile="auto")
    expected = tokens(Engine(model, backend="dense"), 3)
    assert tokens(engine, 3, mask=own) == expected
    assert engine.graphs.count
    monkeypatch.setattr(model_runner, "UNCOMPILED_PROMPTS", 100)
    engine = Engine(model, compile="auto")
    assert tokens(engine, 3) == expected
    assert engine.graphs.count
    assert not engine.runner.uncompiled.steps


def test_a_model_with_hooks_is_refused_before_anything_runs(tiny_pair, steps):
    """Compiled steps would take over in the end, and call no hooks."""
    model, calls = copy.deepcopy(tiny_pair("gqa")[1]), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, compile="auto")
    with pytest.raises(ValueError, match="compiled steps call no hooks; compile=False"):
        tokens(engine, 2)
    assert not calls
    assert not engine.runner.uncompiled.steps


def test_an_error_of_the_compiler_ends_the_stream_where_it_would_take_over(tiny_pair, steps, monkeypatch):
    def failing(self, function):
        def part(*_):
            raise InductorError(ValueError("a file is damaged"), None)

        return part

    monkeypatch.setattr(Graphs, "_compiled", failing)
    engine, given = Engine(tiny_pair("gqa")[1], compile="auto"), []
    with pytest.raises(CompileError, match="a file is damaged"):
        given.extend(engine.stream([[5, 6]], max_new_tokens=12, stop_token_ids=()))
    assert len(given) <= steps + 1
    assert not any(thread.name.startswith("llama_flex") for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_ended_holds_no_lock():
    def use_locks():
        log = logging.Logger("of this test")
        while True:
            log._cache.clear()  # so that the next line acquires the lock of `logging`
            log.isEnabledFor(logging.DEBUG)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(30):  # without care, every third one would keep the lock
            thread = threading.Thread(target=use_locks, daemon=True)
            thread.start()
            time.sleep(0.002)
            end_thread(thread)
            assert logging._lock.acquire(timeout=10)
            logging._lock.release()
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_waits_or_catches_the_exception_is_ended_too():
    def wait():
        while not threading.Event().wait(0.01):
            pass

    def catch():
        caught = False
        while not caught:
            try:
                time.sleep(0.001)
            except SystemExit:
                caught = True
        time.sleep(0.5)  # meanwhile it is alive

    for function in (wait, catch):
        thread = threading.Thread(target=function, daemon=True)
        thread.start()
        end_thread(thread)
        assert not thread.is_alive()
    end_thread(thread)  # has ended before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lock_in_use_is_released_by_the_thread_that_is_ended():
    lock = threading.RLock()

    @contextlib.contextmanager
    def held():
        with lock:
            yield

    def use():
        while True:
            with held():
                time.sleep(0.0001)

    for _ in range(30):
        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        time.sleep(0.002)
        end_thread(thread)
        assert lock.acquire(timeout=10)
        lock.release()


@pytest.mark.parametrize("way", ["done", "interrupted"])
def test_a_program_that_ends_while_a_compiler_runs_ends_cleanly(way, tmp_path):
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", EARLY, "3", way]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "done\n"
    assert (done.returncode == 0) == (way == "done"), done.stderr[-2000:]
    assert ("KeyboardInterrupt" in done.stderr) == (way == "interrupted")
    assert "terminate" not in done.stderr  # C++'s last words
