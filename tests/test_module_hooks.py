"""PyTorch's own hooks on modules: they run wherever steps are not compiled, and are refused in words elsewhere."""

import copy
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from helpers import few, random_batch, random_ids
from torch import nn

from llama_flex import Edit, Engine, Llama, edits
from llama_flex import layers as layers_file
from llama_flex.engine import graphs, model_runner
from llama_flex.kernels import cpu

IDS, NEW = [id % 250 for id in random_ids(9)], 4
PARTS = "attention", "attention.norm", "attention.qkv", "attention.o", "mlp", "mlp.norm", "mlp.gate_up", "mlp.down"
NAMES = ["embed", "rotary", "norm", "lm_head", *(f"layers.1{part and '.' + part}" for part in ("", *PARTS))]
QK_NORMS = ["layers.1.attention.q_norm", "layers.1.attention.k_norm"]
OPTIONS = {"max_new_tokens": NEW, "stop_token_ids": ()}


@pytest.fixture
def model(tiny_pair) -> Llama:
    """A tiny model to hook."""
    return copy.deepcopy(tiny_pair("gqa")[1])


def count_calls(model: Llama, names: list[str], run) -> tuple[Counter, Counter]:
    """Return how often hooks before and after modules are called in a run."""
    before, after = Counter(), Counter()
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: before.update([name])))
            hooks.enter_context(module.register_forward_hook(lambda *_, name=name: after.update([name])))
        run(model)
    return before, after


def forward(backend: str):
    return lambda model: model(random_batch(model, 9), backend=backend)


def chunk_and_steps(backend: str):
    def run(model: Llama) -> None:
        cache = model.new_cache(2, 20)
        for count in (9, 1, 1):
            model(random_batch(model, count), cache=cache, backend=backend)

    return run


def generated(**options):
    return lambda model: Engine(model, **options).generate([IDS], **OPTIONS)


def submitted(**options):
    def run(model: Llama) -> None:
        engine = Engine(model, max_batch_size=2, max_slots=512, **options)
        engine.submit(IDS, **OPTIONS)
        engine.run()

    return run


RUNS = {  # and how many steps there are
    "forward": (forward("flex"), 1),
    "forward, dense": (forward("dense"), 1),
    "cache": (chunk_and_steps("flex"), 3),
    "cache, dense": (chunk_and_steps("dense"), 3),
    "stream": (generated(), NEW),
    "stream, recorded": (generated(compile="auto"), NEW),
    "requests": (submitted(), NEW),
    "requests, recorded": (submitted(compile="auto"), NEW),
}


FIRST = {"cache, dense", "forward", "requests, recorded", "stream, recorded"}  # the quick ones


@torch.no_grad()
def check_calls(model: Llama, names: list[str], run: str) -> None:
    """Check that each hook, alone and together with all others, is called once a step, before and after."""
    function, steps = RUNS[run]
    for group in (names, *([name] for name in names)):
        before, after = count_calls(model, group, function)
        assert before == after == dict.fromkeys(group, steps), group


@pytest.mark.parametrize("run", few(sorted(FIRST), sorted(RUNS.keys() - FIRST)))
def test_hooks_of_every_module_are_called_once_a_step(model, run):
    check_calls(model, NAMES, run)


@pytest.mark.parametrize("run", few(["cache, dense"], ["stream, recorded", "requests"]))
def test_hooks_of_every_module_are_called_in_other_models(model, twins, tmp_path, run):
    qwen = copy.deepcopy(twins("Qwen3 0.6B")[1])
    check_calls(qwen, [*NAMES[-9:], *QK_NORMS], run)
    model.save_pretrained(tmp_path)
    for quantize in ("int8", "int4+int8"):
        check_calls(Llama.from_pretrained(tmp_path, device="cpu", quantize=quantize), NAMES, run)
    check_calls(model.bfloat16(), NAMES, run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("run", [run for run in RUNS if "recorded" not in run])
@pytest.mark.parametrize("quantize", [None, "int8", "int4+int8"])
def test_hooks_of_every_module_are_called_on_cuda(model, tmp_path, quantize, run):
    model.save_pretrained(tmp_path)
    check_calls(Llama.from_pretrained(tmp_path, device="cuda", quantize=quantize), NAMES, run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [True, "auto"])
@pytest.mark.parametrize("run", [generated, submitted])
def test_steps_that_will_be_compiled_on_cuda_refuse_hooks(model, run, compile):
    model = model.cuda()
    with (
        model.layers[1].mlp.register_forward_hook(lambda *_: None),
        pytest.raises(ValueError, match="compiled steps call no hooks"),
    ):
        run(compile=compile)(model)


@pytest.mark.parametrize(
    ("name", "run"),
    [("layers.1", "cache, dense"), ("layers.1.mlp.down", "stream, recorded"), ("layers.1.attention.norm", "requests")],
)
def test_a_kernel_that_bypassed_a_hook_would_be_noticed(model, monkeypatch, name, run):
    for file in (layers_file, model_runner):
        monkeypatch.setattr(file, "are_own", lambda *modules: True)
    with pytest.raises(AssertionError):
        check_calls(model, [name], run)


def test_the_model_s_own_hooks_are_called_in_forwards(model):
    calls, ids = [], random_batch(model, 5)
    with model.register_forward_hook(lambda module, args, logits: calls.append(1) or 2 * logits), torch.no_grad():
        doubled = model(ids)
    with torch.no_grad():
        assert doubled.equal(2 * model(ids))
    assert calls == [1]


# ---- what hooks return


@torch.no_grad()
def check_replacement(model: Llama, run) -> None:
    """Check that what hooks return takes the place of outputs and inputs, as edits there do."""
    cases = {
        ("layers.1.mlp.down", "pre"): edits.scale("mlp_post", -2.0, layers=1),
        ("layers.1.mlp.down", "post"): edits.scale("mlp_post", -2.0, layers=1),
        ("layers.1.attention.o", "pre"): edits.scale("z", -2.0, layers=1),
        ("layers.1", "post"): edits.scale("resid_post", -2.0, layers=1),
        ("layers.0", "pre"): edits.scale("resid_pre", -2.0, layers=0),
        ("layers.1.attention", "post"): edits.scale("resid_mid", -2.0, layers=1),
        ("layers.1.mlp", "post"): edits.scale("resid_post", -2.0, layers=1),
    }
    plain = run(model)
    for (name, kind), edit in cases.items():
        module, expected = model.get_submodule(name), run(model, edit=edit)
        if kind == "pre":
            handle = module.register_forward_pre_hook(lambda module, args: (-2 * args[0], *args[1:]))
        else:
            handle = module.register_forward_hook(lambda module, args, output: -2 * output)
        with handle:
            torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-3)
        assert (expected - plain).abs().max() > 1, name


def logits_of(model: Llama, edit: Edit | None = None) -> torch.Tensor:
    return model(random_batch(model, 9), edit=edit)


def steps_of(model: Llama, edit: Edit | None = None) -> torch.Tensor:
    cache, found = model.new_cache(1, 20), []
    for count in (5, 1, 1):
        ids = random_batch(model, count, 1)
        found.append(model(ids, cache=cache, backend="dense", edit=edit))
    return torch.cat(found, 1)


def tokens_of(**options):
    def run(model: Llama, edit: Edit | None = None) -> torch.Tensor:
        engine = Engine(model, max_batch_size=2, max_slots=512, **options)
        request = engine.submit(IDS, edit=edit, **OPTIONS)
        engine.run()
        return torch.tensor([engine.generate([IDS], edit=edit, **OPTIONS)[0].tokens, request.completion.tokens])

    return run


@pytest.mark.parametrize("run", few([logits_of, steps_of, tokens_of(compile="auto")], [tokens_of()]))
def test_what_a_hook_returns_takes_the_place_of_inputs_and_outputs(model, run):
    check_replacement(model, run)


def test_a_hook_gets_keyword_arguments_and_is_called_after_errors_if_it_asks(model):
    def fails(*_):
        raise KeyError("mine")

    called, down = [], model.layers[0].mlp.down
    with (
        down.register_forward_hook(lambda module, args, kwargs, output: called.append(kwargs), with_kwargs=True),
        down.register_forward_hook(lambda *_: called.append("always"), always_call=True),
        down.register_forward_pre_hook(lambda module, args, kwargs: called.append(len(args)), with_kwargs=True),
        torch.no_grad(),
    ):
        forward("dense")(model)
        assert called == [1, {}, "always"]
        with down.register_forward_pre_hook(fails, prepend=True), pytest.raises(KeyError, match="mine"):
            forward("dense")(model)
        assert called == [1, {}, "always", "always"]


# ---- backward hooks


@pytest.mark.parametrize("recompute", [False, True])
def test_full_backward_hooks_get_gradients_and_may_replace_them(model, recompute):
    ids, found = random_batch(model, 9), Counter()
    names = ["", *(name for name in NAMES if name not in ("embed", "rotary"))]  # of these no input has a gradient

    def note(name: str):
        def hook(module, grad_input, grad_output=None):
            for gradients in (grad_input, grad_output or ()):
                assert all(x is None or x.isfinite().all() for x in gradients)
            found[name] += 1

        return hook

    def gradient() -> torch.Tensor:
        model.requires_grad_().zero_grad()
        model(ids, backend="dense", recompute=recompute).logsumexp(-1).sum().backward()
        return model.layers[0].mlp.down.weight.grad.clone()

    expected = gradient()
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            if name:  # ids have no gradient, and torch calls that hook of the model late
                hooks.enter_context(module.register_full_backward_hook(note(f"{name} full")))
            hooks.enter_context(module.register_full_backward_pre_hook(note(f"{name} pre")))
        torch.testing.assert_close(gradient(), expected)
    assert set(found.values()) == {1}
    assert len(found) == 2 * len(names) - 1
    with model.layers[1].register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(None if x is None else 2 * x for x in grad_input)
    ):
        torch.testing.assert_close(gradient(), 2 * expected)


# ---- steps that cannot call them


@pytest.mark.parametrize("name", [*NAMES, ""])
@pytest.mark.parametrize("run", [generated, submitted])
def test_compiled_steps_refuse_hooks_in_words(model, monkeypatch, run, name):
    def mine(*_):
        return None

    monkeypatch.setattr(graphs.Graphs, "_compiled", lambda self, function: function)  # it would take seconds
    words = "forward hook .*mine, but " + ("compiled steps call no hooks; compile=False" if name else "generation runs")
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        with getattr(model.get_submodule(name), register)(mine), pytest.raises(ValueError, match=words) as caught:
            run(compile=True)(model)
        assert "\n" not in str(caught.value)
    run(compile=True)(model)


def test_compiled_steps_refuse_hooks_of_all_modules(model):
    with (
        nn.modules.module.register_module_forward_hook(lambda *_: None),
        pytest.raises(ValueError, match="compiled steps call no hooks"),
    ):
        generated(compile=True)(model)


@pytest.mark.parametrize("run", [generated, submitted])
def test_hooks_of_the_whole_model_are_refused_where_it_is_not_called(model, run):
    with model.register_forward_hook(lambda *_: None), pytest.raises(ValueError, match=r"such as model.layers\[0\]"):
        run()(model)


def test_a_hook_of_all_modules_ends_recorded_steps_of_requests(model):
    engine, calls = Engine(model, compile="auto", max_batch_size=2, max_slots=512), []

    def run() -> int:
        calls.clear()
        engine.submit(IDS, **OPTIONS)
        engine.run()
        return len(calls)

    assert run() == run() == 0
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__)):
        assert run() > 0
        assert Counter(calls)["Block"] == 2 * NEW
    assert run() == 0


def test_without_hooks_layers_are_one_kernel_as_before(model, monkeypatch):
    """Check that the looks for hooks leave the fast way alone."""
    if not cpu.load(torch.float32):
        pytest.skip("no C++ compiler")
    found, run_blocks = [], cpu.run_blocks
    monkeypatch.setattr(cpu, "run_blocks", lambda *given: found.append(run_blocks(*given)) or found[-1])
    with torch.no_grad():
        chunk_and_steps("dense")(model)
    assert found[-1] is not None
