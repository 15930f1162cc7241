"""What `submit` refuses, with others under way, and from which threads it may be called."""

import threading
import time

import pytest
import torch
from request_helpers import NEW, check_empty, new_engine, random_ids, submit_and_run, tokens_alone, tokens_of

from llama_flex import Ensemble, Mask, Sampling, scores
from llama_flex.engine.scheduler import Scheduler


def test_impossible_requests_are_refused(flex):
    engine = new_engine(flex, max_batch_size=2, max_slots=2 * 128)
    for prompt, options, match in (
        (random_ids(256), {}, "exceed the slots"),
        (random_ids(250), {"max_new_tokens": 7}, "exceed the slots"),
        (random_ids(2000), {}, "no room in the context"),
        ([], {}, "empty"),
        ([160], {}, "vocabulary"),
        ("abc", {}, "lists of token ids"),
        ([5], {"max_new_tokens": 0}, "at least 1"),
        (Ensemble([[5], [6], [7]]), {}, "max_batch_size is 2"),
        (Ensemble([random_ids(140), [6]]), {"max_new_tokens": 1}, "exceed"),  # three pages
        ([5], {"stop": ["."]}, "need a tokenizer"),
        ([5], {"mask": 7}, "must be a Mask"),
        ([5], {"mask": [None]}, "1 masks for 2 layers"),
        ([5], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ([5], {"max_new_tokens": "3"}, "max_new_tokens must be a whole number, not '3'"),
        ([5], {"sampling": [Sampling()]}, "sampling must be a Sampling"),
        ([5], {"sampling": 0.5}, "sampling must be a Sampling"),
        ([5], {"stop_token_ids": 5}, "stop_token_ids must be token ids, such as .2., not 5"),
        ([5], {"stop_token_ids": ["."]}, "stop_token_ids must be token ids"),
        ([5], {"callback": 5}, "callback must be a function of a Step, not 5"),
        ([5], {"priority": "high"}, "priority must be a whole number, not 'high'"),
        ([5], {"priority": float("nan")}, "priority must be a whole number, not nan"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.submit(prompt, **options)
    check_empty(engine)
    assert len(submit_and_run(engine, random_ids(250), max_new_tokens=6)) == 6
    assert len(submit_and_run(engine, random_ids(250))) == 6  # as many as there is room for


def test_a_rule_that_would_fail_within_a_request_is_refused_and_others_go_on(dense):
    table, bias = torch.arange(20) % 3 > 0, torch.zeros(20)
    short = Mask(lambda q, kv: (kv.index <= q.index) & table[kv.index.clamp(min=0)], "short")
    score = scores.ScoreMod(lambda score, q, kv: score + bias[q.position], "biased")
    engine = new_engine(dense, max_batch_size=4, max_slots=1024)
    other = engine.submit([5, 6], **NEW)
    for options in ({"mask": short}, {"score_mod": score}, {"mask": [None, short]}, {"score_mod": [score, None]}):
        name = "short" if "mask" in options else "biased"
        with pytest.raises(ValueError, match=f"{name}: index 20 into a tensor of 20 in line .*: make it as long"):
            engine.submit(random_ids(15), **NEW, **options)
        fits = engine.submit(random_ids(14), **NEW, **options)
        engine.run()
        assert tokens_of(fits) == tokens_alone(dense, random_ids(14), **NEW, **options)
    with pytest.raises(ValueError, match="short: index 20"):
        engine.submit(Ensemble([[5], random_ids(15)]), **NEW, mask=short)
    assert tokens_of(other) == tokens_alone(dense, [5, 6], **NEW)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Mask(lambda q, kv: kv.index <= q.index.max().item()), "item"),
        (Mask(lambda q, kv: (kv.index <= q.index) if q.index > 5 else kv.index > 1), "data-dependent"),
        (Mask(lambda q, kv: (kv.index <= q.index).expand(2)), r"returned \[2\] for one query and one key"),
        (Mask(lambda q, kv: torch.stack([q.index, kv.index]) > 0), r"returned \[2\] for one query and one key"),
        (scores.ScoreMod(lambda score, q, kv: score if score > 0 else score / 2), "data-dependent"),
        (scores.ScoreMod(lambda score, q, kv: score.expand(3)), r"returned \[3\] for one query and one key"),
    ],
)
def test_a_rule_that_only_fails_in_a_step_is_refused_before(flex, rule, match):
    """Call it both as FlexAttention does, for one cell alone, and as block lists do, for all cells at once."""
    engine = new_engine(flex, max_batch_size=4, max_slots=1024)
    other = engine.submit([5, 6], **NEW)
    with pytest.raises(ValueError, match=match):
        engine.submit([5, 6], **NEW, **{"mask" if isinstance(rule, Mask) else "score_mod": rule})
    engine.run()
    assert tokens_of(other) == tokens_alone(flex, [5, 6], **NEW)


def test_the_first_requests_may_come_from_several_threads(flex):
    engine = new_engine(flex, max_batch_size=4, max_slots=1024)
    make, made, found = engine._new_scheduler, [], []

    def slowly() -> Scheduler:
        made.append(1)
        time.sleep(0.2)
        return make()

    engine._new_scheduler = slowly
    threads = [threading.Thread(target=lambda: found.append(engine.submit([5, 6], **NEW))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.run()
    assert [len(request.steps) for request in found] == [NEW["max_new_tokens"]] * 4
    assert len(made) == 1


def test_requests_of_other_engines_and_steps_within_steps_are_refused(dense):
    engine, other = (new_engine(dense, max_batch_size=2, max_slots=512) for _ in range(2))
    request = engine.submit([5, 6], **NEW)
    other.submit([5], **NEW)
    with pytest.raises(ValueError, match="request 0 belongs to another engine"):
        other.cancel(request)
    nested = engine.submit([7], **NEW, callback=lambda step: engine.run())
    engine.run()
    assert nested.finish_reason == "error"
    with pytest.raises(ValueError, match="during a step"):
        raise nested.error
    assert request.finish_reason == "length"
    with pytest.raises(ValueError, match="n must be at least 1, not -1"):
        engine.submit_samples([5], -1, sampling=Sampling())
    seeds = [r.sampling.seed for r in engine.submit_samples([5], 3, sampling=Sampling(seed=2**63 - 2), **NEW)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
