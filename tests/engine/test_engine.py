"""Generate: the tokens and log-probabilities of transformers, in chunks, ragged batches and on real weights."""

import dataclasses

import pytest
import torch
from generation_helpers import CAFE_C, ONE, THREE, TWO, assert_same, reference_tokens, successor_model
from helpers import TINY, few, random_ids

from llama_flex import Engine, GenerationConfig, Llama, Sampling, Tokenizer

SHAPES = ("gqa", "group3", "biases", "odd_vocab")  # of TINY, for every run of the tests


# --- The tokens of transformers ---


@pytest.mark.parametrize("length", few((1, 128, 129, 513), (127, 300, 511, 512, 640, 900)))  # chunks: 128, 512
def test_greedy_tokens_are_transformers_at_every_chunk_border(tiny_pair, length):
    reference, model = tiny_pair("gqa")
    prompt = random_ids(length, 1)
    (done,) = Engine(model).generate([prompt], max_new_tokens=6)
    assert done.tokens == reference_tokens(reference, prompt, 6)


@pytest.mark.parametrize("shape", few(SHAPES, [shape for shape in TINY if shape not in SHAPES]))
def test_greedy_tokens_are_transformers_for_every_shape_in_one_ragged_batch(tiny_pair, shape):
    reference, model = tiny_pair(shape)
    prompts = [random_ids(length, 2) for length in (1, 140, 17)]
    for prompt, done in zip(prompts, Engine(model).generate(prompts, max_new_tokens=8), strict=True):
        assert done.tokens == reference_tokens(reference, prompt, 8)


def test_repetition_penalty_gives_transformers_tokens(tiny_pair):
    reference, model = tiny_pair("mha")
    prompts = [random_ids(length, 3) for length in (3, 131)]
    options = Sampling(repetition_penalty=1.4)
    found = Engine(model, backend="dense").generate(prompts, max_new_tokens=12, sampling=options)
    for prompt, done in zip(prompts, found, strict=True):
        assert done.tokens == reference_tokens(reference, prompt, 12, repetition_penalty=1.4)
        assert done.tokens != reference_tokens(reference, prompt, 12)


def test_the_default_stop_token_stops_where_transformers_stops(tiny_pair):
    reference, model = tiny_pair("gqa")
    prompt = random_ids(9, 4)
    eos = reference_tokens(reference, prompt, 8)[3]
    changed = Llama(dataclasses.replace(model.config, eos_token_id=eos)).eval()
    changed.load_state_dict(model.state_dict())
    (done,) = Engine(changed, backend="dense").generate([prompt], max_new_tokens=8)
    assert done.tokens == reference_tokens(reference, prompt, 8, eos_token_id=eos)
    assert done.tokens[-1] == eos
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("length", [1, 128, 300, 513])
def test_logprobs_are_those_of_the_full_forward(tiny, length):
    prompt = random_ids(length, 5)
    sampling = Sampling(temperature=1.5, top_k=50, seed=3)  # which do not change log-probabilities
    (done,) = Engine(tiny).generate([prompt], max_new_tokens=5, sampling=sampling, stop_token_ids=[])
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt + done.tokens]), backend="dense")[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]
    # On these weights transformers' own eager and sdpa differ by up to 3.1e-5.
    torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=2e-5, rtol=1e-5)


# --- Batches ---

RAGGED = (1, 300, 127, 5, 128, 129)


def test_a_ragged_batch_in_flex_attention_gives_the_tokens_of_the_dense_definition(tiny, engine):
    flex = Engine(tiny)
    prompts = [random_ids(length, 6) for length in RAGGED]
    sampling = [Sampling()] * 3 + [Sampling(temperature=1.0, seed=4)] * 3
    cache = tiny.new_cache(len(prompts), 640)
    found = flex.generate(prompts, max_new_tokens=4, sampling=sampling, cache=cache)
    cache.truncate(100)
    found += flex.generate(prompts, max_new_tokens=4, sampling=sampling, cache=cache)
    expected = engine.generate(prompts, max_new_tokens=4, sampling=sampling)
    kept = [p[:100] + t.tokens[:3][: max(0, 100 - len(p))] for p, t in zip(prompts, expected, strict=True)]
    whole = [k + p for k, p in zip(kept, prompts, strict=True)]
    expected += engine.generate(whole, max_new_tokens=4, sampling=sampling)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "sampling",
    few(
        [Sampling(), Sampling(temperature=1.2, min_p=0.01, repetition_penalty=1.2, seed=-5)],
        [Sampling(repetition_penalty=1.3), Sampling(temperature=1.0, top_p=0.95, top_k=100, seed=11)],
    ),
    ids=["greedy", "sampled with penalty", "penalty", "sampled"],
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


# --- Options ---


def test_generation_configs_sampling_is_the_default(tokenizer):
    model = successor_model(generation=GenerationConfig(do_sample=True, temperature=30.0, max_new_tokens=20), eos=None)
    engine = Engine(model, tokenizer, backend="dense")
    rows = engine.generate([[ONE]] * 2)
    assert rows[0].tokens != rows[1].tokens  # drawn, not greedy
    (greedy,) = engine.generate([[ONE]], sampling=Sampling(), max_new_tokens=3)
    assert greedy.tokens == [TWO, THREE, CAFE_C]


@pytest.mark.parametrize("name", ["generate", "submit", "submit_samples"])
def test_an_unknown_option_names_what_was_called_and_what_may_be_meant(successor_engine, name):
    prompts = [[ONE]] if name == "generate" else [ONE]
    more = {"n": 2, "sampling": Sampling()} if name == "submit_samples" else {}
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected .* 'max_token'; did you mean 'max_new_tokens'"
    ):
        getattr(successor_engine, name)(prompts, max_token=5, **more)


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


@pytest.mark.weights
@pytest.mark.exhaustive
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
    assert sorted(key[:3] for key in engine.runner.shapes) == [(1, 1, 8192), (1, 128, 8192), (1, 512, 8192)]


def test_auto_is_dense_and_uncompiled_on_a_cpu_and_leaves_the_backend_that_was_asked_for(tiny_pair):
    model = tiny_pair("gqa")[1]
    engine = Engine(model, compile="auto")
    assert (engine.compile, engine.runner.backend) == (False, "dense")
    (done,) = engine.generate([[5, 6, 7]], max_new_tokens=8, stop_token_ids=())
    assert "attention backend 'dense'" in engine.explain()
    assert not engine.graphs.count
    engine.compile = False
    assert engine.runner.backend == "flex"
    assert engine.generate([[5, 6, 7]], max_new_tokens=8, stop_token_ids=())[0].tokens == done.tokens
    engine.compile = "auto"
    assert engine.runner.backend == "dense"
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', found 'on'"):
        engine.compile = "on"
