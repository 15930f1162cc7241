"""Steps that fail or are interrupted at any line lose no token, and give none twice."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from helpers import few
from request_helpers import check_empty, new_engine, random_ids, tokens_of

from llama_flex import Capture
from llama_flex.engine.batch import Batch
from llama_flex.engine.output import OutputProcessor
from llama_flex.engine.paged_batch import PagedBatch
from llama_flex.engine.prefill import prefill
from llama_flex.engine.request import Request
from llama_flex.engine.scheduler import Scheduler
from llama_flex.engine.stream import Stream
from llama_flex.masks.layout import BLOCK
from llama_flex.text.detokenizer import _BYTE_LEVEL, Decoding, StreamDecoder


@pytest.mark.parametrize("error", few([KeyboardInterrupt], [RuntimeError]))
@pytest.mark.parametrize("fails", few([(2, 3)], [(1,), (4, 9), (6, 7, 20)]))
@pytest.mark.parametrize("computed", [False, True])
def test_a_step_that_fails_loses_nothing(dense, short_cases, monkeypatch, error, fails, computed):
    engine = new_engine(dense, max_batch_size=4, max_slots=6 * BLOCK, prefill_tokens=128)
    step, calls = engine.runner.step, 0

    def failing(*given, **options):
        nonlocal calls
        calls += 1
        found = step(*given, **options) if computed or calls not in fails else None
        if calls in fails:
            raise error
        return found

    monkeypatch.setattr(engine.runner, "step", failing)
    delivered = {}
    cases = short_cases[:10]
    requests = [
        engine.submit(
            case.prompt, callback=lambda step: delivered.setdefault(step.row, []).append(step.token), **case.options
        )
        for case in cases
    ]
    for _ in fails:
        with pytest.raises(error):
            engine.run()
    engine.run()
    for case, request in zip(cases, requests, strict=True):
        assert tokens_of(request) == delivered[request.number] == case.expected
    check_empty(engine)


class Bytes:
    """A tokenizer whose ids are bytes, most of them parts of a character."""

    vocab_size, special_ids = 160, frozenset()

    def __contains__(self, id):
        return id < self.vocab_size

    def stream(self, ids):
        pieces = list(_BYTE_LEVEL)
        return StreamDecoder(lambda id: pieces[id * 7 % 256], Decoding(byte_level=True), frozenset(), ids)


@pytest.mark.parametrize(
    ("again", "ahead", "every"),
    [
        (None, True, 61),
        (5, False, 397),
        pytest.param(None, False, 11, marks=pytest.mark.exhaustive),
        pytest.param(None, True, 11, marks=pytest.mark.exhaustive),
        pytest.param(3, False, 17, marks=pytest.mark.exhaustive),
        pytest.param(11, True, 17, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_ctrl_c_at_any_line_loses_nothing(dense, read_later, preempted, again, ahead, every, alone):
    """Interrupt every so many lines; with `again`, once more so many lines later, while the first is handled."""
    parts = Scheduler, Batch, PagedBatch, OutputProcessor, StreamDecoder, Stream, Request, prefill, Capture
    files = [sys.modules[part.__module__].__file__ for part in parts]
    # The first two need two pages each in the end, so the second has to give way to the first.
    prompts, options = [random_ids(length) for length in (126, 127, 20)], {"max_new_tokens": 5, "stop_token_ids": ()}
    expected = new_engine(dense, Bytes()).generate(prompts, **options)
    assert any(len(c.text.encode()) > 3 for c in expected)
    expected_captures = [Capture("resid_pre", "k", layers=1) for _ in "ab"]
    for prompt, each in zip(prompts[1:], expected_captures, strict=True):
        dense.generate([prompt], **options, capture=each)

    def interrupted(at: int) -> bool:
        engine = new_engine(dense, Bytes(), max_batch_size=2, max_slots=3 * BLOCK, prefill_tokens=128)
        engine.scheduler._ahead = ahead
        delivered, captures = {}, [Capture("resid_pre", "k", layers=1) for _ in "ab"]
        cache = dense.model.new_rolling_cache(1, 200, largest_append=128)
        own = [{}, {"capture": captures[0]}, {"cache": cache, "capture": captures[1]}]
        requests = [
            engine.submit(
                ids, **options, **own[n] if alone else {}, callback=lambda s: delivered.setdefault(s.row, []).append(s)
            )
            for n, ids in enumerate(prompts)
        ]
        left = at
        steps = []

        def trace(frame, event, arg):
            nonlocal left
            # Python raises KeyboardInterrupt where it calls something. A trace would raise it in `step` where a `with`
            # block is left, too.
            if frame.f_code.co_filename not in files or frame.f_code.co_name == "step":
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        def run():
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                while not engine.scheduler.idle:
                    steps.extend(engine.step())
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(before)
            return False

        hit = run()
        if again is not None and hit:
            left = again
            run()
        left = -1
        assert not run()
        for request, one in zip(requests, expected, strict=True):
            assert replace(request.completion, logprobs=[]) == replace(one, logprobs=[]), at
        for request in requests:
            once = [step for step, _ in itertools.groupby(delivered[request.number], id)]
            assert once == list(map(id, request.steps)), at
        if alone:
            assert cache.length.tolist() == [len(prompts[2]) + 4], at
            for capture, reference in zip(captures, expected_captures, strict=True):
                assert capture.tokens.index.tolist() == reference.tokens.index.tolist(), at
                for site in ("resid_pre", "k"):
                    torch.testing.assert_close(capture[site, 1], reference[site, 1], atol=2e-4, rtol=1e-4)
        assert len(steps) == len(set(steps)) <= 3, at
        assert len(steps) == 3 or hit, at
        check_empty(engine)
        return hit

    at = 1
    while interrupted(at):
        at += every
    assert at > 1000
    assert preempted
