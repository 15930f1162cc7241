"""Limits: how many new tokens there may be, and what is refused before any work."""

import pytest
import torch
from generation_helpers import ONE, successor_model
from helpers import random_ids

from llama_flex import Engine, GenerationConfig, Sampling

# --- The number of new tokens ---


@pytest.mark.parametrize("new", [1, 2, 7])
def test_exactly_max_new_tokens_come(successor_engine, new):
    (done,) = successor_engine.generate([[ONE]], max_new_tokens=new, stop_token_ids=[])
    assert len(done.tokens) == len(done.logprobs) == new
    assert done.finish_reason == "length"


def test_max_new_tokens_defaults_to_generation_config(tokenizer):
    model = successor_model(generation=GenerationConfig(max_new_tokens=3))
    (done,) = Engine(model, tokenizer, backend="dense").generate([[ONE]])
    assert len(done.tokens) == 3


def test_max_length_caps_the_number_of_new_tokens_where_nobody_says(tokenizer):
    model = successor_model(eos=None, generation=GenerationConfig(max_length=12))
    engine = Engine(model, tokenizer, backend="dense")
    assert len(engine.generate([[ONE] * 5])[0].tokens) == 7
    assert len(engine.generate([[ONE] * 5], max_new_tokens=20)[0].tokens) == 20
    assert len(engine.generate([[ONE] * 11])[0].tokens) == 1
    for prompt in ([ONE] * 12, [ONE] * 30):  # as transformers
        rule = f"prompt 1: {len(prompt)} tokens leave no room within generation_config.json's max_length of 12"
        with pytest.raises(ValueError, match=rule):
            engine.generate([[ONE], prompt])


def test_by_default_the_context_is_the_limit_where_it_is_short(tokenizer):
    model = successor_model(eos=None, context=12)
    (done,) = Engine(model, tokenizer, backend="dense").generate([[ONE] * 8])
    assert len(done.tokens) == 4


def test_the_context_can_be_filled_to_the_last_token(tokenizer):
    engine = Engine(successor_model(eos=None, context=12), tokenizer, backend="dense")
    assert len(engine.generate([[ONE] * 8], max_new_tokens=4)[0].tokens) == 4
    assert len(engine.generate([[ONE] * 11], max_new_tokens=1)[0].tokens) == 1


def test_each_prompt_has_its_own_room_in_the_context(tiny_pair):
    _, model = tiny_pair("gqa")
    room = model.config.max_position_embeddings - 1020
    short, long = Engine(model).check([[5], [5] * 1020])
    assert (short, long) == (256, room)


def test_the_context_is_that_of_positions(tiny_pair):
    """Check that positions count, not slots: tokens may have been evicted, and positions may be given."""
    _, model = tiny_pair("gqa")
    cache = model.new_cache(1, 1024)
    model(torch.tensor([random_ids(9, 1)]), positions=torch.arange(1000, 1009)[None], cache=cache)
    cache.evict(range(5))
    with pytest.raises(ValueError, match="1013 tokens and 40 new ones exceed the context of 1024"):
        Engine(model).generate([[1, 2, 3, 4]], max_new_tokens=40, cache=cache)


# --- Refused before any work ---


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0 is empty"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5, 512]], {}, "prompt 0 .*vocabulary of 512"),
        ([[5], [6, -1]], {}, "prompt 1 .*vocabulary"),
        ([[5] * 1025], {}, "1025 .*context of 1024"),
        ([[5] * 1024], {}, "1024 .*context of 1024"),
        ([[5], [5] * 1000], {"max_new_tokens": 25}, "1000 .*25 .*1024.* at most 24"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([[5]], {"max_new_tokens": -1}, "max_new_tokens must be at least 1, not -1"),
        ([[5], [6]], {"sampling": [Sampling()]}, "1 samplings for 2 prompts"),
        ([[5]], {"sampling": [Sampling()] * 2}, "2 samplings for 1 prompts"),
        ([[5]], {"sampling": []}, "0 samplings for 1 prompts"),
        ([[5]], {"stop": ["x"]}, "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_any_work(engine, monkeypatch, prompts, options, message):
    monkeypatch.setattr(engine.model, "step", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, **options)
    with pytest.raises(ValueError, match=message):
        next(engine.stream(prompts, **options))


@pytest.mark.parametrize("stop", ["One", [""], ["a", ""]])
def test_malformed_stop_strings_are_refused_before_any_work(successor_engine, monkeypatch, stop):
    monkeypatch.setattr(successor_engine.model, "step", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="stop string"):
        successor_engine.generate([[ONE]], stop=stop)


@pytest.mark.parametrize(
    ("slots", "prompt", "new"), [(128, 200, 5), (128, 128, 1), (128, 120, 9), (128, 129, None), (256, 250, 100)]
)
def test_a_cache_that_is_too_small_is_refused_before_any_work_and_named(engine, monkeypatch, slots, prompt, new):
    cache = engine.model.new_cache(1, slots)
    monkeypatch.setattr(engine.model, "step", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=rf"cache.*{slots}|{slots}.*cache"):
        engine.generate([random_ids(prompt, 17)], max_new_tokens=new, cache=cache)
    assert cache.reserved == 0


@pytest.mark.parametrize(("rows", "prompts"), [(1, 2), (2, 1), (3, 2)])
def test_a_cache_of_another_batch_size_is_refused_before_any_work(engine, monkeypatch, rows, prompts):
    cache = engine.model.new_cache(rows, 128)
    monkeypatch.setattr(engine.model, "step", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"{rows} row"):
        engine.generate([[5, 6]] * prompts, max_new_tokens=2, cache=cache)


@pytest.mark.parametrize("prompts", [[1, 2, 3], ["abc"], [[1.5]], "abc", [None]])
def test_prompts_that_are_no_lists_of_ids_are_refused(tiny_pair, prompts):
    with pytest.raises(ValueError, match="lists of token ids"):
        Engine(tiny_pair("gqa")[1]).stream(prompts)


def test_a_cache_of_another_model_is_refused(tiny_pair):
    cache = tiny_pair("mqa")[1].new_cache(1, 128)
    with pytest.raises(ValueError, match="belongs to another model"):
        Engine(tiny_pair("gqa")[1]).stream([[1]], cache=cache)


@pytest.mark.parametrize("wrong", [True, 1.5, "3", None])
def test_anything_but_ids_is_refused(successor_engine, wrong):
    with pytest.raises(ValueError, match="token ids"):
        successor_engine.generate([[ONE, wrong]])
    with pytest.raises(ValueError, match="token ids"):
        successor_engine.generate([[ONE]], stop_token_ids=[wrong])
    if wrong is not None:
        with pytest.raises(ValueError, match="max_new_tokens must be a whole number"):
            successor_engine.generate([[ONE]], max_new_tokens=wrong)


@pytest.mark.parametrize("id", [-1, -(10**6), 10**6])
def test_a_stop_token_outside_the_vocabulary_is_refused(tiny_pair, id):
    engine = Engine(tiny_pair("gqa")[1], max_length=128)
    given = {"stop_token_ids": [id], "max_new_tokens": 4, "sampling": Sampling(min_new_tokens=2)}
    for start in (lambda: engine.generate([[1]], **given), lambda: engine.submit([1], **given)):
        with pytest.raises(ValueError, match=f"stop_token_ids has token id {id}, which is outside the vocabulary"):
            start()
