"""Requests whose numbers become NaN: they end with an error, and no other request changes for it."""

import pytest
import torch
from helpers import few
from request_helpers import NEW, random_ids, random_model, tokens_alone, tokens_of

from llama_flex import Engine, Llama
from llama_flex.engine.request import Request


def model_with_nan() -> Llama:
    """Make the random model with NaN in the embedding of token 159."""
    model = random_model()
    model.embed.weight[159] = torch.nan
    return model


@pytest.mark.parametrize(
    ("backend", "compile"),
    [
        ("dense", False),
        pytest.param("flex", False, marks=pytest.mark.exhaustive),
        pytest.param("flex", True, marks=pytest.mark.exhaustive),
    ],
)
def test_numbers_that_are_none_stay_in_their_request(backend, compile):
    """Check that what a request leaves in pages, and what padding leaves, spoils no product of other requests."""
    model = model_with_nan()
    ids = [id % 159 for id in random_ids(300)]
    engine = Engine(model, backend=backend, compile=compile, max_batch_size=3, max_slots=5 * 128, prefill_tokens=64)

    def check(*requests: Request) -> None:
        engine.run()
        for request in requests:
            assert tokens_of(request) == tokens_alone(
                Engine(model, backend=backend), request.ensemble.prompts[0].ids, **NEW
            )

    short = engine.submit(ids[40:50], **NEW)
    bad = engine.submit([*ids[:100], 159, *ids[101:250]], **NEW)
    engine.step()  # of `bad` 54 tokens, and with 159 those after them
    engine.step()
    assert any(kv.k.isnan().any() for kv in engine.scheduler.cache.layers)
    check(short, engine.submit(ids[:50], **NEW))  # with a copy of the page that also has 159
    assert (tokens_of(bad), bad.finish_reason) == ([], "error")
    check(engine.submit(ids[::-1], **NEW))  # in pages that it had
    # The first tokens of this one come in one step with 159. They do not see it, and are NaN all the same.
    bad = engine.submit([*ids[200:240], 159, 5], **NEW)
    engine.run()
    assert bad.finish_reason == "error"
    check(engine.submit(ids[200:240], **NEW))


@pytest.mark.parametrize("bad", few([0, 1], [2]))
@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_shares_pages_with_a_nan_one_gets_its_tokens(ahead, bad, request):
    """Uncompiled attention spreads the NaN to earlier tokens of the step, whose pages others take in that very step."""
    if ahead:
        request.getfixturevalue("read_later")
    model = model_with_nan()
    ids = [id % 159 for id in random_ids(150)]
    engine = Engine(model, max_batch_size=3)
    engine.scheduler._ahead = ahead
    prompts = [[*ids, 159] if n == bad else [*ids, n] for n in range(3)]
    requests = [engine.submit(prompt, **NEW) for prompt in prompts]
    engine.run()
    for n, (done, prompt) in enumerate(zip(requests, prompts, strict=True)):
        if n == bad:
            assert (tokens_of(done), done.finish_reason) == ([], "error")
        else:
            assert tokens_of(done) == tokens_alone(Engine(model), prompt, **NEW)
    assert engine.scheduler.block_manager.available == engine.scheduler.block_manager.num_pages
    assert len(engine.scheduler._free_batch_slots) == 3


@pytest.mark.usefixtures("read_later")
def test_a_nan_is_seen_though_its_request_is_cancelled_before_it_is_read():
    model = model_with_nan()
    ids = [id % 159 for id in random_ids(40)]
    engine = Engine(model, backend="dense", max_batch_size=2, max_slots=5 * 128)
    engine.scheduler._ahead = True
    bad = engine.submit([*ids, 159, 5], **NEW)
    engine.step()
    engine.cancel(bad)
    engine.step()
    request = engine.submit(ids, **NEW)
    engine.run()
    assert tokens_of(request) == tokens_alone(Engine(model, backend="dense"), ids, **NEW)
