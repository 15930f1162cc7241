"""Output: whole characters, stop tokens and stop strings, and logits that are not finite."""

import pytest
import torch
import transformers
from generation_helpers import (
    BANG,
    CAFE_AF,
    CAFE_C,
    E1,
    E2,
    END,
    HERE,
    ONE,
    PIECES,
    STOP,
    THREE,
    TWO,
    poisoned_model,
    successor_model,
)

from llama_flex import Engine, Ensemble, GenerationConfig
from llama_flex.engine.output import NonFiniteLogitsError


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory) -> str:
    """Save the tokenizer for transformers."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return str(folder / "tokenizer.json")


# --- Text ---


def test_text_is_whole_characters_and_joins_to_the_decoded_tokens(successor_engine, tokenizer):
    steps = list(successor_engine.stream([[ONE]], max_new_tokens=8))
    assert [step.text for step in steps] == [" two", " three", " c", "af", "", "é", "!", " stop"]
    assert "".join(step.text for step in steps) == tokenizer.decode([step.token for step in steps])


def test_an_unfinished_character_comes_out_at_the_end(successor_engine):
    (done,) = successor_engine.generate([[CAFE_C]], max_new_tokens=2)
    assert done.tokens == [CAFE_AF, E1]
    assert done.text == "af\ufffd"


def test_without_a_tokenizer_there_are_tokens_and_no_text(successor_engine):
    engine = Engine(successor_engine.model, backend="dense")
    (done,) = engine.generate([[ONE]], max_new_tokens=2)
    assert (done.tokens, done.text) == ([TWO, THREE], None)
    assert [step.text for step in engine.stream([[ONE]], max_new_tokens=2)] == [None, None]
    request = engine.submit([ONE], max_new_tokens=2)
    engine.run()
    assert (request.completion.tokens, request.completion.text) == ([TWO, THREE], None)


def test_without_a_tokenizer_there_is_no_text_from_the_beginning():
    engine = Engine(successor_model(eos=None), backend="dense")
    request = engine.submit([ONE], max_new_tokens=2)
    assert request.completion.text is None
    engine.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLogitsError) as raised:
        engine.generate([[ONE]], max_new_tokens=2)
    assert raised.value.completions[0].text is None


# --- Stop tokens ---


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "given", "last"),
    [
        (END, None, None, END),
        (HERE, END, None, END),  # generation_config.json goes first
        (HERE, (END, BANG), None, BANG),
        ((E2, END), None, None, E2),
        (HERE, END, [THREE], THREE),
        (HERE, END, [END, STOP, 0], STOP),
    ],
)
def test_stop_tokens_are_generation_configs_then_configs_unless_given(
    tokenizer, config_eos, generation_eos, given, last
):
    model = successor_model(config_eos, GenerationConfig(eos_token_id=generation_eos))
    (done,) = Engine(model, tokenizer, backend="dense").generate([[ONE]], max_new_tokens=40, stop_token_ids=given)
    assert done.tokens == list(range(TWO, last + 1))
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("given", [None, []])
def test_with_no_stop_token_only_the_length_ends_the_text(tokenizer, given):
    model = successor_model(eos=None if given is None else END)
    (done,) = Engine(model, tokenizer, backend="dense").generate([[ONE]], max_new_tokens=20, stop_token_ids=given)
    assert len(done.tokens) == 20
    assert done.finish_reason == "length"


def test_a_stop_token_is_in_the_tokens_and_not_in_the_text(tokenizer):
    (done,) = Engine(successor_model(eos=END), tokenizer, backend="dense").generate([[BANG]], max_new_tokens=9)
    assert done.tokens == [STOP, HERE, END]
    assert len(done.logprobs) == 3
    assert done.text == " stop here"


def test_a_stop_token_as_the_very_last_one_is_a_stop(tokenizer):
    (done,) = Engine(successor_model(eos=END), tokenizer, backend="dense").generate([[BANG]], max_new_tokens=3)
    assert (done.tokens[-1], done.finish_reason) == (END, "stop")


# --- Stop strings ---


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ([" three"], " two", 2),
        (["wo thr"], " t", 2),  # across two tokens
        (["two three café!"], " ", 7),  # across all of them, with a character that two tokens share
        (["é"], " two three caf", 6),
        (["!"], " two three café", 7),
        ([" two"], "", 1),  # all of the first token
        ([" "], "", 1),
        (["here", "three", "stop"], " two ", 2),  # the first to be complete counts
        (["three café stop", "café!"], " two three ", 7),  # one that began earlier never ends
    ],
)
def test_a_stop_string_ends_the_text_before_it(successor_engine, stop, text, tokens):
    steps = list(successor_engine.stream([[ONE]], max_new_tokens=10, stop=stop))
    assert "".join(step.text for step in steps) == text
    assert len(steps) == tokens
    assert [step.finish_reason for step in steps] == [None] * (tokens - 1) + ["stop"]


@pytest.mark.parametrize(
    "stop",
    [
        ["<end>"],
        ["</s>"],
        ["here<end>"],
        ["re<end><unk>"],
        ["<end><unk><s></s>One tw"],
        ["nd><un"],
        [" hereOne"],  # special tokens lie between
        ["zebra", " two"],
    ],
)
@pytest.mark.parametrize("way", ["generate", "submit"])
def test_a_stop_string_may_hold_special_tokens_as_in_transformers(tokenizer, tokenizer_file, stop, way):
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer_file)
    criterion = transformers.StopStringCriteria(reference, stop)
    expected, written = [BANG], [*range(STOP, len(PIECES)), *range(TWO + 1)]
    for token in written:
        expected.append(token)
        if bool(criterion(torch.tensor([expected]), None)):
            break
    engine = Engine(successor_model(), tokenizer, backend="dense")
    options = {"max_new_tokens": len(written), "stop": stop, "stop_token_ids": []}
    if way == "submit":
        request = engine.submit([BANG], **options)
        engine.run()
        done = request.completion
    else:
        (done,) = engine.generate([[BANG]], **options)
    assert done.tokens == expected[1:]
    each = [
        (character, token in tokenizer.special_ids) for token in done.tokens for character in reference.decode(token)
    ]
    text = "".join(character for character, _ in each)
    found = [text.find(one) for one in stop if one in text]
    assert done.finish_reason == ("stop" if found else "length")
    assert done.text == "".join(c for c, special in each[: min(found, default=len(text))] if not special)


def test_text_that_may_begin_a_stop_string_is_held_back(successor_engine):
    steps = list(successor_engine.stream([[ONE]], max_new_tokens=4, stop=["three cat"]))
    assert [step.text for step in steps] == [" two", " ", "", "three caf"]


def test_held_back_text_is_released_when_the_length_ends_the_text(successor_engine):
    (done,) = successor_engine.generate([[ONE]], max_new_tokens=2, stop=["three cafés"])
    assert (done.text, done.finish_reason) == (" two three", "length")


def test_held_back_text_is_released_when_a_stop_token_ends_the_text(successor_engine):
    (done,) = successor_engine.generate([[BANG]], max_new_tokens=9, stop=["here and there"], stop_token_ids=[END])
    assert (done.text, done.finish_reason) == (" stop here", "stop")


@pytest.mark.parametrize(("stop", "text"), [(["here<end>"], " stop "), (["<end>"], " stop here"), (["p"], " sto")])
def test_a_stop_token_may_complete_a_stop_string(successor_engine, stop, text):
    (done,) = successor_engine.generate([[BANG]], max_new_tokens=9, stop=stop, stop_token_ids=[END])
    assert (done.text, done.finish_reason) == (text, "stop")


def test_a_stop_string_in_the_prompt_does_not_stop(successor_engine):
    stop = ["two", "One", "two three"]  # the last one begins in the prompt
    (done,) = successor_engine.generate([[ONE, TWO]], max_new_tokens=2, stop=stop)
    assert done.text == " three c"


def test_rows_stop_each_at_its_own_stop_string_token_or_length(successor_engine):
    rows = successor_engine.generate(
        [[ONE], [E2], [CAFE_AF, E1]], max_new_tokens=4, stop=[" three"], stop_token_ids=[HERE]
    )
    assert [done.text for done in rows] == [" two", "! stop", "é! stop"]  # a stop token has no text
    assert [len(done.tokens) for done in rows] == [2, 3, 4]
    assert [done.finish_reason for done in rows] == ["stop", "stop", "stop"]


# --- Logits that are not finite ---


@pytest.mark.exhaustive
@pytest.mark.parametrize("compile", [False, True])
def test_a_prompt_whose_logits_are_nan_ends_alone_and_is_named(tokenizer, compile):
    engine = Engine(poisoned_model(STOP), tokenizer, compile=compile)
    with pytest.raises(NonFiniteLogitsError, match=r"^prompt 1 at new token 2: the model's logits are NaN") as caught:
        engine.generate([[ONE], [BANG], [TWO]], max_new_tokens=4)
    assert "\n" not in str(caught.value)
    assert caught.value.where == [(1, 2)]
    whole, cut, other = caught.value.completions
    assert (whole.tokens, whole.finish_reason) == ([TWO, THREE, CAFE_C, CAFE_AF], "length")
    assert (cut.tokens, cut.text, cut.finish_reason) == ([STOP], " stop", "error")
    assert other.tokens == [THREE, CAFE_C, CAFE_AF, E1]
    assert engine.generate([[ONE]], max_new_tokens=2)[0].tokens == [TWO, THREE]


def test_a_stream_gives_all_other_tokens_before_it_names_the_failure(tokenizer):
    engine, steps = Engine(poisoned_model(STOP), tokenizer, backend="dense"), []
    stream = engine.stream([[STOP], [BANG], [ONE]], max_new_tokens=3)
    with pytest.raises(NonFiniteLogitsError, match="prompt 0 at new token 1, prompt 1 at new token 2"):
        steps.extend((step.row, step.token) for step in stream)
    assert steps == [(1, STOP), (2, TWO), (2, THREE), (2, CAFE_C)]


def test_a_member_of_an_ensemble_whose_logits_are_nan_ends_the_ensemble(tokenizer):
    engine = Engine(poisoned_model(STOP), tokenizer, backend="dense")
    with pytest.raises(NonFiniteLogitsError, match="prompt 0 at new token 1") as caught:
        engine.generate([Ensemble([[ONE], [STOP]]), [TWO]], max_new_tokens=2)
    assert caught.value.completions[1].tokens == [THREE, CAFE_C]


def test_an_overflow_of_float16_is_named_with_the_way_out(tokenizer):
    model = successor_model().half()
    with torch.no_grad():
        model.lm_head.weight *= 60000
    assert torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    with pytest.raises(NonFiniteLogitsError, match="float16 overflows above 65,504"):
        Engine(model, tokenizer, backend="dense").generate([[ONE]], max_new_tokens=2)


def test_a_request_whose_logits_are_nan_ends_alone(tokenizer):
    engine = Engine(poisoned_model(STOP), tokenizer, backend="dense", max_batch_size=4, max_length=64)
    bad, good = engine.submit([BANG], max_new_tokens=4), engine.submit([ONE], max_new_tokens=3)
    engine.run()
    assert (good.completion.tokens, good.finish_reason, good.error) == ([TWO, THREE, CAFE_C], "length", None)
    assert (bad.completion.tokens, bad.finish_reason) == ([STOP], "error")
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert "at new token 2" in str(bad.error)
