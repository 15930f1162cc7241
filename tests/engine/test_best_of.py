"""Best of n: samples of a prompt that are computed together, ranked by mean log-probability."""

import pytest
from generation_helpers import BANG, ONE, TWO, assert_same, poisoned_model
from request_helpers import NEW, Refused, check_empty, new_engine, random_ids

from llama_flex import Capture, Engine, Ensemble, Sampling, masks
from llama_flex.engine.output import NonFiniteLogitsError

RANDOM = Sampling(temperature=1.2, seed=7)
PROMPTS = [random_ids(300), random_ids(5), Ensemble([random_ids(20), random_ids(9)])]


@pytest.mark.parametrize("options", [{}, {"mask": masks.sliding_window(9), "stop_token_ids": range(0, 160, 5)}])
def test_the_best_samples_are_those_of_the_highest_mean_log_probability(dense, options):
    engine, options = new_engine(dense, max_batch_size=4, max_slots=2048), NEW | options
    found = engine.best_of(PROMPTS, 4, num_return_sequences=3, sampling=RANDOM, **options)
    for number, (prompt, best) in enumerate(zip(PROMPTS, found, strict=True)):
        seeds = [7 + 4 * number + i for i in range(4)]
        alone = [
            dense.generate([prompt], sampling=Sampling(temperature=1.2, seed=seed), **options)[0] for seed in seeds
        ]
        alone.sort(key=lambda done: sum(done.logprobs) / len(done.logprobs), reverse=True)
        for one, other in zip(best, alone, strict=False):
            assert_same(one, other)
            assert one.score == pytest.approx(sum(other.logprobs) / len(other.logprobs), abs=1e-5)
        assert len(best) == 3
        assert best[0].score > best[2].score
    check_empty(engine)


def test_samples_share_the_computation_of_their_prompt(dense):
    engine = new_engine(dense, max_batch_size=4, max_slots=2048)
    engine.best_of([random_ids(300)], 4, sampling=RANDOM, **NEW)
    assert 300 <= engine.scheduler.prompt_tokens < 450


def test_other_requests_go_on_meanwhile(dense):
    engine = new_engine(dense, max_batch_size=3, max_slots=1024)
    other = engine.submit([5, 6], **NEW)
    engine.best_of([[7]], 2, sampling=RANDOM, **NEW)
    assert other.steps


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sampling": None}, "2 greedy samples would be equal; give a sampling with a temperature above 0"),
        ({"sampling": 3}, "sampling must be a Sampling"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"num_return_sequences": 3}, "num_return_sequences 3 is more than the 2 samples of a prompt"),
        ({"prompts": []}, "no prompts given"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[5], [999]]}, "token id outside the vocabulary"),
        ({"capture": Capture("resid_post")}, "capture: only one request at a time can have it"),
    ],
    ids=["sampling", "type", "n", "returned", "none", "empty", "vocabulary", "capture"],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_stays_queued(dense, changes, match):
    engine = new_engine(dense, max_batch_size=2, max_slots=512)
    with pytest.raises(ValueError, match=match):
        engine.best_of(**{"prompts": [[5], [6]], "n": 2, "sampling": RANDOM} | NEW | changes)
    engine.run()
    assert engine.scheduler.new_tokens == 0
    check_empty(engine)


def test_an_unknown_option_is_named(dense):
    with pytest.raises(TypeError, match=r"best_of\(\) got an unexpected .* 'max_token'; did you mean 'max_new_tokens'"):
        dense.best_of([[5]], 2, sampling=RANDOM, max_token=3)


def test_what_ends_a_sample_reaches_the_caller(dense, tokenizer):
    engine = Engine(poisoned_model(TWO), tokenizer, backend="dense", max_batch_size=2, max_slots=512)
    with pytest.raises(NonFiniteLogitsError, match="prompt 1 at new token 2"):
        engine.best_of([[BANG], [ONE]], 2, sampling=Sampling(temperature=1e-3, seed=0), max_new_tokens=3)
    check_empty(engine)

    def refuse(step):
        raise Refused

    engine = new_engine(dense, max_batch_size=2, max_slots=512)
    with pytest.raises(Refused):
        engine.best_of([[5]], 2, sampling=RANDOM, callback=refuse, **NEW)
    engine.run()
    check_empty(engine)
