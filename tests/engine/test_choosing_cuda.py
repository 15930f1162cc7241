"""Choosing tokens on a CUDA device, where steps are recorded and tokens are read a step later."""

import copy

import pytest
import torch
from choosing_helpers import SAMPLINGS, STOP, in_turn, letters_tokenizer, requests
from helpers import tokens_without_waiting
from request_helpers import random_ids, random_model

from llama_flex import Engine, Sampling, edits
from llama_flex.engine import model_runner
from llama_flex.masks.layout import BLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Engine, list]:
    """An engine on the CPU, and what each request gives alone there."""
    engine = Engine(random_model(), letters_tokenizer(tmp_path_factory.mktemp("letters")), backend="dense")
    return engine, [engine.generate([prompt], **options)[0] for prompt, options in requests()]


def on_cuda(engine: Engine, **options) -> Engine:
    return Engine(copy.deepcopy(engine.model).cuda(), engine.tokenizer, **options)


def assert_same(found, expected) -> None:
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert [len(most) for most in found.top_logprobs] == [len(most) for most in expected.top_logprobs]
    for ours, theirs in zip(found.top_logprobs, expected.top_logprobs, strict=True):
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("pages", [3, 60])
def test_submitted_together_each_gives_what_it_gives_alone_on_the_cpu(alone, compile, pages):
    engine = on_cuda(alone[0], compile=compile, max_batch_size=8, max_slots=pages * BLOCK)
    for _ in range(2):  # recorded, then replayed
        submitted = [engine.submit(prompt, **options) for prompt, options in requests()]
        long = engine.submit(random_ids(9), max_new_tokens=60, stop_token_ids=())  # which others wait for, or not
        engine.run()
        for request, expected in zip(submitted, alone[1], strict=True):
            assert request.error is None
            assert_same(request.completion, expected)
        assert len(long.steps) == 60


@pytest.mark.parametrize("compile", [False, True, "auto"])
def test_in_one_stream_each_gives_what_it_gives_alone_on_the_cpu(alone, compile, monkeypatch):
    """With "auto", compiled steps take over after five tokens."""
    monkeypatch.setattr(model_runner, "UNCOMPILED_STEPS", 5)
    engine = on_cuda(alone[0], compile=compile)
    for names in ([*SAMPLINGS], ["plain", "late"], ["functions", "grammar"]):
        asked = [
            (p, o, done) for (p, o), done, name in zip(requests(), alone[1], SAMPLINGS, strict=False) if name in names
        ]
        found = engine.generate(
            [prompt for prompt, _, _ in asked],
            sampling=[options["sampling"] for _, options, _ in asked],
            max_new_tokens=14,
            stop_token_ids=[STOP],
        )
        for done, (_, _, expected) in zip(found, asked, strict=True):
            assert_same(done, expected)


def test_parameters_that_need_no_host_never_wait_for_the_device(alone):
    """Run steps, recorded and replayed, where torch refuses to synchronise."""
    engine = on_cuda(alone[0], compile=True, max_batch_size=8, max_slots=32 * BLOCK)
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
    random = {"temperature": 0.8, "typical_p": 0.9, "seed": 1, "top_logprobs": 3}
    sampling = Sampling(logit_bias={7: 2.0}, banned_tokens=[9], min_new_tokens=5, **penalties, **random)
    options = {"sampling": sampling, "max_new_tokens": 30, "stop_token_ids": [STOP]}
    tokens = tokens_without_waiting(engine, lambda: [engine.submit(random_ids(n), **options) for n in (9, 140, 300)])
    assert tokens[0] == tokens[1] == tokens[2]


def test_grammars_and_ngrams_never_wait_for_the_device(alone):
    """Masks are computed and sent while the device works on the next forward."""
    engine = on_cuda(alone[0], compile=True, max_batch_size=8, max_slots=32 * BLOCK)
    each = ("grammar", "grammar and more", "ngrams", "plain")

    def submit() -> list:
        return [
            engine.submit(random_ids(9 + n), sampling=SAMPLINGS[name], max_new_tokens=14, stop_token_ids=[STOP])
            for n, name in enumerate(each)
        ]

    tokens = tokens_without_waiting(engine, submit)
    assert tokens[0] == tokens[1] == tokens[2]
    expected = [
        alone[0].generate([random_ids(9 + n)], sampling=SAMPLINGS[name], max_new_tokens=14, stop_token_ids=[STOP])[0]
        for n, name in enumerate(each)
    ]
    assert tokens[0] == [done.tokens for done in expected]


@pytest.mark.parametrize("way", ["submitted", "submitted alone", "streamed"])
def test_on_cuda_the_next_forward_is_enqueued_before_a_token_is_delivered_and_the_draw_after_that(
    alone, way, monkeypatch
):
    engine, events, prompt = on_cuda(alone[0]), [], random_ids(9)
    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda *given, **more: events.append("forward") or step(*given, **more))

    def note(ids, logits):
        events.append(("draw", ids[9:]))
        return logits.roll(1)

    options = {"sampling": Sampling(processors=[note]), "max_new_tokens": 3, "stop_token_ids": ()}
    if way == "streamed":
        for each in engine.stream([prompt], **options):
            events.append(("token", each.token))
    else:
        edit = edits.scale("z", 1.0) if way == "submitted alone" else None
        engine.submit(prompt, **options, edit=edit, callback=lambda step: events.append(("token", step.token)))
        engine.run()
    a, b, c = (event[1] for event in events if event[0] == "token")
    assert events == in_turn(a, b, c)


def test_a_request_that_fails_ends_alone_on_cuda(alone):
    engine = on_cuda(alone[0], max_batch_size=8, max_slots=60 * BLOCK)
    beside = engine.submit(random_ids(20), sampling=SAMPLINGS["functions"], max_new_tokens=8, stop_token_ids=[STOP])
    bad = Sampling(processors=[lambda ids, logits: logits * torch.nan], temperature=1.0)
    failing = engine.submit(random_ids(9), sampling=bad, max_new_tokens=8, stop_token_ids=[STOP])
    engine.run()
    assert "NaN or positive infinity" in str(failing.error)
    (expected,) = alone[0].generate(
        [random_ids(20)], sampling=SAMPLINGS["functions"], max_new_tokens=8, stop_token_ids=[STOP]
    )
    assert beside.completion.tokens == expected.tokens
