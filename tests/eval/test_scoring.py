"""Scores are sums of the reference's log-softmax, however the text is cut into prefix and continuations.

A log-probability may differ by twice as much as those of the reference's eager and sdpa attention do.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from helpers import few, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_helpers import reference_logprobs

from llama_flex import Engine, Sampling, Score, Tokenizer, choose, edits, masks, score, score_text
from llama_flex.engine.model_runner import ModelRunner
from llama_flex.logits.parameters import stack
from llama_flex.sampling import filter_logits


@pytest.fixture(scope="module")
def pair(tiny_pair):
    """The model of transformers, ours, and how far a log-probability may be off."""
    reference, model = tiny_pair("gqa")
    ids = random_ids(400)
    spread = reference_logprobs(reference, ids) - reference_logprobs(reference, ids, "sdpa")
    return reference, model, 2 * spread.abs().max().item()


def assert_scored(found: Score, reference, prefix, continuation, budget) -> None:
    """Check the scores of a continuation, token by token and in all."""
    expected = reference_logprobs(reference, prefix + continuation)[len(prefix) - 1 :]
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=0, atol=budget)
    assert found.total == pytest.approx(expected.sum().item(), abs=len(continuation) * budget)
    assert found.mean == pytest.approx(found.total / len(continuation))
    assert found.perplexity == pytest.approx(2.718281828459045 ** (-found.mean))


@pytest.mark.parametrize("prefix", few([127], [1, 128, 300]))
def test_continuations_of_any_length_are_scored_as_the_reference_does(pair, prefix):
    reference, model, budget = pair
    start, texts = random_ids(prefix), [random_ids(n, seed=1) for n in (1, 2, 40, 129, 1, 3)]
    for batch_size in (1, 4, 16):
        found = score(model, start, texts, batch_size=batch_size)
        for one, continuation in zip(found, texts, strict=True):
            assert_scored(one, reference, start, continuation, budget)
    # A mutation that must not pass: the continuations scored after another prefix.
    wrong = score(model, [*start[:-1], start[-1] ^ 1], texts)
    assert all((a.logprobs[0] - b.logprobs[0]).abs() > 100 * budget for a, b in zip(found, wrong, strict=True))


@pytest.mark.exhaustive
def test_compiled_scores_are_the_same_and_compile_nothing_again(pair):
    reference, model, budget = pair
    engine = Engine(model, compile=True)
    counts = []
    for lengths in ((5, 1, 40), (2, 7, 11), (3, 3, 3, 90)):
        texts = [random_ids(n, seed=2) for n in lengths]
        for one, continuation in zip(score(engine, random_ids(140), texts, batch_size=4), texts, strict=True):
            assert_scored(one, reference, random_ids(140), continuation, max(budget, 1e-3))
        counts.append(engine.graphs.count)
    assert counts[0] == counts[1] == counts[2]


def test_a_prefix_is_computed_once(pair, monkeypatch):
    _, model, _ = pair
    fed = []
    step = ModelRunner.step

    def spy(self, ids, lengths, *rest):
        fed.append(int(lengths.sum()))
        return step(self, ids, lengths, *rest)

    monkeypatch.setattr(ModelRunner, "step", spy)
    score(model, random_ids(200), [random_ids(n) for n in (1, 1, 1, 1)])
    assert sum(fed) == 200  # and one token needs no more
    fed.clear()
    score(model, random_ids(200), [random_ids(n) for n in (5, 9, 2)], batch_size=2)
    assert sum(fed) == 200 + 4 + 8 + 1


AHEAD = ((300, 300), (300, 150), (129, 129), (40, 300))  # tokens of a prefix, and how far the mask looks ahead


@pytest.mark.parametrize(
    ("compile", "cases"),
    [
        (False, AHEAD[-1:]),
        pytest.param(False, AHEAD, marks=pytest.mark.exhaustive),
        pytest.param(True, AHEAD, marks=pytest.mark.exhaustive),
    ],
)
def test_a_mask_that_looks_ahead_has_prefix_and_continuation_in_one_piece_each(pair, compile, cases):
    _, model, _ = pair
    engine = Engine(model, compile=compile)
    for length, ahead in cases:
        prefix, texts = random_ids(length), [random_ids(n, seed=4) for n in (140, 3)]
        mask = masks.prefix_lm(ahead)
        if length < ahead:  # continuations that look ahead see themselves, and the prefix does not see them
            mask = mask & masks.Mask(lambda q, kv: (q.index >= 40) | (kv.index < 40))
        for found, continuation in zip(score(engine, prefix, texts, mask=mask), texts, strict=True):
            with torch.no_grad():  # without the last, as it is not fed
                logits = model(torch.tensor([prefix + continuation[:-1]]), mask=mask, backend="dense")[0, length - 1 :]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
            torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=1e-3)
    (causal,) = score(engine, prefix, texts[:1])
    assert (causal.logprobs - score(engine, prefix, texts[:1], mask=mask)[0].logprobs).abs().max() > 0.1


@pytest.mark.parametrize("logits_at_once", few([3000], [None]))
@pytest.mark.parametrize(
    "sampling",
    few(
        [Sampling(temperature=1.5, top_p=0.9, min_p=0.01, repetition_penalty=1.4)],
        [Sampling(temperature=0.7, top_k=30), Sampling(repetition_penalty=2.0), Sampling()],
    ),
    ids=["penalty, top_p, min_p", "top_k", "penalty", "greedy"],
)
def test_processed_log_probabilities_are_those_of_what_is_sampled_from(pair, sampling, logits_at_once, monkeypatch):
    _, model, _ = pair
    if logits_at_once is not None:  # what was seen is carried from part to part
        monkeypatch.setattr("llama_flex.eval.scoring._LOGITS", logits_at_once)
    start, texts = random_ids(30), [random_ids(n, seed=3) for n in (6, 1, 140)]
    plain, found = score(model, start, texts), score(model, start, texts, sampling=sampling)
    for one, raw, continuation in zip(found, plain, texts, strict=True):
        assert one.logprobs.equal(raw.logprobs)
        assert raw.processed is None
        with torch.no_grad():
            logits = model(torch.tensor([start + continuation]))[0, len(start) - 1 : -1]
        expected = []
        for n, token in enumerate(continuation):  # one by one, with what was there before it
            seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
            seen[0, start + continuation[:n]] = True
            processed = filter_logits(logits[n : n + 1], stack([sampling], model.device), seen)
            expected.append(processed.log_softmax(-1)[0, token])
        torch.testing.assert_close(one.processed, torch.stack(expected), rtol=0, atol=1e-4)
        assert one.greedy.tolist() == (logits.argmax(-1) == torch.tensor(continuation)).tolist()
    if sampling == Sampling():
        assert found[0].processed.allclose(found[0].logprobs)


@pytest.mark.exhaustive
@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 300), data=st.data())
def test_the_sum_of_the_parts_is_the_whole(pair, length, data):
    """Check a text cut anywhere, under masks and edits too, against one forward over the whole text."""
    _, model, budget = pair
    cut = data.draw(st.integers(1, length - 1))
    mask = data.draw(st.sampled_from([None, masks.sliding_window(9) | masks.sink(1)]))
    edit = data.draw(st.sampled_from([None, edits.ablate([2], layers=1)]))
    ids = random_ids(length)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), mask=mask, edit=edit)[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[cut - 1 :, 0]
    (found,) = score(model, ids[:cut], [ids[cut:]], mask=mask, edit=edit)
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=max(budget, 1e-4))


@pytest.mark.parametrize(
    ("window", "stride"),
    [
        (100, 50),
        *(
            pytest.param(window, stride, marks=pytest.mark.exhaustive)
            for window, stride in ((None, None), (400, 399), (64, 1), (64, 63), (128, 100), (2, 1))
        ),
    ],
)
def test_long_texts_are_scored_in_windows(pair, window, stride):
    reference, model, budget = pair
    ids = random_ids(400)[: 150 if stride == 1 else 400]
    found = score_text(model, ids, window=window, stride=stride)
    assert len(found.logprobs) == len(ids) - 1
    wide = window or model.context
    starts = [1, *range(min(wide, len(ids)), len(ids), stride or wide // 2), len(ids)]
    for begin, end in itertools.pairwise(starts):
        expected = reference_logprobs(reference, ids[max(0, end - wide) : end])[begin - end :]
        torch.testing.assert_close(found.logprobs[begin - 1 : end - 1].double(), expected, rtol=0, atol=budget)
    if wide >= len(ids):
        assert found.logprobs.equal(score(model, ids[:1], [ids[1:]])[0].logprobs)


@pytest.mark.exhaustive
def test_texts_beyond_the_context(pair):
    _, model, _ = pair
    ids = random_ids(1400)
    with pytest.raises(ValueError, match="exceed the context of 1024; see score_text"):
        score(model, ids[:1], [ids[1:]])
    assert len(score_text(model, ids).logprobs) == 1399
    (full,) = score(model, ids[:1], [ids[1:1025]])  # the last token is not fed
    assert len(full.logprobs) == 1024


@pytest.mark.weights
@pytest.mark.exhaustive
def test_choices(demo, demo_reference, demo_folder):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    prefix = tokenizer.encode("The capital of France is")
    choices = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in ("Rome", "Paris", "a very old city")]
    expected = [reference_logprobs(demo_reference, prefix + c)[len(prefix) - 1 :] for c in choices]
    found = score(demo, prefix, choices)
    assert [s.total for s in found] == pytest.approx([e.sum().item() for e in expected], abs=1e-3)
    assert choose(demo, prefix, choices) == 1
    # A longer text is rarely the more likely, but its tokens may each be.
    prefix = tokenizer.encode("One, two, three, four,")
    choices = [tokenizer.encode(x, add_special_tokens=False) for x in (" five, six, seven, eight, nine, ten,", " five")]
    assert (choose(demo, prefix, choices), choose(demo, prefix, choices, per_token=True)) == (1, 0)


@pytest.mark.parametrize("window", [None, 8])
def test_a_model_that_attends_both_ways_is_scored_by_a_causal_mask_alone(pair, window):
    _, causal, _ = pair
    model = copy.copy(causal)
    model.config = dataclasses.replace(causal.config, model_type="mistral", is_causal=False, sliding_window=window)
    mask = masks.causal()
    for wrong in (
        lambda: score(model, [5], [[1]]),
        lambda: score(Engine(model), [5], [[1]], mask=[mask, None]),
        lambda: score_text(model, [5, 1, 2]),
        lambda: choose(model, [5], [[1], [2]]),
    ):
        with pytest.raises(ValueError, match=r"both directions \(is_causal is false\).*such as masks.causal\(\)$"):
            wrong()
    (expected,) = score(causal, [5], [[1, 2]])
    for of_layers in (mask, [mask] * model.config.num_hidden_layers):
        (found,) = score(model, [5], [[1, 2]], mask=of_layers)
        assert found.total == expected.total


def test_wrong_arguments_are_named(pair):
    _, model, _ = pair
    assert score(model, [5], []) == []
    assert Score(torch.tensor([-torch.inf, -1.0]), torch.tensor([False, True])).perplexity == float("inf")
    assert choose(model, [5], torch.tensor([[1], [2]])) == choose(model, [5], iter([[1], [2]]))
    assert score(model, [5], [[1]])[0] != score(model, [5], [[1]])[0]
    one_row = {"edit": edits.scale("z", 0.5, where=torch.tensor([[0, 1]]))}
    together, alone = (score(model, [5, 8], [[5, 6], [6, 7]], batch_size=n, **one_row) for n in (2, 1))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
    for wrong, words in (
        (lambda: score(model, [], [[1]]), "the prefix is empty; give at least one token"),
        (lambda: score(model, [5], [[1], []]), "continuation 1 is empty"),
        (lambda: score(model, [5], [[1], [512]]), "continuation 1 has a token id outside the vocabulary of 512"),
        (lambda: score(model, [5], [[1]], batch_size=0), "batch_size must be at least 1"),
        (lambda: score(model, [5], [[1]], batch_size=2.5), "batch_size must be a whole number, not 2.5"),
        (lambda: score(model, [5], [[1]], sampling=[Sampling()]), "sampling must be a Sampling"),
        (lambda: score_text(model, random_ids(9), window=4.0), "window must be a whole number"),
        (lambda: score_text(model, random_ids(9), window=4, stride="1"), "stride must be a whole number"),
        (lambda: score(model, "abc", [[1]]), "lists of token ids"),
        (lambda: score_text(model, [5]), "at least 2 tokens"),
        (lambda: score_text(model, random_ids(9), window=1), "a window from 2 to 1024"),
        (lambda: score_text(model, random_ids(9), window=2000), "window 2000"),
        (lambda: score_text(model, random_ids(9), window=8, stride=8), "less than the window"),
        (lambda: choose(model, [5], []), "at least one choice"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def test_scores_that_are_nan_are_named(pair):
    model = copy.deepcopy(pair[1])
    with torch.no_grad():
        model.embed.weight[9] = torch.nan  # the logits after this token
    with pytest.raises(ValueError, match=r"NaN or infinite at token 1 of the continuation \[9, 4\]"):
        score(model, [3], [[9, 4]])
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose(model, [9], [[4], [5]])
