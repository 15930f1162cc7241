"""Models that change while an engine holds requests or pages: other weights, another dtype, inference mode."""

import pytest
import torch
from helpers import few
from request_helpers import NEW, new_engine, random_ids, random_model, submit_and_run, tokens_alone, tokens_of

from llama_flex import Engine, Sampling, masks
from llama_flex.layers import Linear


class Halved(torch.nn.Module):
    """A product that halves that of another module, whose very parameters it holds."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias) / 2


def test_weights_that_change_between_runs_are_seen():
    model, ids = random_model(), random_ids(300)
    engine = Engine(model, backend="dense", max_batch_size=2, max_slots=1024)
    changes = (
        lambda layer: layer.mlp.down.weight.mul_(1.5),
        lambda layer: setattr(layer.attention.qkv, "weight", torch.nn.Parameter(layer.attention.qkv.weight * 0.5)),
        lambda layer: setattr(layer.mlp, "down", Halved(layer.mlp.down)),
        lambda layer: layer.mlp.gate_up.register_forward_hook(lambda module, args, output: output / 2),
        lambda layer: layer.mlp.register_buffer("unused", torch.zeros(1)),
        lambda layer: layer.mlp.unused.add_(1),
        lambda layer: None,
    )
    for change in changes:
        request = engine.submit(ids, **NEW)
        engine.run()
        assert tokens_of(request) == tokens_alone(Engine(model, backend="dense"), ids, **NEW)
        with torch.no_grad():
            change(model.layers[0])


def test_forget_drops_pages_computed_before_a_write_that_torch_does_not_count():
    model, ids = random_model(), random_ids(300)
    engine = Engine(model, backend="dense", max_batch_size=2, max_slots=1024)
    before = submit_and_run(engine, ids, max_new_tokens=6)
    for layer in model.layers:
        layer.attention.qkv.weight.data.mul_(-0.5)
    expected = tokens_alone(Engine(model, backend="dense"), ids, **NEW)
    assert submit_and_run(engine, ids, max_new_tokens=6) != expected != before  # torch does not count such a change
    engine.forget()
    assert submit_and_run(engine, ids, max_new_tokens=6) == expected


@pytest.mark.parametrize("compile", few([False], [True]))
def test_a_model_of_another_dtype_is_followed(compile):
    model, prompts = random_model(), [random_ids(n) for n in (5, 140, 30)]
    engine = Engine(model, backend="dense", max_batch_size=2, max_length=256, compile=compile)

    def all_of(*prompts: list[int]) -> list[list[int]]:
        requests = [engine.submit(prompt, **NEW) for prompt in prompts]
        engine.run()
        return [tokens_of(request) for request in requests]

    def expected(prompts: list[list[int]]) -> list[list[int]]:
        return [c.tokens for c in Engine(model, backend="dense").generate(prompts, **NEW)]

    assert all_of(*prompts) == expected(prompts)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        for prompt in prompts[:2]:
            assert all_of(prompt) == expected([prompt])
        assert engine.scheduler.cache.layers[0][0].dtype == dtype


def test_a_dtype_that_changes_during_requests_loses_nothing():
    model = random_model()
    engine, window = Engine(model, backend="dense", max_batch_size=2, max_length=256), masks.sliding_window(9)
    options = {"max_new_tokens": 8, "stop_token_ids": ()}
    under_way = engine.submit(random_ids(140), mask=window, **options)
    for _ in range(4):
        engine.step()
    before = tokens_of(under_way)
    assert 0 < len(before) < 8
    model.to(torch.float64)
    later = engine.submit(random_ids(20), **options)
    engine.run()
    alone = Engine(model, backend="dense")
    assert tokens_of(under_way)[: len(before)] == before
    assert tokens_of(under_way) == tokens_alone(alone, random_ids(140), mask=window, **options)
    assert tokens_of(later) == tokens_alone(alone, random_ids(20), **options)


@pytest.mark.parametrize(
    ("backend", "compile"),
    [
        ("dense", False),
        pytest.param("flex", False, marks=pytest.mark.exhaustive),
        pytest.param("flex", True, marks=pytest.mark.exhaustive),
    ],
)
def test_inference_mode_may_begin_and_end_between_calls(backend, compile, request):
    like = request.getfixturevalue(backend)
    engine = new_engine(like, compile=compile, max_batch_size=2, max_slots=512)
    options = NEW | {"mask": masks.sliding_window(torch.tensor([40])), "sampling": Sampling(repetition_penalty=1.3)}
    with torch.inference_mode():
        first = engine.submit(random_ids(9), **options)
        engine.step()
    engine.run()
    second = engine.submit(random_ids(9), **options)
    with torch.inference_mode():
        engine.run()
    assert tokens_of(first) == tokens_of(second) == tokens_alone(like, random_ids(9), **options)


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        model = random_model()
    engine = Engine(model, max_batch_size=2, max_slots=512)
    assert len(submit_and_run(engine, [5, 6], max_new_tokens=3)) == 3
