"""Compiled parts, steps that are replayed, products of one row, and what `explain` says of them."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import TINY
from torch._inductor.exc import InductorError, LoweringException
from torch.torch_version import TorchVersion

from llama_flex import Engine, masks, scores
from llama_flex.engine.graphs import Graphs
from llama_flex.layers import RMSNorm, gated, linear
from llama_flex.usercode.errors import CompileError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (509, 96), (96, 131), (1536, 576)])
@torch.no_grad()
def test_products_of_one_row_are_no_further_from_float64_than_torchs(n, k, dtype):
    draws = torch.Generator().manual_seed(0)
    x, weight, bias, residual, scale = (
        torch.randn(*shape, generator=draws).to(dtype) for shape in ((1, 1, k), (2 * n, k), (2 * n,), (1, 1, n), (k,))
    )
    norm = RMSNorm(k, 1e-5).to(dtype)
    norm.weight.copy_(scale)

    def products(x, weight, bias, residual):
        half, half_bias = weight[:n], bias[:n]
        return (
            linear(x, half),
            linear(x, half, half_bias, norm=norm, residual=residual),
            linear(x, half, residual=residual),
            gated(x, weight, bias, norm=norm),
            gated(x, weight, norm=norm),
        )

    found, plain = Graphs().of()("products", products, x, weight, bias, residual), products(x, weight, bias, residual)
    norm = copy.deepcopy(norm).double()
    truth = products(*(t.double() for t in (x, weight, bias, residual)))
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, dtype)
        error, their_error = (ours - exact).abs(), (theirs - exact).abs()
        # Rounding once, and summing k terms in another order.
        summed = torch.promote_types(dtype, torch.float32)
        allowed = 2 * torch.finfo(dtype).eps + k * torch.finfo(summed).eps
        assert error.max() <= 1.25 * their_error.max() + allowed * exact.abs().max()


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


def test_what_torch_does_not_compile_is_an_error_and_never_runs_eagerly():
    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    run = Graphs().of()
    said = (
        r"^torch cannot compile: .*graph_break.* in line \d+ of test_compiling.py.* uses what it cannot trace; .*off$"
    )
    with pytest.raises(CompileError, match=said):
        run("breaks", breaks, torch.ones(3))
    with torch._dynamo.config.patch(recompile_limit=1):
        run("double", double, torch.ones(3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run("double", double, torch.ones(4))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match=r"^torch cannot compile: File exists, in .*/file or the .*; make room") as e:
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
            "RuntimeError: no code; a mask, score function or edit uses what it has no code for; or do not compile",
        ),
        (
            RuntimeError("unbacked_bindings"),
            "depends on the values of a tensor, as by `if`, `.item()`, `.tolist()` or ",
        ),
        (RuntimeError("Pending unbacked symbols {u2}"), "`nonzero`: use torch.where, or a table that is made before; "),
        (KeyError("x"), "a mask or score function may use what it cannot, or a file in FOLDER is damaged"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_hinders_the_compiler_is_told_apart(monkeypatch, error, said):
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
    with pytest.raises(CompileError, match=f"^torch cannot compile: .* in line .* of test_compiling.py; .*{read}"):
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
    """As TORCHDYNAMO_DISABLE=1 does, to look for the cause of something: nothing is recorded then."""
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


def test_explain_says_what_ran(tiny_pair):
    _, model = tiny_pair("gqa")
    engine, prompt = Engine(model, compile=True), list(range(3, 203))
    with pytest.raises(ValueError, match="nothing has run"):
        engine.explain()
    mask, score_mod = [masks.sliding_window(20), masks.causal()], [None, scores.softcap(5.0)]
    engine.generate([prompt], max_new_tokens=5, stop_token_ids=(), mask=mask, score_mod=score_mod)
    lines = engine.explain().splitlines()
    assert lines[0] == "float32 on cpu; float32 products at precision 'highest'"
    assert lines[1] == f"2 steps compiled in {engine.graphs.count} graphs, 0 of them again"
    assert lines[2:4] == ["  1 x 1 tokens against 1024 slots", "  1 x 128 tokens against 1024 slots"]
    assert "1 layers, mask sliding_window(20)" in lines
    assert "1 layers, mask causal(), scores softcap(5.0)" in lines
    # The last token fed has index 203: a window of 20 ends in the second block, and causal sees the first as a whole.
    assert [line for line in lines if "visits" in line] == [
        "  the last query visits 1 of 9 blocks of 128 slots, 0 unmasked",
        "  the last query visits 2 of 9 blocks of 128 slots, 1 unmasked",
    ]
    assert lines[-1].startswith(f"a step of 1 rows reads {bytes_per_step(model, [204]) / 1e9:.3f} GB")


@pytest.mark.parametrize("name", TINY)
def test_compiled_decoding_gives_the_eager_tokens_for_every_kind_of_model(tiny_pair, name):
    """One row is where products have code of their own: biases, tied embeddings, odd vocabularies."""
    _, model = tiny_pair(name)
    prompt, options = list(range(3, 30)), {"max_new_tokens": 12, "stop_token_ids": ()}
    (found,) = Engine(model, compile=True).generate([prompt], **options)
    ids = torch.tensor([prompt + found.tokens])
    predicted = model(ids, backend="dense")[0, len(prompt) - 1 : -1]
    assert found.tokens == predicted.argmax(-1).tolist()
    logprobs = predicted.log_softmax(-1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), logprobs, atol=2e-5, rtol=2e-5)
