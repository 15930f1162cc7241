"""Compiled parts of steps: recorded and replayed, and what is said where torch does not compile."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import TINY, few, random_ids
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor.exc import InductorError, LoweringException
from torch.torch_version import TorchVersion

from llama_flex import Engine
from llama_flex.engine import graphs
from llama_flex.engine.graphs import Graphs
from llama_flex.usercode.errors import CompileError


def double(x):
    return 2 * x


def grow(x, state):
    state.add_(x.sum())


@torch.no_grad()
def test_a_recorded_step_runs_again_on_the_same_memory():
    graphs, x, state = Graphs(), torch.ones(3), torch.zeros(1)
    run = graphs.of("key")

    def step():
        y = x
        for _ in range(3):
            y = run("double", double, y)
        run("grow", grow, y, state)

    step()
    _, replay = graphs.record(step, x.device)
    assert state.item() == 2 * 24
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay()
    assert state.item() == 2 * 24 + 48
    replay()
    assert state.item() == 2 * 24 + 2 * 48
    step()  # and it can still be run as it is
    assert state.item() == 2 * 24 + 3 * 48
    assert graphs.count == len(graphs.parts) == 2
    assert graphs.seconds > 0


class Scaled(torch.nn.Module):
    """A module that multiplies the output of another by a number."""

    def __init__(self, inner: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.inner(x)


@pytest.mark.exhaustive
def test_modules_of_any_structure_have_compiled_parts_of_their_own(tiny_pair, monkeypatch):
    """Try more than torch's limit of recompilations, and that it is what stops one who does not tell them apart."""
    model, ids = copy.deepcopy(tiny_pair("gqa")[1]), random_ids(20)
    options, down = {"max_new_tokens": 3, "stop_token_ids": ()}, model.layers[0].mlp.down

    def run(engine: Engine, factors: list[float]) -> None:
        for factor in factors:
            model.layers[0].mlp.down = Scaled(down, factor)
            (expected,) = Engine(model, backend="dense").generate([ids], **options)
            assert engine.generate([ids], **options)[0].tokens == expected.tokens

    engine = Engine(model, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(engine, [0.1 * n for n in range(10)])
    assert engine.graphs.count == len(engine.graphs.parts)
    monkeypatch.setattr(graphs, "structure", lambda module: type(module))
    with pytest.raises(FailOnRecompileLimitHit):
        run(Engine(model, compile=True), [0.1 * n for n in range(10)])


@torch.no_grad()
def test_a_step_that_fails_while_it_is_recorded_leaves_nothing_behind():
    graphs, x = Graphs(), torch.ones(3)

    def fails():
        graphs.of()("double", double, x)
        raise KeyboardInterrupt

    graphs.of()("double", double, x)
    with pytest.raises(KeyboardInterrupt):
        graphs.record(fails, x.device)
    assert graphs._recording.calls is None
    assert graphs.of()("double", double, x).tolist() == [2, 2, 2]


def test_a_part_that_does_not_compile_is_an_error_and_never_runs_eagerly():
    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    run = Graphs().of()
    message = (
        r"^torch cannot compile: .*graph_break.* in line \d+ of test_graphs.py.* operation that it cannot trace; .*off$"
    )
    with pytest.raises(CompileError, match=message):
        run("breaks", breaks, torch.ones(3))
    with torch._dynamo.config.patch(recompile_limit=1):
        run("double", double, torch.ones(3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run("double", double, torch.ones(4))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CompileError, match=r"^torch cannot compile: File exists, in .*/file or the .*; free some space"
    ) as e:
        Graphs().of()("third", lambda x: x / 3, torch.ones(3))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device"),
            "No space left on device, in FOLDER or the folder for temporary files; ",
        ),
        (RuntimeError("Failed to import FOLDER/x.py\nSyntaxError"), "x.py; a file in FOLDER is damaged: delete that "),
        (
            ImportError("FOLDER/x.so: file too short"),
            "file too short; a file in FOLDER is damaged: delete that folder; ",
        ),
        (
            LoweringException(RuntimeError("no code. Please file a bug"), "dot", [], {}),
            "a mask, score function or edit uses an operation that it has no code for; or do not compile",
        ),
        (
            RuntimeError("unbacked_bindings"),
            "depends on the values of a tensor, as by `if`, `.item()`, `.tolist()` or ",
        ),
        (RuntimeError("Pending unbacked symbols {u2}"), "`nonzero`: use torch.where, or a table made beforehand; "),
        (KeyError("x"), "a mask or score function may use an unsupported operation, or a file in FOLDER is damaged"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_causes_of_compiler_failures_are_told_apart(monkeypatch, error, said):
    def part(_):
        raise InductorError(error, None)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "FOLDER")
    monkeypatch.setattr(Graphs, "_compiled", lambda self, function: part)
    with pytest.raises(CompileError, match=f"^torch cannot compile: .*{re.escape(said)}") as caught:
        Graphs().of()("double", double, torch.ones(3))
    assert "\n" not in str(caught.value)


def test_a_value_that_a_function_reads_is_told_where_it_is_compiled():
    table = torch.arange(3)
    read = "depends on the values of a tensor, .*: use torch.where, or a table"
    with pytest.raises(CompileError, match=f"^torch cannot compile: .* in line .* of test_graphs.py; .*{read}"):
        Graphs().of()("branches", lambda x: x if table[1] > 0 else 2 * x, torch.ones(3))


@torch.no_grad()
def test_a_torch_that_compiles_wrongly_for_a_cpu_is_refused(tiny_pair, monkeypatch):
    _, model = tiny_pair("gqa")
    engine = Engine(model, compile=True)
    for version in ("2.13.0+cpu", "2.14.0"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        engine.compile = True
    for version in ("2.11.0+cu130", "2.12.1"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        for ask in (lambda: Engine(model, compile=True), lambda: setattr(engine, "compile", True)):
            with pytest.raises(ValueError, match=r"2\.1[12].*--compile off"):
                ask()
        engine.compile = False
        Engine(model)


def test_switching_torch_compile_off_changes_no_result(tiny_pair):
    """Nothing is recorded then. TORCHDYNAMO_DISABLE=1, which helps to find the cause of an error, does the same."""
    _, model = tiny_pair("gqa")
    options = {"max_new_tokens": 6, "stop_token_ids": ()}
    expected = Engine(model).generate([[5, 6, 7]], **options)
    with torch.compiler.set_stance("force_eager"):
        found = Engine(model, compile=True).generate([[5, 6, 7]], **options)
    assert found[0].tokens == expected[0].tokens


def test_threads_record_apart(tiny_pair):
    _, model = tiny_pair("gqa")
    engine, prompts = Engine(model, compile=True), [[5 + n, 6, 7] for n in range(12)]
    options = {"max_new_tokens": 12, "stop_token_ids": ()}
    expected = [engine.generate([prompt], **options)[0].tokens for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: engine.generate([prompt], **options)[0].tokens, prompts))
    assert found == expected


@pytest.mark.parametrize("name", few(["gqa"], [name for name in TINY if name != "gqa"]))
def test_compiled_decoding_gives_the_eager_tokens_for_every_kind_of_model(tiny_pair, name):
    """Check steps of one row, whose products have code of their own, with biases, tied embeddings and odd sizes."""
    _, model = tiny_pair(name)
    prompt, options = list(range(3, 30)), {"max_new_tokens": 12, "stop_token_ids": ()}
    (found,) = Engine(model, compile=True).generate([prompt], **options)
    ids = torch.tensor([prompt + found.tokens])
    predicted = model(ids, backend="dense")[0, len(prompt) - 1 : -1]
    assert found.tokens == predicted.argmax(-1).tolist()
    logprobs = predicted.log_softmax(-1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), logprobs, atol=2e-5, rtol=2e-5)
