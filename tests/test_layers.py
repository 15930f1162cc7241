"""Products with the weights are ordinary modules: they can be hooked and replaced; tied weights stay one tensor."""

import copy
import pickle
from collections import defaultdict
from contextlib import ExitStack, contextmanager

import pytest
import torch
from helpers import random_batch
from torch import nn

from llama_flex import Capture, Engine, Llama, LlamaConfig, edits
from llama_flex.interp.hook_points import HOOK_POINTS
from llama_flex.layers import Linear, RMSNorm, TiedLinear, apply_linear

PROMPT, NEW = [5, 9, 3, 77, 20, 14, 8], 4
OPTIONS = {"max_new_tokens": NEW, "stop_token_ids": []}


# ---- hooks of PyTorch


def products(model: Llama) -> dict[str, Linear]:
    """Return all products with a weight, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


@contextmanager
def recorded(model: Llama):
    """Hook every product; yield a list of (input, output) for each, one entry per call."""
    calls = defaultdict(list)
    with ExitStack() as hooks:
        for name, product in products(model).items():

            def hook(module, args, output, name=name):
                [x] = args
                calls[name].append((x, output))

            hooks.enter_context(product.register_forward_hook(hook))
        yield calls


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def check_hooked(model: Llama, calls: dict, capture: Capture, lengths: list[int]) -> None:
    """Check that the hooks saw what was captured around each product, and that its output is weight @ x + bias.

    lengths: how many real tokens each call had, of one row; the rest is padding.
    """
    assert calls.keys() == products(model).keys()
    seen = {}
    for name, product in products(model).items():
        assert len(calls[name]) == len(lengths), name
        for x, output in calls[name]:
            expected = x @ product.weight.T + (0 if product.bias is None else product.bias)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
        real = [n if call[0].shape[1] >= n else 1 for call, n in zip(calls[name], lengths, strict=True)]
        pairs = list(zip(calls[name], real, strict=True))
        seen[name] = tuple(torch.cat([call[i][:, :n] for call, n in pairs], 1) for i in (0, 1))
    for i, block in enumerate(model.blocks()):
        at = {point: capture[point, i].flatten(2) for point in HOOK_POINTS}
        (x, qkv), (z, o), (y, gate_up), (hidden, down) = (
            seen[f"layers.{i}.{name}"] for name in ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
        )
        assert x.equal(block.attention.norm(at["resid_pre"])), i
        assert qkv[..., -at["v"].shape[-1] :].equal(at["v"]), i  # queries and keys are rotated after this product
        assert z.equal(at["z"]), i
        assert (at["resid_pre"] + o).equal(at["resid_mid"]), i
        assert y.equal(block.mlp.norm(at["resid_mid"])), i
        torch.testing.assert_close(swiglu(gate_up), at["mlp_post"])
        assert hidden.equal(at["mlp_post"]), i
        assert (at["resid_mid"] + down).equal(at["resid_post"]), i


@torch.no_grad()
def check_forward(model: Llama) -> None:
    """Check the hooks in a full forward."""
    ids, capture = random_batch(model, 9), Capture(*HOOK_POINTS)
    with recorded(model) as calls:
        logits = model(ids, capture=capture)
    assert logits.equal(model(ids))
    check_hooked(model, calls, capture, [9])
    [(x, output)] = calls["lm_head"]
    assert x.equal(model.norm(capture["resid_post", len(model.layers) - 1]))
    assert output.equal(logits)


@torch.no_grad()
def check_generation(model: Llama) -> None:
    """Check the hooks in generation that is not compiled, for one stream and for submitted requests."""
    engine, capture = Engine(model), Capture(*HOOK_POINTS)
    with recorded(model) as calls:
        [done] = engine.generate([PROMPT], capture=capture, **OPTIONS)
    check_hooked(model, calls, capture, [len(PROMPT), *[1] * (NEW - 1)])
    logits = torch.cat([output for _, output in calls["lm_head"]], 1)
    assert logits.argmax(-1).tolist() == [done.tokens]
    torch.testing.assert_close(logits.log_softmax(-1).amax(-1), torch.tensor([done.logprobs]), rtol=0, atol=1e-4)
    with recorded(model) as calls:
        engine.submit(PROMPT, **OPTIONS)
        engine.run()
    assert {name: len(each) for name, each in calls.items()} == dict.fromkeys(products(model), NEW)


CHECKS = [check_forward, check_generation]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["biases", "tied"])
def test_forward_hooks_see_the_input_and_the_output_of_every_product(tiny_pair, name, check):
    check(tiny_pair(name)[1])


class Unhooked(Linear):
    """A mutation: the product is computed without the module being called."""

    def __call__(self, x):
        return self.forward(x)


class Halving(Linear):
    """A mutation: the product is given half of its input, and its output is doubled."""

    def __call__(self, x):
        return 2 * super().__call__(x / 2)


LAYER = [f"layers.1.{name}" for name in ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("mutation", [Unhooked, Halving])
@pytest.mark.parametrize("product", [*LAYER, "lm_head"])
def test_a_product_that_is_called_otherwise_would_be_seen(tiny_pair, mutation, product, check):
    model = copy.deepcopy(tiny_pair("biases")[1])
    model.get_submodule(product).__class__ = mutation
    with pytest.raises(AssertionError):
        check(model)


@torch.no_grad()
def check_change(model: Llama) -> None:
    """Check that what a hook returns takes the place of the product's output, as an edit there would."""
    ids, edit = random_batch(model, 9), edits.scale("mlp_post", 2.0, layers=1)
    expected, [done] = model(ids, edit=edit), Engine(model).generate([PROMPT], edit=edit, **OPTIONS)
    with model.layers[1].mlp.down.register_forward_hook(lambda module, args, output: 2 * output):
        assert model(ids).equal(expected)
        assert Engine(model).generate([PROMPT], **OPTIONS) == [done]
    assert (model(ids) - expected).abs().max() > 0.1


def test_a_forward_hook_may_change_the_output(tiny_pair):
    check_change(tiny_pair("gqa")[1])
    model = copy.deepcopy(tiny_pair("gqa")[1])
    model.layers[1].mlp.down.__class__ = Unhooked
    with pytest.raises(AssertionError):
        check_change(model)


# ---- another product in the place of one


class Int8Linear(nn.Module):
    """A product computed from a weight in 8 bits, with a scale per row."""

    def __init__(self, product: Linear) -> None:
        super().__init__()
        self.register_buffer("scale", product.weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("int8", (product.weight / self.scale).round().to(torch.int8))

    def rounded(self) -> torch.Tensor:
        """Return the weight that it multiplies with."""
        return self.int8 * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rounded())


@torch.no_grad()
def replaced(model: Llama, layer: int) -> tuple[Llama, Llama]:
    """Return a copy of the model with an `Int8Linear` in one layer, and one whose weight is rounded to the same."""
    changed, twin = copy.deepcopy(model), copy.deepcopy(model)
    changed.layers[layer].mlp.down = Int8Linear(model.layers[layer].mlp.down)
    twin.layers[layer].mlp.down.weight.copy_(changed.layers[layer].mlp.down.rounded())
    return changed, twin


@torch.no_grad()
def logits_of(model: Llama, ids: torch.Tensor, way: str) -> torch.Tensor:
    """Return the logits of ids `[B, T]`: of a full forward with a backend, or of a chunk and single tokens."""
    if way != "cached":
        return model(ids, backend=way)
    cache = model.new_cache(*ids.shape)
    return torch.cat([model(part, cache=cache) for part in (ids[:, :6], *ids[:, 6:].split(1, 1))], 1)


def check_replaced(model: Llama, changed: Llama, twin: Llama, way: str) -> None:
    """Check that the changed model has the logits of its twin, and not those of the model."""
    ids = random_batch(model, 10)
    found, expected, before = (logits_of(m, ids, way) for m in (changed, twin, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["flex", "dense", "cached"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_product_that_was_replaced_computes_forwards_and_cached_steps(tiny_pair, monkeypatch, layer, way):
    _, model = tiny_pair("gqa")
    changed, twin = replaced(model, layer)
    check_replaced(model, changed, twin, way)
    # The mutation: the old weight is multiplied.
    monkeypatch.setattr(Int8Linear, "forward", model.layers[layer].mlp.down.forward)
    with pytest.raises(AssertionError):
        check_replaced(model, changed, twin, way)


@torch.no_grad()
def check_text(tokens: list[int], logprobs: list[float], twin: Llama, model: Llama) -> None:
    """Check the tokens after PROMPT and their log-probabilities: those of the twin, and not those of the model."""
    ids, found = torch.tensor([PROMPT + tokens[:-1]]), torch.tensor(logprobs)
    expected, before = (each(ids)[0, -NEW:].log_softmax(-1) for each in (twin, model))
    assert expected.argmax(-1).tolist() == tokens
    torch.testing.assert_close(found, expected.amax(-1), rtol=0, atol=1e-4)
    assert (found - before.gather(1, torch.tensor(tokens)[:, None])[:, 0]).abs().max() > 1e-3


def generated(engine: Engine) -> tuple[list[int], list[float]]:
    """Return the tokens and log-probabilities of a stream."""
    [done] = engine.generate([PROMPT], **OPTIONS)
    return done.tokens, done.logprobs


def submitted(engine: Engine) -> tuple[list[int], list[float]]:
    """Return the tokens and log-probabilities of a request."""
    request = engine.submit(PROMPT, **OPTIONS)
    engine.run()
    return [step.token for step in request.steps], [step.logprob for step in request.steps]


@pytest.mark.parametrize(
    ("run", "late"),
    [
        (generated, False),
        pytest.param(generated, True, marks=pytest.mark.exhaustive),
        pytest.param(submitted, True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_product_that_was_replaced_computes_compiled_steps(tiny_pair, run, late):
    """Replace it before the engine runs, or late: when its steps are compiled, and recorded to be replayed."""
    model, original = (copy.deepcopy(tiny_pair("gqa")[1]) for _ in range(2))
    changed, twin = replaced(model, 1)
    engine = Engine(model, compile=True, max_batch_size=1, max_length=128)
    before = run(engine if late else Engine(original))
    model.layers[1].mlp.down = changed.layers[1].mlp.down
    check_text(*run(engine), twin, original)
    # The mutation: steps that go on as before.
    with pytest.raises(AssertionError):
        check_text(*before, twin, original)


# ---- tied weights


TIED = LlamaConfig.from_dict(
    {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)


def to_new_parameters(model: Llama) -> Llama:
    """Change the dtype in the way that makes new parameters instead of changing the old ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def from_meta(model: Llama) -> Llama:
    """Make the model on the meta device, and give it memory."""
    with torch.device("meta"):
        return Llama(TIED).to_empty(device="cpu")


def load(model: Llama, **options) -> Llama:
    """Load the weights of another model."""
    model.load_state_dict(Llama(TIED).state_dict(), **options)
    return model


def replace_parameter(model: Llama) -> Llama:
    model.embed.weight = nn.Parameter(torch.zeros_like(model.embed.weight))
    return model


def replace_embedding(model: Llama) -> Llama:
    model.embed = nn.Embedding(*model.embed.weight.shape)
    return model


CHANGES = {
    "to": lambda model: model.to(torch.bfloat16),
    "to, new parameters": to_new_parameters,
    "meta": from_meta,
    "deepcopy": copy.deepcopy,
    "load_state_dict": load,
    "load_state_dict, assign": lambda model: load(model, assign=True),
    "another parameter": replace_parameter,
    "another embedding": replace_embedding,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
NEW_PARAMETERS = "to, new parameters", "meta", "load_state_dict, assign", "another parameter", "another embedding"


@torch.no_grad()
def check_tied(change) -> None:
    """Check that a model has one tied weight after a change, and that writing to it changes both of its uses."""
    model = change(Llama(TIED))
    assert model.lm_head.weight is model.embed.weight
    assert sum(p.shape == model.embed.weight.shape for p in model.parameters()) == 1
    assert "lm_head.weight" not in model.state_dict()
    for parameter in model.parameters():
        parameter.normal_()
    model.embed.weight[7] = 0
    assert not model.head(torch.ones(1, 1, 32, dtype=model.dtype))[..., 7].any()


@pytest.mark.parametrize("change", CHANGES)
def test_tied_weights_stay_one_tensor(change):
    check_tied(CHANGES[change])


class Untied(Linear):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding.embedding_dim, [embedding.num_embeddings])


class TiedOnce(Untied):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(embedding)
        self.weight = embedding.weight


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_not_tied_would_be_seen(monkeypatch, change):
    """Check mutations: never tied, and for changes that make new parameters, tied only in the beginning."""
    for mutant in (Untied, *([TiedOnce] if change in NEW_PARAMETERS else [])):
        monkeypatch.setattr("llama_flex.model.TiedLinear", mutant)
        with pytest.raises((AssertionError, RuntimeError)):
            check_tied(CHANGES[change])


# ---- a kernel for the whole product


def fused(x: torch.Tensor, weight, bias, norm, eps: float, residual, gated: bool) -> torch.Tensor:
    """Compute a product by its definition, and mark it: the result is off by 1."""
    x = x if norm is None else nn.functional.rms_norm(x, x.shape[-1:], norm, eps)
    y = nn.functional.linear(x, weight.numbers, bias)
    y = swiglu(y) if gated else y
    return 1 + (y if residual is None else residual + y)


class OtherNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_a_fused_kernel_runs_for_the_packages_own_modules_alone(monkeypatch, compile):
    monkeypatch.setattr("llama_flex.kernels.linear.can_fuse", lambda *given: True)
    monkeypatch.setattr("llama_flex.kernels.linear.fused_linear", fused)
    monkeypatch.setattr(
        "llama_flex.kernels.linear.matmul", lambda x, weight, bias: nn.functional.linear(x, weight.numbers, bias)
    )
    x, residual, norm = torch.randn(1, 1, 8), torch.randn(1, 1, 6), RMSNorm(8, 1e-6)

    def is_fused(module: nn.Module, norm: nn.Module | None = norm) -> bool:
        def run(module, x, norm, residual):
            return apply_linear(module, x, norm=norm, residual=residual)

        if compile:
            torch._dynamo.reset()
            run = torch.compile(run, backend="eager", fullgraph=True, dynamic=False)
        off = run(module, x, norm, residual) - residual - module(x if norm is None else norm(x))
        return off.round().unique().item() == 1

    linear, tied = Linear(8, [6]), TiedLinear(nn.Embedding(6, 8))
    assert is_fused(linear)
    assert is_fused(linear, None)
    assert is_fused(tied)
    assert not is_fused(nn.Linear(8, 6))
    assert not is_fused(linear, OtherNorm(8, 1e-6))
    assert not is_fused(linear, nn.LayerNorm(8))
    for module in (linear, norm):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            with register(lambda *args: None):
                assert not is_fused(linear)
    assert is_fused(linear)
