"""Recorded operations of uncompiled steps: a replay is the step again, on the same memory."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

from llama_flex import Engine, Mask, Sampling, ScoreMod, masks
from llama_flex.engine import operations
from llama_flex.engine.stream import Stream


def test_a_replay_reads_and_writes_the_same_memory_and_returns_new_tensors():
    state, inputs, weight = torch.zeros(4), torch.ones(2, 4), torch.arange(16.0).view(4, 4)

    def step():
        rows = torch.arange(2)[:, None]
        x = inputs[rows, torch.arange(4)] @ weight.T
        state.add_(x.sum(0))
        low, high = x.split(2, dim=-1)
        return {"sum": torch.stack([low, high], dim=0).sum(0), "state": state}

    first, replay = operations.record(step)
    kept, before = first["sum"].clone(), state.clone()
    inputs.mul_(3)
    again = replay()
    torch.testing.assert_close(again["sum"], 3 * kept)
    assert again["state"] is state
    torch.testing.assert_close(state, 4 * before)
    torch.testing.assert_close(first["sum"], kept)
    weight.zero_()
    assert not replay()["sum"].any()


def test_arguments_in_lists_and_by_name_are_those_of_the_replay():
    x, indices, out = torch.arange(12.0).view(3, 4), torch.tensor([0, 2]), torch.zeros(2)

    def step():
        rows, columns = indices + 0, indices + 1
        torch.add(x[rows, columns], other=x[rows, rows], alpha=2, out=out)
        return torch.cat([out, out * 2])

    result, replay = operations.record(step)
    indices.copy_(torch.tensor([1, 2]))
    found = replay()
    torch.testing.assert_close(found, step())
    assert not torch.equal(found, result)


def test_what_repeats_is_computed_once_unless_something_writes_in_between():
    x, weight = torch.tensor([[2.0, 1.0, 3.0]]), torch.ones(3)

    def step():
        twice = x.argmax(-1) + 0, x.argmax(-1) + 0
        noise = torch.randn(1) + x[0, 0], torch.randn(1) + x[0, 0]
        before = weight.sum()
        weight.add_(1)
        written = x.clone(), x.clone()
        written[0].add_(before)
        return *twice, *noise, before, weight.sum(), *written, torch.arange(3) + 1

    _, replay = operations.record(step)
    x.copy_(torch.tensor([[4.0, 5.0, 1.0]]))
    with operations._Recorder() as again:
        first, second, a, b, before, after, changed, copied, counted = replay()
    assert [str(call[0]) for call in again.calls].count("aten.argmax.default") == 1
    assert first.item() == second.item() == 1
    first.add_(1)  # what is returned is the caller's
    assert second.item() == 1
    counted.add_(1)
    assert replay()[-1].tolist() == [1, 2, 3]
    assert a != b
    assert (before, after) == (6, 9)
    torch.testing.assert_close(changed, x + 6)
    torch.testing.assert_close(copied, x)


PROMPTS = [[5, 6, 7], [*range(9, 134)]]


def tokens(engine, prompts, **options):
    return [done.tokens for done in engine.generate(prompts, max_new_tokens=8, stop_token_ids=(), **options)]


@pytest.fixture
def replays(monkeypatch):
    """Count recordings and replays."""
    count, record = {"recorded": 0, "replayed": 0}, operations.record

    def counting(step):
        result, replay = record(step)
        count["recorded"] += 1

        def counted():
            count["replayed"] += 1
            return replay()

        return result, counted

    monkeypatch.setattr(operations, "record", counting)
    return count


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=5, repetition_penalty=1.2)]
)
def test_replayed_steps_give_the_tokens_of_uncompiled_ones(tiny_pair, replays, sampling):
    model, prompts = tiny_pair("gqa")[1], PROMPTS
    options = {"sampling": sampling, "mask": masks.sliding_window(100) | masks.sink(2)}
    expected = tokens(Engine(model, backend="dense"), prompts, **options)
    assert not replays["recorded"]
    assert tokens(Engine(model, compile="auto"), prompts, **options) == expected
    # The first step in a block of slots runs, the second one is recorded; the longer prompt enters a second block.
    assert replays == {"recorded": 2, "replayed": 3}


def test_a_step_recorded_for_other_slots_is_not_replayed(tiny_pair, monkeypatch):
    model, prompts = tiny_pair("gqa")[1], [[*range(3, 128)]]
    expected = tokens(Engine(model, backend="dense"), prompts)
    assert tokens(Engine(model, compile="auto"), prompts) == expected
    monkeypatch.setattr(Stream, "_key", lambda self: ("decode",))
    assert tokens(Engine(model, compile="auto"), prompts) != expected


def test_requests_that_come_and_go_get_the_tokens_they_get_alone(tiny_pair, replays):
    model, prompts = tiny_pair("gqa")[1], [[5, 6, 7], [*range(9, 139)], [40, 41]]
    engine, alone = Engine(model, compile="auto"), Engine(model, backend="dense")
    requests = [engine.submit(p, max_new_tokens=6 + 5 * n, stop_token_ids=()) for n, p in enumerate(prompts)]
    engine.run()
    for n, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        (done,) = alone.generate([prompt], max_new_tokens=6 + 5 * n, stop_token_ids=())
        assert request.completion.tokens == done.tokens
    assert replays["replayed"] > 5


def test_functions_of_users_run_in_every_step(tiny_pair, replays):
    model, calls = tiny_pair("gqa")[1], []

    def allowed(q, kv):
        calls.append(1)
        return kv.index <= q.index

    def scored(score, q, kv):
        calls.append(1)
        return score

    engine = Engine(model, compile="auto")
    of_users = ({"mask": Mask(allowed)}, {"mask": masks.causal() & Mask(allowed)}, {"score_mod": ScoreMod(scored)})
    for options in (*of_users, {"mask": Mask.from_mask_mod(lambda b, h, q, kv: bool(calls.append(1)) | (kv <= q))}):
        counts = []
        for _ in engine.stream([[5, 6, 7]], max_new_tokens=8, stop_token_ids=(), **options):
            counts.append(len(calls))
        assert all(b > a for a, b in itertools.pairwise(counts))
    assert not replays["recorded"]
    tokens(engine, [[5, 6, 7]], mask=masks.causal() & masks.sink(3))
    assert replays["recorded"]


@pytest.mark.parametrize("together", [False, True], ids=["stream", "submit"])
def test_modules_and_hooks_of_users_run_in_every_step(tiny_pair, replays, together):
    model, calls = copy.deepcopy(tiny_pair("gqa")[1]), []
    engine = Engine(model, compile="auto")

    def run() -> int:
        calls.clear()
        if together:
            engine.submit([5, 6, 7], max_new_tokens=6, stop_token_ids=())
            engine.run()
        else:
            tokens(engine, [[5, 6, 7]])
        return len(calls)

    run()
    assert replays["recorded"] == 1
    handle = model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert run() == (6 if together else 8)
    handle.remove()
    down = model.layers[1].mlp.down

    class Counted(torch.nn.Module):
        def forward(self, x):
            calls.append(float(x.sum()))
            return down(x)

    model.layers[1].mlp.down = Counted()
    assert run() == (6 if together else 8)
    assert replays["recorded"] == 1
    model.layers[1].mlp.down = down
    run()
    assert replays["recorded"] == 2


def test_a_stream_in_inference_mode_gets_the_same_tokens(tiny_pair, replays):
    """Check operations that return a view or a copy, such as `to`, which inference mode does not take apart."""
    model = tiny_pair("gqa")[1]
    expected = tokens(Engine(model, backend="dense"), PROMPTS)
    with torch.inference_mode():
        assert tokens(Engine(model, compile="auto"), PROMPTS) == expected
    assert replays["replayed"]


@pytest.mark.parametrize("rows", [3, 20])
def test_weights_that_are_replaced_between_steps_are_used(tiny_pair, rows):
    found = []
    for options in ({"compile": "auto"}, {"backend": "dense"}):
        model = copy.deepcopy(tiny_pair("gqa")[1])
        engine = Engine(model, max_batch_size=32, **options)
        requests = [engine.submit([5, 6 + n], max_new_tokens=12, stop_token_ids=()) for n in range(rows)]
        for _ in range(5):
            engine.step()
        for parameter in model.parameters():
            parameter.data = parameter.data * (0.5 if parameter.dim() == 2 else 1)
        engine.forget()
        for _ in range(3):
            engine.step()
        model.layers[0].mlp.forward = lambda x, hook=None: x
        engine.run()
        found.append([request.completion.tokens for request in requests])
    assert found[0] == found[1]


def test_steps_of_many_tokens_are_not_recorded(tiny_pair, replays):
    engine = Engine(tiny_pair("gqa")[1], compile="auto", prefill_tokens=64)
    engine.submit([*range(3, 203)] * 2, max_new_tokens=1, stop_token_ids=())
    engine.run()
    assert not replays["recorded"]


def test_a_recording_that_is_dropped_frees_its_tensors_at_once():
    def make():
        x = torch.ones(3)
        return operations.record(lambda: x + 1)[1], weakref.ref(x)

    replay, kept = make()
    gc.collect()
    gc.disable()
    try:
        assert kept() is not None
        del replay
        assert kept() is None
    finally:
        gc.enable()
