"""Steps with processors run ahead: the next forward is enqueued, then a token is read, then the next one is drawn."""

import dataclasses

import pytest
import torch
from choosing_helpers import SAMPLINGS, STOP, in_turn, letters_tokenizer, requests, shifted
from helpers import few
from request_helpers import check_empty, random_ids, random_model, tokens_of

from llama_flex import Engine, Sampling, edits
from llama_flex.engine.batch import Batch
from llama_flex.engine.stream import Stream
from llama_flex.masks.layout import BLOCK

pytestmark = pytest.mark.usefixtures("read_later")
OPTIONS = {"max_new_tokens": 8, "stop_token_ids": [STOP]}


class Refused(Exception):
    """What a callback or a processor raises."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine(random_model(), letters_tokenizer(tmp_path_factory.mktemp("letters")), backend="dense")


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    """The tokens that each request gets alone, in a stream that does not run ahead."""
    return [engine.generate([prompt], **options)[0].tokens for prompt, options in requests()]


@pytest.fixture
def streams_ahead(monkeypatch):
    """Let streams run ahead, as on CUDA."""
    init = Stream.__init__

    def started(self, runner, requests, cache):
        init(self, runner, requests, cache)
        self.ahead = requests[0].cache is None and not self.captures

    monkeypatch.setattr(Stream, "__init__", started)


def running_ahead(like: Engine, **options) -> Engine:
    """Make an engine of the same model that runs ahead, as on CUDA."""
    engine = Engine(
        like.model, like.tokenizer, backend="dense", **{"max_batch_size": 8, "max_slots": 60 * BLOCK} | options
    )
    engine.scheduler._ahead = True
    return engine


class Watch:
    """A processor that checks that it gets all tokens so far, and counts its calls."""

    def __init__(self, prompt, fails=None):
        self.prompt, self.fails, self.calls, self.request = prompt, fails, 0, None

    def __call__(self, ids, logits):
        assert ids == [*self.prompt, *tokens_of(self.request)]
        assert len(self.request.steps) == self.request.num_scheduled  # none is under way
        self.calls += 1
        if len(ids) - len(self.prompt) == self.fails:
            raise Refused
        return shifted(ids, logits)


def at_once(monkeypatch) -> None:
    """Draw with the forward, before the tokens so far are read."""
    pending = Batch._pending

    def finished(*given, **options):
        output = pending(*given, **options)
        output.finish()
        output._finish = lambda rows: (output._read, output._errors)
        return output

    monkeypatch.setattr(Batch, "_pending", finished)


# ---- the order


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.usefixtures("streams_ahead")
def test_the_next_forward_is_enqueued_before_a_token_is_delivered_and_the_draw_after_that(engine, monkeypatch, alone):
    engine, events, prompt = running_ahead(engine), [], random_ids(9)
    step = engine.runner.step

    def note(ids, logits):
        events.append(("draw", ids[9:]))
        return shifted(ids, logits)

    monkeypatch.setattr(engine.runner, "step", lambda *given, **more: events.append("forward") or step(*given, **more))
    request = engine.submit(
        prompt,
        sampling=Sampling(processors=[note]),
        max_new_tokens=3,
        stop_token_ids=(),
        callback=lambda step: events.append(("token", step.token)),
        edit=edits.scale("z", 0.5) if alone else None,
    )
    engine.run()
    a, b, c = tokens_of(request)
    assert events == in_turn(a, b, c)


@pytest.mark.usefixtures("streams_ahead")
def test_a_stream_yields_a_token_after_the_next_forward_and_draws_when_it_goes_on(engine, monkeypatch):
    drawn, forwards, step = [], [], engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda *given, **more: forwards.append(1) or step(*given, **more))

    def note(ids, logits):
        drawn.append(ids[9:])
        return shifted(ids, logits)

    stream = engine.stream([random_ids(9)], sampling=Sampling(processors=[note]), max_new_tokens=4, stop_token_ids=())
    tokens = []
    for n, each in enumerate(stream):
        assert drawn == [tokens[:i] for i in range(n + 1)]
        assert len(forwards) == min(n + 2, 4)
        tokens.append(each.token)
    assert len(tokens) == 4


# ---- the same tokens


@pytest.mark.parametrize("pages", few([3], [60]))
def test_submitted_together_each_gives_what_it_gives_alone(engine, alone, preempted, pages):
    engine = running_ahead(engine, max_slots=pages * BLOCK)
    submitted = [engine.submit(prompt, **options) for prompt, options in requests()]
    engine.run()
    assert [tokens_of(request) for request in submitted] == alone
    assert bool(preempted) == (pages == 3)
    check_empty(engine)


@pytest.mark.usefixtures("streams_ahead")
def test_streams_that_run_ahead_give_the_same_tokens(engine, alone):
    plain = [n for n, (_, options) in enumerate(requests()) if "mask" not in options and n != 13]  # 13: fused
    asked = [requests()[n] for n in plain]
    found = engine.generate(
        [prompt for prompt, _ in asked],
        sampling=[options["sampling"] for _, options in asked],
        max_new_tokens=14,
        stop_token_ids=[STOP],
    )
    assert [done.tokens for done in found] == [alone[n] for n in plain]
    ahead = running_ahead(engine)
    identity = edits.scale("z", 1.0)
    submitted = [ahead.submit(prompt, **options, edit=identity) for prompt, options in asked]
    ahead.run()
    assert [tokens_of(request) for request in submitted] == [alone[n] for n in plain]


def test_a_draw_before_the_token_is_read_gives_other_tokens(engine, alone, monkeypatch):
    at_once(monkeypatch)
    engine = running_ahead(engine)
    submitted = [engine.submit(prompt, **options) for prompt, options in requests()]
    engine.run()
    assert sum(tokens_of(request) != tokens for request, tokens in zip(submitted, alone, strict=True)) >= 4


def test_a_processor_that_is_called_too_early_is_noticed(engine, monkeypatch):
    at_once(monkeypatch)
    engine, watch = running_ahead(engine), Watch(random_ids(9))
    watch.request = engine.submit(random_ids(9), sampling=Sampling(processors=[watch]), **OPTIONS)
    engine.run()
    assert isinstance(watch.request.error, AssertionError)


# ---- requests that end or start again while the next forward is enqueued


@pytest.mark.parametrize("end", ["stop", "callback cancels", "callback raises", "processor raises", "cancelled"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_request_that_ends_is_processed_no_more(engine, end, beside):
    prompt, watch = random_ids(9), Watch(random_ids(9), fails=3 if end == "processor raises" else None)
    (expected,) = engine.generate([prompt], sampling=SAMPLINGS["function"], **OPTIONS)
    others = ["functions", "grammar and more"] if beside else []
    expected_others = [engine.generate([random_ids(20)], sampling=SAMPLINGS[name], **OPTIONS)[0] for name in others]
    ahead = running_ahead(engine)

    def callback(step):
        if len(watch.request.steps) == 3 and end.startswith("callback"):
            if end == "callback raises":
                raise Refused
            ahead.cancel(watch.request)

    stop = [expected.tokens[2]] if end == "stop" else [STOP]
    assert len(expected.tokens) > 4
    assert expected.tokens[2] not in expected.tokens[:2]
    options = OPTIONS | {"stop_token_ids": stop, "sampling": Sampling(processors=[watch]), "callback": callback}
    watch.request = ahead.submit(prompt, **options)
    submitted = [ahead.submit(random_ids(20), sampling=SAMPLINGS[name], **OPTIONS) for name in others]
    while not ahead.scheduler.idle:
        ahead.step()
        if end == "cancelled" and len(watch.request.steps) == 3:
            ahead.cancel(watch.request)
    reasons = {"stop": "stop", "callback cancels": "cancelled", "cancelled": "cancelled"}
    assert watch.request.finish_reason == reasons.get(end, "error")
    assert (watch.request.finish_reason == "error") == isinstance(watch.request.error, Refused)
    assert tokens_of(watch.request) == expected.tokens[:3]
    assert watch.calls == (4 if end in ("processor raises", "cancelled") else 3)
    assert [tokens_of(request) for request in submitted] == [done.tokens for done in expected_others]
    check_empty(ahead)


def test_a_preempted_request_sees_all_its_tokens(engine, preempted):
    ahead = running_ahead(engine, max_batch_size=2, max_slots=3 * BLOCK)
    watches = [Watch(random_ids(length)) for length in (126, 127)]  # two pages each in the end
    for watch in watches:
        watch.request = ahead.submit(watch.prompt, sampling=Sampling(processors=[watch]), **OPTIONS)
    ahead.run()
    assert preempted
    for watch in watches:
        assert watch.request.error is None
        (expected,) = engine.generate([watch.prompt], sampling=SAMPLINGS["function"], **OPTIONS)
        assert tokens_of(watch.request) == expected.tokens
    check_empty(ahead)


@pytest.mark.parametrize("bad", few([0], [1, 2]))
def test_requests_restarted_after_a_nan_see_all_their_tokens(preempted, bad):
    """Two share pages with one whose logits are NaN, and start again while their next forward is enqueued: uncompiled
    FlexAttention spreads the NaN."""
    model = random_model()
    with torch.no_grad():
        model.embed.weight[159] = torch.nan
    ids = [id % 159 for id in random_ids(150)]
    watches = [Watch([*ids, 159] if n == bad else [*ids, n]) for n in range(3)]
    ahead = Engine(model, max_batch_size=3)
    ahead.scheduler._ahead = True
    for watch in watches:
        watch.request = ahead.submit(watch.prompt, sampling=Sampling(processors=[watch]), **OPTIONS)
    ahead.run()
    assert preempted
    for n, watch in enumerate(watches):
        if n == bad:
            assert (tokens_of(watch.request), watch.request.finish_reason) == ([], "error")
        else:
            assert watch.request.error is None
            (done,) = Engine(model).generate([watch.prompt], sampling=SAMPLINGS["function"], **OPTIONS)
            assert tokens_of(watch.request) == done.tokens
    check_empty(ahead)


# ---- masks


def test_functions_come_after_the_masks_and_have_the_last_word(engine):
    prompt, seen = [5, 6, 7], []

    def revive(ids, logits):
        seen.append(logits[ids].tolist())
        return logits.index_fill(0, torch.tensor([5]), 100.0)

    sampling = Sampling(no_repeat_ngram_size=1, processors=[revive])
    for masked_besides in (False, True):
        beside = [SAMPLINGS["grammar"]] if masked_besides else []
        found = engine.generate([prompt] * (1 + len(beside)), sampling=[sampling, *beside], **OPTIONS)
        assert found[0].tokens == [5] * 8
    assert all(value == -torch.inf for values in seen for value in values)
    plain = dataclasses.replace(sampling, no_repeat_ngram_size=0)  # beside a grammar, but with no mask of its own
    seen.clear()
    engine.generate([prompt] * 2, sampling=[plain, SAMPLINGS["grammar"]], **OPTIONS)
    assert all(value > -torch.inf for values in seen for value in values)
