"""The engine: the tokens of the reference, in chunks, batches, streams, compiled; stops, limits and errors."""

import dataclasses

import pytest
import tokenizers
import torch
import transformers
from helpers import TINY, VIEW_OF, attend_densely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flex import (
    Completion,
    Engine,
    Ensemble,
    GenerationConfig,
    Llama,
    LlamaConfig,
    Mask,
    Sampling,
    ScoreMod,
    Tokenizer,
    Tokens,
    attention,
    choose,
    masks,
    score,
)
from llama_flex.engine.fusion import Prompt
from llama_flex.engine.output import NonFiniteLogitsError
from llama_flex.usercode.errors import CompileError

BORDERS = (1, 127, 128, 129, 300, 511, 512, 513, 640, 900)  # around the chunks of 128 and 512 rows


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    """Attention by its dense definition. `flex` switches back."""
    attend_densely(monkeypatch)


@pytest.fixture
def flex(dense, monkeypatch):
    monkeypatch.setattr(attention, "view_of", VIEW_OF)


def random_ids(length: int, seed: int, vocabulary: int = 500) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def reference_tokens(reference, prompt: list[int], new: int, **options) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def assert_same(one: Completion, other: Completion) -> None:
    assert one.tokens == other.tokens
    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=2e-5)


@pytest.fixture
def tiny(tiny_pair) -> Llama:
    return tiny_pair("gqa")[1]


@pytest.fixture
def engine(tiny) -> Engine:
    return Engine(tiny)


# --- A model whose text is known: after each token comes the next piece of this list, and after the last the first ---

PIECES = ["<unk>", "<s>", "</s>", "One", "Ġtwo", "Ġthree", "Ġc", "af", "Ã", "©", "!", "Ġstop", "Ġhere", "<end>"]
ONE, TWO, THREE, CAFE_C, CAFE_AF, E1, E2, BANG, STOP, HERE, END = range(3, len(PIECES))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<end>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return str(folder / "tokenizer.json")


def walk(
    eos: int | tuple[int, ...] | None = 2, generation: GenerationConfig | None = None, context: int = 200
) -> Llama:
    """A LLaMA after whose token n comes token n + 1 (after the last: <unk>), from its weights alone."""
    size = len(PIECES)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        eos_token_id=eos,
    )
    model = Llama(config, generation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        model.embed.weight[:, :size] = torch.eye(size)
        model.lm_head.weight[:, :size] = torch.eye(size).roll(1, 0)
    return model


@pytest.fixture
def spoken(tokenizer) -> Engine:
    return Engine(walk(), tokenizer)


# --- The reference's tokens ---


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("length", BORDERS)
def test_greedy_tokens_are_transformers_at_every_chunk_border(tiny_pair, length):
    reference, model = tiny_pair("gqa")
    prompt = random_ids(length, 1)
    (done,) = Engine(model).generate([prompt], max_new_tokens=6)
    assert done.tokens == reference_tokens(reference, prompt, 6)


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("shape", TINY)
def test_greedy_tokens_are_transformers_for_every_shape_in_one_ragged_batch(tiny_pair, shape):
    reference, model = tiny_pair(shape)
    prompts = [random_ids(length, 2) for length in (1, 140, 17)]
    for prompt, done in zip(prompts, Engine(model).generate(prompts, max_new_tokens=8), strict=True):
        assert done.tokens == reference_tokens(reference, prompt, 8)


def test_repetition_penalty_gives_transformers_tokens(tiny_pair):
    reference, model = tiny_pair("mha")
    prompts = [random_ids(length, 3) for length in (3, 131)]
    options = Sampling(repetition_penalty=1.4)
    for prompt, done in zip(prompts, Engine(model).generate(prompts, max_new_tokens=12, sampling=options), strict=True):
        assert done.tokens == reference_tokens(reference, prompt, 12, repetition_penalty=1.4)
        assert done.tokens != reference_tokens(reference, prompt, 12)


def test_the_default_stop_token_stops_where_transformers_stops(tiny_pair):
    reference, model = tiny_pair("gqa")
    prompt = random_ids(9, 4)
    eos = reference_tokens(reference, prompt, 8)[3]
    changed = Llama(dataclasses.replace(model.config, eos_token_id=eos)).eval()
    changed.load_state_dict(model.state_dict())
    (done,) = Engine(changed).generate([prompt], max_new_tokens=8)
    assert done.tokens == reference_tokens(reference, prompt, 8, eos_token_id=eos)
    assert done.tokens[-1] == eos
    assert done.finish_reason == "stop"


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("length", [1, 128, 300, 513])
def test_logprobs_are_those_of_the_full_forward(tiny, length):
    prompt = random_ids(length, 5)
    sampling = Sampling(temperature=1.5, top_k=50, seed=3)  # filters and temperature leave the logprob the model's own
    (done,) = Engine(tiny).generate([prompt], max_new_tokens=5, sampling=sampling, stop_token_ids=[])
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt + done.tokens]), backend="dense")[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]
    # On these weights transformers' own eager and sdpa differ by up to 3.1e-5.
    torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=2e-5, rtol=1e-5)


# --- Batches ---

RAGGED = (1, 300, 127, 5, 128, 129)


@pytest.mark.usefixtures("flex")
def test_a_ragged_batch_in_flex_attention_gives_the_tokens_of_the_dense_definition(engine, monkeypatch):
    prompts = [random_ids(length, 6) for length in RAGGED]
    sampling = [Sampling()] * 3 + [Sampling(temperature=1.0, seed=4)] * 3
    cache = engine.model.new_cache(len(prompts), 640)
    found = engine.generate(prompts, max_new_tokens=4, sampling=sampling, cache=cache)
    cache.truncate(100)
    found += engine.generate(prompts, max_new_tokens=4, sampling=sampling, cache=cache)
    attend_densely(monkeypatch)
    expected = engine.generate(prompts, max_new_tokens=4, sampling=sampling)
    kept = [p[:100] + t.tokens[:3][: max(0, 100 - len(p))] for p, t in zip(prompts, expected, strict=True)]
    whole = [k + p for k, p in zip(kept, prompts, strict=True)]
    expected += engine.generate(whole, max_new_tokens=4, sampling=sampling)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.0, top_p=0.95, top_k=100, seed=11),
        Sampling(temperature=1.2, min_p=0.01, repetition_penalty=1.2, seed=-5),
    ],
    ids=["greedy", "penalty", "sampled", "sampled with penalty"],
)
def test_a_ragged_batch_gives_each_prompt_its_own_tokens(engine, sampling):
    prompts = [random_ids(length, 6) for length in RAGGED]
    together = engine.generate(prompts, max_new_tokens=6, sampling=sampling)
    for prompt, done in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=6, sampling=sampling)
        assert_same(done, alone)


def test_each_prompt_of_a_batch_follows_its_own_sampling(engine):
    prompt = random_ids(20, 7)
    each = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, seed=2),
        Sampling(repetition_penalty=2.0),
        Sampling(temperature=0.7, top_k=3, seed=1),
        Sampling(temperature=1.3, top_p=0.5, seed=1),
    ]
    together = engine.generate([prompt] * len(each), max_new_tokens=6, sampling=each)
    for sampling, done in zip(each, together, strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=6, sampling=sampling)
        assert_same(done, alone)
    assert together[1].tokens != together[2].tokens


def test_a_seed_repeats_and_no_seed_does_not(engine):
    prompt = random_ids(4, 8)
    seeded = [engine.generate([prompt], max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=5)) for _ in "ab"]
    assert seeded[0] == seeded[1]
    unseeded = engine.generate([prompt] * 4, max_new_tokens=6, sampling=Sampling(temperature=1.5), stop_token_ids=[])
    assert len({tuple(done.tokens) for done in unseeded}) == 4


def test_rows_that_stop_do_not_disturb_the_others(engine):
    prompts = [random_ids(length, 9) for length in (6, 130, 33)]
    free = engine.generate(prompts, max_new_tokens=9, stop_token_ids=[])
    stops = [free[0].tokens[1], free[1].tokens[5]]
    together = engine.generate(prompts, max_new_tokens=9, stop_token_ids=stops)
    assert len({len(done.tokens) for done in together}) > 1
    for prompt, done, longest in zip(prompts, together, free, strict=True):
        assert done.tokens == longest.tokens[: len(done.tokens)]
        (alone,) = engine.generate([prompt], max_new_tokens=9, stop_token_ids=stops)
        assert_same(done, alone)


# --- Streams ---


def test_stream_yields_the_steps_that_generate_collects(engine):
    prompts = [random_ids(length, 10) for length in (3, 40)]
    steps = list(engine.stream(prompts, max_new_tokens=5, stop_token_ids=[]))
    assert [step.row for step in steps] == [0, 1] * 5
    collected = [Completion(), Completion()]
    for step in steps:
        assert collected[step.row].finish_reason is None
        collected[step.row].add(step)
    assert collected == engine.generate(prompts, max_new_tokens=5, stop_token_ids=[])
    assert [done.finish_reason for done in collected] == ["length", "length"]
    assert all(isinstance(step.token, int) and isinstance(step.logprob, float) for step in steps)


def test_stream_computes_no_further_than_it_is_asked(engine, monkeypatch):
    calls = []
    step = engine.model.step
    monkeypatch.setattr(engine.model, "step", lambda ids, *rest: calls.append(tuple(ids.shape)) or step(ids, *rest))
    stream = engine.stream([random_ids(200, 11)], max_new_tokens=50)
    assert calls == []
    next(stream)
    assert calls == [(1, 128), (1, 128)]
    next(stream)
    assert calls == [(1, 128), (1, 128), (1, 1)]
    stream.close()


def test_the_last_token_is_not_fed(engine, monkeypatch):
    calls = []
    step = engine.model.step
    monkeypatch.setattr(engine.model, "step", lambda ids, *rest: calls.append(ids.shape[1]) or step(ids, *rest))
    engine.generate([random_ids(5, 12)], max_new_tokens=1)
    assert calls == [128]


def test_closing_a_stream_leaves_the_engine_as_it_was(engine):
    prompt = random_ids(30, 13)
    before = engine.generate([prompt], max_new_tokens=5)
    stream = engine.stream([prompt], max_new_tokens=50)
    next(stream), next(stream)
    stream.close()
    assert torch.is_grad_enabled()
    assert engine.generate([prompt], max_new_tokens=5) == before


def test_streams_side_by_side_do_not_mix(engine):
    prompts = [random_ids(30, 14), random_ids(7, 14)]
    streams = [engine.stream([prompt], max_new_tokens=5, stop_token_ids=[]) for prompt in prompts]
    tokens = [[step.token for step in pair] for pair in zip(*streams, strict=True)]
    alone = [engine.generate([p], max_new_tokens=5, stop_token_ids=[])[0].tokens for p in prompts]
    assert [list(t) for t in zip(*tokens, strict=True)] == alone


def test_an_interrupt_midway_leaves_the_engine_usable(engine, monkeypatch):
    prompt = random_ids(30, 15)
    before = engine.generate([prompt], max_new_tokens=5)
    step, calls = engine.model.step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt], max_new_tokens=5)
    assert torch.is_grad_enabled()
    assert engine.generate([prompt], max_new_tokens=5) == before


def test_gradients_are_neither_computed_nor_switched_off_for_the_caller(engine):
    for _ in engine.stream([random_ids(3, 16)], max_new_tokens=2):
        assert torch.is_grad_enabled()


# --- Stops and text ---


def test_text_is_whole_characters_and_joins_to_the_decoded_tokens(spoken, tokenizer):
    steps = list(spoken.stream([[ONE]], max_new_tokens=8))
    assert [step.text for step in steps] == [" two", " three", " c", "af", "", "é", "!", " stop"]
    assert "".join(step.text for step in steps) == tokenizer.decode([step.token for step in steps])


def test_an_unfinished_character_comes_out_at_the_end(spoken):
    (done,) = spoken.generate([[CAFE_C]], max_new_tokens=2)
    assert done.tokens == [CAFE_AF, E1]
    assert done.text == "af\ufffd"


def test_without_a_tokenizer_there_are_tokens_and_no_text(spoken):
    engine = Engine(spoken.model)
    (done,) = engine.generate([[ONE]], max_new_tokens=2)
    assert (done.tokens, done.text) == ([TWO, THREE], None)
    assert [step.text for step in engine.stream([[ONE]], max_new_tokens=2)] == [None, None]
    request = engine.submit([ONE], max_new_tokens=2)
    engine.run()
    assert (request.completion.tokens, request.completion.text) == ([TWO, THREE], None)


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
    model = walk(config_eos, GenerationConfig(eos_token_id=generation_eos))
    (done,) = Engine(model, tokenizer).generate([[ONE]], max_new_tokens=40, stop_token_ids=given)
    assert done.tokens == list(range(TWO, last + 1))
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("given", [None, []])
def test_with_no_stop_token_only_the_length_ends_the_text(tokenizer, given):
    model = walk(eos=None if given is None else END)
    (done,) = Engine(model, tokenizer).generate([[ONE]], max_new_tokens=20, stop_token_ids=given)
    assert len(done.tokens) == 20
    assert done.finish_reason == "length"


def test_a_stop_token_is_in_the_tokens_and_not_in_the_text(tokenizer):
    (done,) = Engine(walk(eos=END), tokenizer).generate([[BANG]], max_new_tokens=9)
    assert done.tokens == [STOP, HERE, END]
    assert len(done.logprobs) == 3
    assert done.text == " stop here"


def test_a_stop_token_as_the_very_last_one_is_a_stop(tokenizer):
    (done,) = Engine(walk(eos=END), tokenizer).generate([[BANG]], max_new_tokens=3)
    assert (done.tokens[-1], done.finish_reason) == (END, "stop")


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
def test_a_stop_string_ends_the_text_before_it(spoken, stop, text, tokens):
    steps = list(spoken.stream([[ONE]], max_new_tokens=10, stop=stop))
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
    engine = Engine(walk(), tokenizer)
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


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(spoken):
    steps = list(spoken.stream([[ONE]], max_new_tokens=4, stop=["three cat"]))
    assert [step.text for step in steps] == [" two", " ", "", "three caf"]


def test_what_was_held_back_is_released_when_the_length_ends_the_text(spoken):
    (done,) = spoken.generate([[ONE]], max_new_tokens=2, stop=["three cafés"])
    assert (done.text, done.finish_reason) == (" two three", "length")


def test_what_was_held_back_is_released_when_a_stop_token_ends_the_text(spoken):
    (done,) = spoken.generate([[BANG]], max_new_tokens=9, stop=["here and there"], stop_token_ids=[END])
    assert (done.text, done.finish_reason) == (" stop here", "stop")


@pytest.mark.parametrize(("stop", "text"), [(["here<end>"], " stop "), (["<end>"], " stop here"), (["p"], " sto")])
def test_a_stop_token_may_complete_a_stop_string(spoken, stop, text):
    (done,) = spoken.generate([[BANG]], max_new_tokens=9, stop=stop, stop_token_ids=[END])
    assert (done.text, done.finish_reason) == (text, "stop")


def test_a_stop_string_in_the_prompt_does_not_stop(spoken):
    (done,) = spoken.generate(
        [[ONE, TWO]], max_new_tokens=2, stop=["two", "One", "two three"]
    )  # nor one that begins there
    assert done.text == " three c"


def test_rows_stop_each_at_its_own_stop_string_token_or_length(spoken):
    rows = spoken.generate([[ONE], [E2], [CAFE_AF, E1]], max_new_tokens=4, stop=[" three"], stop_token_ids=[HERE])
    assert [done.text for done in rows] == [" two", "! stop", "é! stop"]  # a stop token has no text
    assert [len(done.tokens) for done in rows] == [2, 3, 4]
    assert [done.finish_reason for done in rows] == ["stop", "stop", "stop"]


# --- Limits ---


@pytest.mark.parametrize("new", [1, 2, 7])
def test_exactly_max_new_tokens_come(spoken, new):
    (done,) = spoken.generate([[ONE]], max_new_tokens=new, stop_token_ids=[])
    assert len(done.tokens) == len(done.logprobs) == new
    assert done.finish_reason == "length"


def test_max_new_tokens_defaults_to_generation_config(tokenizer):
    model = walk(generation=GenerationConfig(max_new_tokens=3))
    (done,) = Engine(model, tokenizer).generate([[ONE]])
    assert len(done.tokens) == 3


def test_by_default_the_context_is_the_limit_where_it_is_short(tokenizer):
    model = walk(eos=None, context=12)
    (done,) = Engine(model, tokenizer).generate([[ONE] * 8])
    assert len(done.tokens) == 4


def test_the_context_can_be_filled_to_the_last_token(tokenizer):
    engine = Engine(walk(eos=None, context=12), tokenizer)
    assert len(engine.generate([[ONE] * 8], max_new_tokens=4)[0].tokens) == 4
    assert len(engine.generate([[ONE] * 11], max_new_tokens=1)[0].tokens) == 1


def test_generation_configs_sampling_is_the_default(tokenizer):
    model = walk(generation=GenerationConfig(do_sample=True, temperature=30.0, max_new_tokens=20), eos=None)
    engine = Engine(model, tokenizer)
    rows = engine.generate([[ONE]] * 2)
    assert rows[0].tokens != rows[1].tokens  # drawn, not greedy
    (greedy,) = engine.generate([[ONE]], sampling=Sampling(), max_new_tokens=3)
    assert greedy.tokens == [TWO, THREE, CAFE_C]


# --- Errors, before any work ---


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
def test_malformed_stop_strings_are_refused_before_any_work(spoken, monkeypatch, stop):
    monkeypatch.setattr(spoken.model, "step", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="stop string"):
        spoken.generate([[ONE]], stop=stop)


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


# --- A cache given ---


@pytest.mark.parametrize("first", [5, 128, 200])
def test_two_calls_with_one_cache_are_one_call_on_the_whole(engine, first):
    cache = engine.model.new_cache(1, 512)
    start, more = random_ids(first, 18), random_ids(135, 19)
    (one,) = engine.generate([start], max_new_tokens=4, stop_token_ids=[], cache=cache)
    assert cache.length.tolist() == [first + 3]  # the last token was never fed
    (two,) = engine.generate([one.tokens[-1:] + more], max_new_tokens=4, stop_token_ids=[], cache=cache)
    (whole,) = engine.generate([start + one.tokens + more], max_new_tokens=4, stop_token_ids=[])
    assert_same(two, whole)


def test_a_ragged_batch_continues_in_its_cache(engine):
    cache = engine.model.new_cache(2, 512)
    starts, more = [random_ids(9, 20), random_ids(140, 20)], [random_ids(150, 21), random_ids(2, 21)]
    ones = engine.generate(starts, max_new_tokens=3, stop_token_ids=[], cache=cache)
    nexts = [one.tokens[-1:] + m for one, m in zip(ones, more, strict=True)]
    twos = engine.generate(nexts, max_new_tokens=3, stop_token_ids=[], cache=cache)
    for start, one, m, two in zip(starts, ones, more, twos, strict=True):
        (whole,) = engine.generate([start + one.tokens + m], max_new_tokens=3, stop_token_ids=[])
        assert_same(two, whole)


@pytest.mark.parametrize("kept", [0, 1, 127, 128, 150])
def test_a_truncated_cache_continues_as_a_fresh_one(engine, kept):
    cache = engine.model.new_cache(1, 256)
    start, more = random_ids(160, 22), random_ids(10, 23)
    engine.generate([start], max_new_tokens=3, cache=cache)
    cache.truncate(kept)
    (continued,) = engine.generate([more], max_new_tokens=4, cache=cache)
    (fresh,) = engine.generate([start[:kept] + more], max_new_tokens=4)
    assert_same(continued, fresh)


def test_an_interrupted_cache_is_good_again_once_truncated(engine, monkeypatch):
    cache = engine.model.new_cache(1, 256)
    prompt = random_ids(40, 24)
    step, calls = engine.model.step, []

    def interrupted(*args):
        logits = step(*args)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompt], max_new_tokens=9, cache=cache)
    cache.truncate(30)
    (continued,) = engine.generate([prompt[30:]], max_new_tokens=4, cache=cache)
    assert_same(continued, engine.generate([prompt], max_new_tokens=4)[0])


# --- Pieces: any split of a text gives the logits of the whole ---


@st.composite
def pieces(draw, most: int) -> list[list[int]]:
    """For every piece, how many tokens each row gets; rows have different numbers, none included."""
    rows = draw(st.integers(1, 3))
    count = st.one_of(st.integers(0, 9), st.sampled_from([0, 1, 63, 127, 128, 129]))
    return draw(st.lists(st.lists(count, min_size=rows, max_size=rows), min_size=1, max_size=most))


def check_pieces(model: Llama, pieces: list[list[int]], padding: list[int], seed: int, backend: str) -> None:
    totals = [sum(counts) for counts in zip(*pieces, strict=True)]
    widths = [max(1, max(counts) + pad) for counts, pad in zip(pieces, padding, strict=False)]
    rows = [random_ids(total, seed + i) for i, total in enumerate(totals)]
    cache = model.new_cache(len(rows), sum(widths))
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    with torch.no_grad():
        for counts, width in zip(pieces, widths, strict=False):
            ids = torch.full((len(rows), width), 499)
            for row, count in enumerate(counts):
                ids[row, :count] = torch.tensor(rows[row][done[row] : done[row] + count])
            logits = model(ids, cache=cache, lengths=torch.tensor(counts), backend=backend)
            for row, count in enumerate(counts):
                found[row].append(logits[row, :count])
                done[row] += count
        assert cache.length.tolist() == totals
        for row, parts in zip(rows, found, strict=True):
            if row:
                expected = model(torch.tensor([row]), backend="dense")[0]
                spread = (expected.max() - expected.min()).item()
                torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5 * spread, rtol=0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=pieces(5), padding=st.lists(st.integers(0, 40), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_a_text_split_at_random_gives_the_logits_of_the_whole(tiny, pieces, padding, seed):
    check_pieces(tiny, pieces, padding, seed, "dense")


@pytest.mark.usefixtures("flex")
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=pieces(3), padding=st.lists(st.integers(0, 40), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_text_split_at_random_gives_the_logits_of_the_whole_in_flex_attention(tiny, pieces, padding, seed):
    check_pieces(tiny, pieces, padding, seed, "flex")


# --- Compiled ---


@pytest.mark.usefixtures("flex")
def test_three_graphs_serve_prompts_of_every_length_and_give_the_eager_tokens(tiny):
    eager, compiled = Engine(tiny), Engine(tiny, compile=True)
    prompts = [random_ids(length, 25) for length in (1, 5, 127, 128, 129, 300, 600)]
    options = {"max_new_tokens": 3, "stop_token_ids": []}
    expected = [eager.generate([prompt], **options)[0] for prompt in [*prompts, prompts[-1][:200]]]
    torch._dynamo.utils.counters.clear()  # run eagerly, flex_attention traces itself too
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [compiled.generate([prompt], **options)[0] for prompt in prompts]
        long = prompts[-1]
        compiled.generate([long], max_new_tokens=2, sampling=Sampling(temperature=1.0, top_p=0.9, seed=1))
        compiled.generate([long], max_new_tokens=2, sampling=Sampling(repetition_penalty=1.1))
        cache = compiled.new_cache(1, 700)
        compiled.generate([long[:50]], max_new_tokens=2, cache=cache)
        cache.truncate(20)
        found += compiled.generate([long[20:200]], cache=cache, **options)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert sorted(key[:3] for key in compiled.steps) == [(1, 1, 1024), (1, 128, 1024), (1, 512, 1024)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled.graphs.count == 2 * 3 + 3
    assert compiled.compile_seconds > 0
    assert not eager.steps
    assert not eager.graphs.count


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("operation", ["fork", "reorder", "evict", "truncate"])
def test_a_compiled_stream_follows_what_happens_to_its_cache(tiny, operation, rolling):
    """Steps are replayed on the memory they were recorded on; it may change hands between two tokens."""
    prompts, forks, ends = [random_ids(40, 31), random_ids(9, 31)], [], []

    def generated(engine: Engine) -> list[int]:
        cache = tiny.new_rolling_cache(2, 20, 2, largest_append=128) if rolling else tiny.new_cache(2, 200)
        tokens = []
        for n, step in enumerate(engine.stream(prompts, max_new_tokens=16, stop_token_ids=[], cache=cache)):
            tokens.append(step.token)
            if n == 15:
                if operation == "fork":
                    forks.append(cache.fork())
                elif operation == "reorder":
                    cache.reorder([1, 0])
                elif operation == "evict":
                    cache.evict(lambda t: (t.index == t.index.amax(1, keepdim=True)) | (t.index == 0))
                elif rolling:
                    cache.truncate(0)
                else:
                    cache.truncate(9)
        ends.append((cache.tokens.index.amax(1).tolist(), cache.rolled_out.tolist()))
        return tokens

    found, expected = generated(Engine(tiny, compile=True)), generated(Engine(tiny))
    assert found == expected
    assert ends[0] == ends[1]
    if forks:  # they hold what the cache held then
        ours, theirs = (fork.layers[0][0] for fork in forks)
        assert torch.equal(forks[0].tokens.index, forks[1].tokens.index)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- Real weights ---

TEXTS = {
    "one word": "Gravity",
    "prose": "The old lighthouse keeper climbed the stairs every evening, and",
    "question": "Question: What is the capital of France?\nAnswer:",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "json": '{"name": "Ada", "age": 36, "languages": ["',
    "digits": "3.14159265358979323846264338327950288419716939937510, 1000000007, 0x7fffffff, 12345678901234567890",
    "accents": "À Noël, où Zoë naïve œuvrait près d'un garçon çà et là, l'été déjà",
    "emoji": "Weather report 🌦️: today ☀️🌡️ 31°C, tomorrow ⛈️. Family 👨‍👩‍👧‍👦 says",
    "scripts": "日本語の文章と русский текст и ελληνικά και العربية:",
    "spaces": "a\t\tb   c\r\n\r\n\r\n      d        ",
    "chat": "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "repetition": "spam " * 60,
}


@pytest.mark.usefixtures("flex")
@pytest.mark.weights
def test_greedy_text_of_the_demo_weights_is_transformers_token_for_token(demo_folder, demo, demo_reference):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    prompts = {name: tokenizer.encode(text) for name, text in TEXTS.items()}
    prompts["empty"] = [tokenizer.bos_token_id]
    long = tokenizer.encode(" ".join(f"Item {i}: {text}" for i in range(5) for text in TEXTS.values()))
    prompts["a long one"] = long[:900]
    assert {len(prompt) for prompt in prompts.values()} >= {1, 900}

    engine = Engine(demo, tokenizer, compile=True)
    differ = {}
    for name, prompt in prompts.items():
        (done,) = engine.generate([prompt], max_new_tokens=64)
        # If each token is the most likely one after those before it, they are the reference's greedy tokens; one
        # forward pass tells, where `generate` takes 64.
        with torch.no_grad():
            logits = demo_reference(torch.tensor([prompt + done.tokens])).logits[0, len(prompt) - 1 : -1]
        best, second = logits.topk(2).values.T
        for i in (logits.argmax(-1) != torch.tensor(done.tokens)).nonzero().flatten().tolist()[:1]:
            differ[name] = f"at token {i}: {done.tokens[i]}, not {logits[i].argmax()}, ahead by {best[i] - second[i]}"
        assert len(done.tokens) == 64 or done.tokens[-1] in demo.eos_token_ids
        assert not set(done.tokens[:-1]) & set(demo.eos_token_ids)
        assert done.text == tokenizer.decode(prompt + done.tokens).removeprefix(tokenizer.decode(prompt))
        if name in ("chat", "empty", "emoji"):
            assert done.tokens == reference_tokens(demo_reference, prompt, 64)
    assert not differ
    assert sorted(key[:3] for key in engine.steps) == [(1, 1, 8192), (1, 128, 8192), (1, 512, 8192)]


# --- Masks, kinds of prompts, and failures midway ---


@pytest.mark.parametrize("compile", [False, True])
def test_a_mask_holds_in_cached_generation(tiny_pair, compile):
    """Greedy tokens under a window, against the full forward with the same window at every step."""
    _, model = tiny_pair("gqa")
    window = masks.causal() & Mask(lambda q, kv: q.index - kv.index < 20, "window(20)")
    prompts = [list(range(3, 140)), [7, 8, 9]]
    engine = Engine(model, compile=compile)
    found = engine.generate(prompts, max_new_tokens=5, stop_token_ids=(), mask=window)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            assert token == model(torch.tensor([ids]), mask=window, backend="dense")[0, -1].argmax()
            ids.append(token)
    plain = engine.generate(prompts, max_new_tokens=5, stop_token_ids=())
    assert plain[0].tokens != found[0].tokens


@pytest.mark.parametrize("compile", [False, True])
def test_a_mask_that_looks_ahead_holds_in_prompts_of_any_length(tiny_pair, compile):
    """The reference is one forward over all, densely."""
    _, model = tiny_pair("gqa")
    engine, new = Engine(model, compile=compile), {"max_new_tokens": 1, "stop_token_ids": ()}
    prompts = [random_ids(length, 5) for length in (450, 20, 129)]
    given = [Prompt(ids, range(len(ids)), [n // 200 for n in range(len(ids))]) for ids in prompts]
    causal = engine.generate(given, **new)
    wide = masks.prefix_lm(300), [masks.prefix_lm(600), None], masks.document() | masks.causal()
    for mask in wide:
        found = engine.generate(given, **new, mask=mask)
        for prompt, one in zip(given, found, strict=True):
            segments = torch.tensor([prompt.segments])
            logits = model(torch.tensor([prompt.ids]), mask=mask, segments=segments, backend="dense")[0, -1]
            assert one.tokens == [int(logits.argmax())]
            assert one.logprobs[0] == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-3)
        assert abs(causal[0].logprobs[0] - found[0].logprobs[0]) > 1e-2


def test_each_prompt_has_its_own_room_in_the_context(tiny_pair):
    _, model = tiny_pair("gqa")
    room = model.config.max_position_embeddings - 1020
    short, long = Engine(model).check([[5], [5] * 1020])
    assert (short, long) == (256, room)


@pytest.mark.parametrize("prompts", [[1, 2, 3], ["abc"], [[1.5]], "abc", [None]])
def test_prompts_that_are_no_lists_of_ids_are_refused(tiny_pair, prompts):
    with pytest.raises(ValueError, match="lists of token ids"):
        Engine(tiny_pair("gqa")[1]).stream(prompts)


def test_a_failed_step_leaves_the_cache_as_it_was(tiny_pair):
    _, model = tiny_pair("gqa")
    cache = model.new_cache(1, 128)
    model(torch.tensor([[3, 4, 5]]), cache=cache)
    before = [x.clone() for x in cache.tokens]

    def broken(q, kv):
        if kv._tokens.index.numel() > 1:  # not where it is tried on one token, before any work
            raise KeyboardInterrupt
        return kv.index <= q.index

    def interrupt(*_):
        raise KeyboardInterrupt

    for arguments, hook in (({"mask": Mask(broken)}, lambda *_: None), ({}, interrupt)):
        handle = model.layers[-1].mlp.register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[5, 6]]), cache=cache, **arguments)
        handle.remove()
        assert cache.length.tolist() == [3]
        assert cache.reserved == 3
        assert torch.equal(cache.tokens.index, before[0])


def test_a_cache_of_another_model_is_refused(tiny_pair):
    cache = tiny_pair("mqa")[1].new_cache(1, 128)
    with pytest.raises(ValueError, match="of another model"):
        Engine(tiny_pair("gqa")[1]).stream([[1]], cache=cache)


# --- Logits that are no numbers ---


def poisoned(token: int) -> Llama:
    """A model whose logits are NaN after a token."""
    model = walk()
    with torch.no_grad():
        model.embed.weight[token] = torch.nan
    return model


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("compile", [False, True])
def test_a_prompt_whose_logits_are_nan_ends_alone_and_is_named(tokenizer, compile):
    engine = Engine(poisoned(STOP), tokenizer, compile=compile)
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
    steps, stream = [], Engine(poisoned(STOP), tokenizer).stream([[STOP], [BANG], [ONE]], max_new_tokens=3)
    with pytest.raises(NonFiniteLogitsError, match="prompt 0 at new token 1, prompt 1 at new token 2"):
        steps.extend((step.row, step.token) for step in stream)
    assert steps == [(1, STOP), (2, TWO), (2, THREE), (2, CAFE_C)]


def test_a_member_of_an_ensemble_whose_logits_are_nan_ends_the_ensemble(tokenizer):
    with pytest.raises(NonFiniteLogitsError, match="prompt 0 at new token 1") as caught:
        Engine(poisoned(STOP), tokenizer).generate([Ensemble([[ONE], [STOP]]), [TWO]], max_new_tokens=2)
    assert caught.value.completions[1].tokens == [THREE, CAFE_C]


def test_an_overflow_of_float16_is_named_with_the_way_out(tokenizer):
    model = walk().half()
    with torch.no_grad():
        model.lm_head.weight *= 60000
    assert torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    with pytest.raises(NonFiniteLogitsError, match="float16 ends at 65,504"):
        Engine(model, tokenizer).generate([[ONE]], max_new_tokens=2)


def test_a_request_whose_logits_are_nan_ends_alone(tokenizer):
    engine = Engine(poisoned(STOP), tokenizer, max_batch_size=4, max_length=64)
    bad, good = engine.submit([BANG], max_new_tokens=4), engine.submit([ONE], max_new_tokens=3)
    engine.run()
    assert (good.completion.tokens, good.finish_reason, good.error) == ([TWO, THREE, CAFE_C], "length", None)
    assert (bad.completion.tokens, bad.finish_reason) == ([STOP], "error")
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert "at new token 2" in str(bad.error)


def test_scores_that_are_nan_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"NaN or infinite at token 1 of the continuation \[9, 4\]"):
        score(poisoned(9), [ONE], [[9, 4]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose(poisoned(ONE), [ONE], [[4], [5]])


# --- A cache goes on from other tokens ---


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_what_is_in_the_cache_counts_for_the_penalty_once_it_is_named(tiny, penalty):
    start, sampling = random_ids(30, 5), Sampling(repetition_penalty=penalty)
    prompt = start + Engine(tiny).generate([start], max_new_tokens=60)[0].tokens
    (whole,) = Engine(tiny).generate([prompt], max_new_tokens=20, sampling=sampling)
    for cut in (1, 50, 89):
        cache = tiny.new_cache(1, 128)
        tiny(torch.tensor([prompt[:cut]]), cache=cache, backend="dense")
        options = {"max_new_tokens": 20, "sampling": sampling, "cache": cache}
        (done,) = Engine(tiny).generate([prompt[cut:]], cached_ids=[prompt[:cut]], **options)
        assert done.tokens == whole.tokens
    cache = tiny.new_cache(1, 128)
    tiny(torch.tensor([prompt[:89]]), cache=cache, backend="dense")
    options = {"max_new_tokens": 20, "sampling": sampling, "cache": cache}
    (unnamed,) = Engine(tiny).generate([prompt[89:]], **options)
    assert (unnamed.tokens == whole.tokens) == (penalty == 1)


def test_text_goes_on_from_what_is_in_the_cache(spoken):
    """Half a character lies in the cache: the other half completes it, and is not printed as a character of its own."""
    cache = spoken.model.new_cache(1, 128)
    with torch.no_grad():
        spoken.model(torch.tensor([[CAFE_AF]]), cache=cache, backend="dense")
    prompt = {"prompts": [[E1]], "max_new_tokens": 2, "cache": cache}
    (done,) = spoken.generate(cached_ids=[[CAFE_AF]], **prompt)
    assert done.tokens == [E2, BANG]
    assert done.text == spoken.generate([[CAFE_AF, E1]], max_new_tokens=2)[0].text


def test_a_model_that_is_moved_amid_a_stream_ends_it_with_one_line(tokenizer):
    model = walk(eos=None)
    steps = Engine(model, tokenizer).stream([[ONE]], max_new_tokens=5)
    next(steps)
    model.to(torch.float64)
    with pytest.raises(ValueError, match=r"from torch\.float32 on cpu to torch\.float64 on cpu amid a stream"):
        list(steps)


def test_without_a_tokenizer_there_is_no_text_from_the_beginning():
    engine = Engine(walk(eos=None))
    request = engine.submit([ONE], max_new_tokens=2)
    assert request.completion.text is None
    engine.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLogitsError) as raised:
        engine.generate([[ONE]], max_new_tokens=2)
    assert raised.value.completions[0].text is None


@pytest.mark.parametrize(
    ("cached_ids", "message"),
    [
        ([], "cached_ids must hold a list of token ids for each of 1 prompts"),
        (3, r", such as \[\[1, 2, 3\]\], not 3"),
        ([3], r"not \[3\]"),
        ([[True]], r"not \[\[True\]\]"),
        ([[1], [2]], r"not \[\[1\], \[2\]\]"),
        ([[999]], "cached_ids 0 has a token id"),
        ([["x"]], "ids"),
    ],
)
def test_wrong_ids_of_a_cache_are_named(spoken, cached_ids, message):
    with pytest.raises(ValueError, match=message):
        spoken.generate([[ONE]], cache=spoken.model.new_cache(1, 20), cached_ids=cached_ids, max_new_tokens=1)


def test_ids_of_a_cache_need_one(spoken):
    with pytest.raises(ValueError, match="give that too: cache="):
        spoken.generate([[ONE]], cached_ids=[[1]])


# --- Looking ahead ---


def cells_of_a_prompt(monkeypatch, engine: Engine, length: int, mask: Mask | None) -> tuple[int, int]:
    """How many cells of the mask are evaluated to find out whether it looks ahead, and how many to list its blocks."""
    counts = {True: 0, False: 0}
    cells, looks_ahead, asking = Mask._cells, Engine._looks_ahead, []

    def counted(self, *given):
        answers = cells(self, *given)
        counts[bool(asking)] += answers[:, 0].numel()
        return answers

    def asked(self, *given):
        asking.append(1)
        try:
            return looks_ahead(self, *given)
        finally:
            asking.pop()

    with monkeypatch.context() as patch:
        patch.setattr(Mask, "_cells", counted)
        patch.setattr(Engine, "_looks_ahead", asked)
        engine.generate([[3] * length], max_new_tokens=1, mask=mask)
    return counts[True], counts[False]


@pytest.mark.usefixtures("flex")
def test_only_opaque_masks_are_asked_whether_they_look_ahead_and_at_no_more_than_their_lists_cost(monkeypatch, tiny):
    named = masks.causal() & masks.sliding_window(64) | masks.sink(4) & masks.causal()
    for mask in (None, masks.causal(), named, masks.document() & masks.chunked(30), masks.fused()):
        asked, _ = cells_of_a_prompt(monkeypatch, Engine(tiny), 700, mask)
        assert asked == 0, mask
    opaque = Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < 64))
    asked, listed = cells_of_a_prompt(monkeypatch, Engine(tiny), 700, opaque)
    assert 0 < asked <= listed


NAMED = {
    "causal": masks.causal(),
    "sliding_window": masks.sliding_window(3),
    "sink": masks.sink(2),
    "chunked": masks.chunked(4),
    "dilated": masks.dilated(2),
    "shared_prefix": masks.shared_prefix(3),
    "fused": masks.fused(),
    "tree": masks.tree([-1, 0, 0, 1], 2),
    "document": masks.document(),
    "bidirectional": masks.bidirectional(),
    "bidirectional_window": masks.bidirectional_window(2),
    "prefix_lm": masks.prefix_lm(5),
    "global_tokens": masks.global_tokens([0, 3]),
}


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_mask_that_promises_never_to_look_ahead_does_not(data):
    tokens = Tokens.arriving(12, segments=torch.arange(12) // 5)
    mask = NAMED[data.draw(st.sampled_from(list(NAMED)))]
    for _ in range(data.draw(st.integers(0, 3))):
        other = NAMED[data.draw(st.sampled_from(list(NAMED)))]
        mask = data.draw(st.sampled_from([mask & other, mask | other, ~mask]))
    ahead = bool(mask.dense(tokens, tokens, 1)[0, 0].triu(1).any())
    assert not (mask.never_looks_ahead and ahead)
    assert mask.to("meta").never_looks_ahead == mask.never_looks_ahead


def test_all_named_masks_that_look_back_only_say_so():
    assert {name for name, mask in NAMED.items() if mask.never_looks_ahead} == {
        *("causal", "sliding_window", "sink", "chunked", "dilated", "shared_prefix", "fused", "tree")
    }


# --- Any mask_mod, any score_mod ---


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("compile", [False, True])
def test_functions_that_hold_for_one_cell_at_a_time_hold_in_generation(tiny, compile):
    """Of a table a row, and of that a number; and a product of two rows, which torch compiles in no score function."""
    table = torch.tensor([[0, 200], [5, 90]])
    mask = Mask.from_mask_mod(lambda b, h, q, k: (q >= k) & (k >= table[k % 2][0]) & (k < table[k % 2][1]))
    same = Mask(lambda q, kv: (kv.index <= q.index) & (kv.index % 2 == 0) | (kv.index >= 5) & (kv.index <= q.index))
    same = same & Mask(lambda q, kv: (kv.index % 2 == 0) | (kv.index < 90))
    engine, prompt = Engine(tiny, compile=compile), random_ids(140, 6)
    (done,), (expected,) = (engine.generate([prompt], max_new_tokens=6, mask=m) for m in (mask, same))
    (usual,) = engine.generate([prompt], max_new_tokens=6)
    assert done.tokens == expected.tokens != usual.tokens
    request = engine.submit(prompt, max_new_tokens=6, mask=mask)
    engine.run()
    assert request.completion.tokens == done.tokens
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    product = ScoreMod.from_score_mod(lambda s, b, h, q, k: s + torch.dot(rows[q], rows[k]))
    if compile:
        with pytest.raises(CompileError, match=r"torch cannot compile: .* no code for; or .*compile=False"):
            engine.generate([prompt], max_new_tokens=6, score_mod=product)
        return
    full = tiny(torch.tensor([prompt]), score_mod=product, backend="dense")
    (done,) = engine.generate([prompt], max_new_tokens=1, score_mod=product)
    assert done.tokens == [int(full[0, -1].argmax())]


# --- Both directions ---


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize(("kind", "window"), [("Llama", None), ("Mistral", 40)])
def test_a_model_that_is_not_causal_attends_both_ways_as_in_transformers(tmp_path, kind, window):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2000,
        is_causal=False,
        **({} if window is None else {"sliding_window": window}),
    )
    reference = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    reference.save_pretrained(tmp_path)
    model = Llama.from_pretrained(tmp_path, device="cpu")
    prompt = random_ids(700, 7)  # more than a chunk
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits
        for backend in ("flex", "dense"):
            ours = model(torch.tensor([prompt]), backend=backend)
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)
        assert (model(torch.tensor([prompt]), mask=masks.causal()) - expected).abs().max() > 0.1
    (done,) = Engine(model).generate([prompt], max_new_tokens=5)
    if window is None:  # with a window, transformers' cache drops what its own mask of later tokens would see
        assert done.tokens == reference_tokens(reference, prompt, 5)
    assert done.tokens[0] == int(expected[0, -1].argmax())
    engine = Engine(model, max_length=1000)
    for left_to_the_model in ({}, {"score_mod": ScoreMod(lambda s, q, kv: s * 0.5)}, {"mask": [None, masks.causal()]}):
        with pytest.raises(ValueError, match="is_causal is false"):
            engine.submit(prompt, **left_to_the_model)
    model.save_pretrained(tmp_path / "saved")
    assert LlamaConfig.from_pretrained(tmp_path / "saved").is_causal is False


# --- Options ---


@pytest.mark.parametrize("name", ["generate", "submit", "submit_samples"])
def test_an_unknown_option_names_what_was_called_and_what_may_be_meant(spoken, name):
    prompts = [[ONE]] if name == "generate" else [ONE]
    more = {"n": 2, "sampling": Sampling()} if name == "submit_samples" else {}
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected .* 'max_token'; did you mean 'max_new_tokens'"
    ):
        getattr(spoken, name)(prompts, max_token=5, **more)


@pytest.mark.parametrize("wrong", [True, 1.5, "3", None])
def test_what_is_no_id_is_refused(spoken, wrong):
    with pytest.raises(ValueError, match="token ids"):
        spoken.generate([[ONE, wrong]])
    with pytest.raises(ValueError, match="token ids"):
        spoken.generate([[ONE]], stop_token_ids=[wrong])
    if wrong is not None:
        with pytest.raises(ValueError, match="max_new_tokens must be a whole number"):
            spoken.generate([[ONE]], max_new_tokens=wrong)


def test_max_length_caps_the_number_of_new_tokens_where_nobody_says(tokenizer):
    model = walk(eos=None, generation=GenerationConfig(max_length=12))
    assert len(Engine(model, tokenizer).generate([[ONE] * 5])[0].tokens) == 7
    assert len(Engine(model, tokenizer).generate([[ONE] * 5], max_new_tokens=20)[0].tokens) == 20
    assert len(Engine(model, tokenizer).generate([[ONE] * 11])[0].tokens) == 1
    for prompt in ([ONE] * 12, [ONE] * 30):  # as transformers
        rule = f"prompt 1: {len(prompt)} tokens leave no room in the 12 that generation_config.json has as max_length"
        with pytest.raises(ValueError, match=rule):
            Engine(model, tokenizer).generate([[ONE], prompt])
