"""Fused prompts, packed documents and ensembles: against transformers with the same 4-D mask, and against what they
must equal by construction."""

import math

import numpy as np
import pytest
import torch
from helpers import few
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_flex import Engine, Ensemble, Prompt, Sampling, Tokenizer, fuse, masks, scores
from llama_flex.engine.fusion import combined

NEW = 40  # tokens generated where the reference is asked for the same
PARAPHRASES = [
    "What is the capital of France, the country in western Europe?",
    "France is a country in western Europe. Name the city that is its capital.",
    "Which city is the seat of the government of France?",
    "Tell me the capital city of the French Republic.",
    "In which French city do the president and the parliament work?",
]


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- against transformers, on the demo weights


def additive(rule, count: int, segments: list[int]) -> torch.Tensor:
    """Return transformers' 4-D mask of a rule over (i, j, segment of i, segment of j) in plain Python."""
    allowed = torch.tensor([[rule(i, j, segments[i], segments[j]) for j in range(count)] for i in range(count)])
    return torch.zeros(count, count).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def fused_rule(i, j, own, other):
    return j <= i and (own in (other, -1) or other == 0)


RULES = {
    "documents": (masks.causal() & masks.document(), lambda i, j, a, b: j <= i and a == b),
    "sliding window": (masks.sliding_window(48), lambda i, j, a, b: 0 <= i - j < 48),
    "window and sinks": (masks.sliding_window(32) | masks.sink(4), lambda i, j, a, b: j <= i and (i - j < 32 or j < 4)),
    "prefix LM": (masks.prefix_lm(60), lambda i, j, a, b: j <= i or (i < 60 and j < 60)),
    "fused, continue": (masks.fused(), fused_rule),
    "fused, parallel": (masks.fused(), fused_rule),
}


@pytest.fixture(scope="module")
def case(demo_folder):
    """A function from the name of a rule to ids, positions and segments of a real text."""
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    prompts = [tokenizer.encode(text) for text in PARAPHRASES]

    def of(name: str) -> Prompt:
        if name.startswith("fused"):
            prefix, suffix = tokenizer.encode("Answer the question.\n"), tokenizer.encode("\nAnswer:")
            return fuse(prompts, prefix=prefix, suffix=suffix, positions=name.removeprefix("fused, "))
        flat = [id for prompt in prompts for id in prompt] * 2
        if name != "documents":
            return Prompt.plain(flat)
        segments = [number for number, prompt in enumerate(prompts * 2) for _ in prompt]
        places = [place for prompt in prompts * 2 for place in range(len(prompt))]  # restarted in every document
        return Prompt(flat, places, segments, segments[-1])

    return of


@torch.no_grad()
def reference_logits(reference, prompt: Prompt, rule, attention: str = "eager") -> torch.Tensor:
    """Return transformers' logits of a prompt under a rule."""
    reference.set_attn_implementation(attention)
    tokens, positions = torch.tensor([prompt.ids]), torch.tensor([list(prompt.positions)])
    mask = additive(rule, len(prompt.ids), list(prompt.segments))
    logits = reference(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    reference.set_attn_implementation("eager")
    return logits


@torch.no_grad()
def logits_of(model, prompt: Prompt, mask, backend="flex", **changed) -> torch.Tensor:
    """Return our logits of a prompt under a mask, with its positions and segments unless others are given."""
    tokens = torch.tensor([prompt.ids])
    given = {"positions": torch.tensor([list(prompt.positions)]), "segments": torch.tensor([list(prompt.segments)])}
    return model(tokens, mask=mask, backend=backend, **given | changed)


@pytest.mark.weights
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RULES)
def test_logits_are_the_references_with_the_same_4d_mask(name, case, demo, demo_reference):
    mask, rule = RULES[name]
    prompt = case(name)
    expected = reference_logits(demo_reference, prompt, rule)
    spread = (reference_logits(demo_reference, prompt, rule, "sdpa") - expected).abs().max().item()
    assert 0 < spread < 1e-2
    for backend in ("flex", "dense"):
        assert (logits_of(demo, prompt, mask, backend) - expected).abs().max() <= 2 * spread
    # Mutations that must not pass: another mask, segments shifted by one token, positions that are not restarted.
    wrong = [logits_of(demo, prompt, masks.causal() if name != "sliding window" else masks.sliding_window(49), "dense")]
    if name == "documents" or name.startswith("fused"):
        shifted = torch.tensor([[0, *prompt.segments[:-1]]])
        wrong.append(logits_of(demo, prompt, mask, "dense", segments=shifted))
    if name in ("fused, parallel",):
        wrong.append(logits_of(demo, prompt, mask, "dense", positions=torch.arange(len(prompt.ids))[None]))
    for logits in wrong:
        assert (logits - expected).abs().max() > 100 * spread


@pytest.fixture(scope="module")
def demo_engine(demo, demo_folder) -> Engine:
    """A compiled engine of the demo weights."""
    return Engine(demo, Tokenizer.from_pretrained(demo_folder), compile=True)


@pytest.mark.weights
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RULES)
def test_greedy_tokens_are_the_references_with_the_same_4d_mask(name, case, demo_engine, demo_reference):
    """Check tokens generated compiled, with a cache, by one forward pass of the reference: they are its greedy tokens
    if each is the most likely one after those before it, under the mask and the positions of the whole."""
    mask, rule = RULES[name]
    prompt = case(name)
    (done,) = demo_engine.generate([prompt], max_new_tokens=NEW, stop_token_ids=(), mask=mask)
    end, count = prompt.generated_position, len(prompt.ids)
    assert end == (prompt.positions[-1] if name == "documents" else max(prompt.positions)) + 1
    whole = Prompt(
        [*prompt.ids, *done.tokens],
        [*prompt.positions, *range(end, end + NEW)],
        [*prompt.segments, *[prompt.generated_segment] * NEW],
    )
    logits = reference_logits(demo_reference, whole, rule)[0, count - 1 : -1]
    assert logits.argmax(-1).tolist() == done.tokens
    probability = logits.log_softmax(-1).gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), probability, rtol=0, atol=1e-3)


# ---- documents


@pytest.mark.parametrize("length", few([(128, 129, 40)], [(5, 127, 1), (300, 3, 128)]))
@torch.no_grad()
def test_packed_documents_are_each_alone_and_leak_nothing(tiny_pair, length):
    _, model = tiny_pair("gqa")
    documents = [ids(n, seed) for seed, n in enumerate(length)]
    mask = masks.causal() & masks.document()

    def packed(documents, backend, cached=False):
        flat = torch.tensor([[id for document in documents for id in document]])
        places = torch.tensor([[place for document in documents for place in range(len(document))]])
        segments = torch.tensor([[number for number, document in enumerate(documents) for _ in document]])
        if not cached:
            logits = model(flat, positions=places, segments=segments, mask=mask, backend=backend)
            return logits[0].split(length)
        cache, parts = model.new_cache(1, flat.shape[1]), []
        for part in torch.arange(flat.shape[1]).split(100):
            given = {"positions": places[:, part], "segments": segments[:, part]}
            parts.append(model(flat[:, part], cache=cache, mask=mask, backend=backend, **given))
        return torch.cat(parts, 1)[0].split(length)

    for backend, cached in (("dense", False), ("flex", False), ("flex", True)):
        found = packed(documents, backend, cached)
        for document, logits in zip(documents, found, strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([document]))[0], rtol=0, atol=2e-4)
        # No bit of one document depends on another's tokens.
        other = packed([documents[0], ids(length[1], 99), documents[2]], backend, cached)
        assert torch.equal(found[0], other[0])
        assert torch.equal(found[2], other[2])
        assert not torch.equal(found[1], other[1])


# ---- fused prompts


@pytest.fixture(scope="module", params=few([False], [True]), ids=["eager", "compiled"])
def engine(request, tiny_pair) -> Engine:
    """An engine of a tiny model, eager and compiled."""
    return Engine(tiny_pair("gqa")[1], compile=request.param)


def greedy_dense(model, prompt: Prompt, new: int) -> list[int]:
    """Generate from a fused prompt by recomputing the whole sequence densely at every step."""
    tokens, places, segments = list(prompt.ids), list(prompt.positions), list(prompt.segments)
    score_mod = scores.segment_weights(torch.tensor(prompt.log_weights)) if prompt.log_weights else None
    with torch.no_grad():
        for _ in range(new):
            given = {"positions": torch.tensor([places]), "segments": torch.tensor([segments])}
            logits = model(torch.tensor([tokens]), mask=masks.fused(), score_mod=score_mod, backend="dense", **given)
            tokens.append(int(logits[0, -1].argmax()))
            places.append(max(places) + 1)
            segments.append(masks.GENERATED)
    return tokens[len(prompt.ids) :]


QUESTIONS = [
    fuse([ids(40, 1), ids(130, 2), ids(30, 3)], prefix=ids(12, 4), suffix=[7, 8]),
    fuse([ids(40, 1), ids(130, 2), ids(30, 3)], prefix=ids(12, 4), suffix=[7, 8], positions="parallel"),
    fuse([ids(90, 5), ids(1, 6)], positions="parallel"),
    fuse([ids(20, 7)] * 5, suffix=[9]),
    fuse([ids(40, 1), ids(130, 2)], suffix=[7], weights=[4.0, 0.25]),
]


def test_several_questions_in_one_batch_are_each_alone_and_the_recomputed_whole(engine):
    done = engine.generate(QUESTIONS, max_new_tokens=12, stop_token_ids=())
    for question, completion in zip(QUESTIONS, done, strict=True):
        assert completion.tokens == greedy_dense(engine.model, question, 12)
    if not engine.compile:
        alone = engine.generate([QUESTIONS[1]], max_new_tokens=12, stop_token_ids=())[0]
        assert alone.tokens == done[1].tokens
        streamed = [step.token for step in engine.stream([QUESTIONS[1]], max_new_tokens=12, stop_token_ids=())]
        assert streamed == done[1].tokens


@pytest.mark.exhaustive
def test_the_questions_above_tell_the_ways_apart(tiny_pair):
    """Check that positions, weights, the prefix and isolation each change some token; else the comparison above would
    show nothing."""
    _, model = tiny_pair("gqa")
    found = [greedy_dense(model, question, 12) for question in QUESTIONS]
    assert found[0] != found[1]
    prompts = [ids(40, 1), ids(130, 2)]
    assert found[4] != greedy_dense(model, fuse(prompts, suffix=[7]), 12)
    engine = Engine(model)
    (joined,) = engine.generate([QUESTIONS[0].ids], max_new_tokens=12, stop_token_ids=())
    assert joined.tokens != found[0]


@pytest.mark.exhaustive
def test_one_prompt_fused_is_that_prompt(engine):
    prompt = ids(150, 8)
    plain, alone, split = engine.generate(
        [prompt, fuse([prompt]), fuse([prompt[10:140]], prefix=prompt[:10], suffix=prompt[140:], positions="parallel")],
        max_new_tokens=10,
        stop_token_ids=(),
    )
    assert plain.tokens == alone.tokens == split.tokens


def test_weights_count_a_prompt_as_if_it_were_there_more_than_once(tiny_pair):
    """Check that a weight of 3 is the segment three times at the same positions: log 3 is added to its scores."""
    _, model = tiny_pair("mha")
    one, other = ids(30, 9), ids(50, 10)
    weighted = fuse([one, other], suffix=[5, 6], positions="parallel", weights=[3.0, 1.0])
    thrice = fuse([one, one, one, other], suffix=[5, 6], positions="parallel")
    score_mod = scores.segment_weights(torch.tensor(weighted.log_weights))
    found = logits_of(model, weighted, masks.fused(), "dense", score_mod=score_mod)[0, -2:]
    expected = logits_of(model, thrice, masks.fused(), "dense")[0, -2:]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(logits_of(model, weighted, masks.fused(), "dense")[0, -2:], expected, atol=1e-2)


def test_attributes_of_fused_prompts():
    prompt = fuse([[1, 2], [3, 4, 5]], prefix=[6], suffix=[7, 8])
    assert list(prompt.ids) == [6, 1, 2, 3, 4, 5, 7, 8]
    assert list(prompt.segments) == [0, 1, 1, 2, 2, 2, -1, -1]
    assert list(prompt.positions) == list(range(8))
    parallel = fuse([[1, 2], [3, 4, 5]], prefix=[6], suffix=[7, 8], positions="parallel", weights=[1, 2])
    assert list(parallel.positions) == [0, 1, 2, 1, 2, 3, 4, 5]
    assert parallel.log_weights == (0.0, 0.0, math.log(2))
    assert parallel.generated_segment == masks.GENERATED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one prompt"),
        (([[1], []],), "no empty one"),
        (([[1]], "positions", "side by side"), "positions 'side by side' is not known"),
        (([[1], [2]], "weights", [1.0]), "a positive weight for each of the 2 prompts"),
        (([[1], [2]], "weights", [1.0, 0.0]), "positive weight"),
        (([[1], [2]], "weights", [1.0, math.nan]), "positive weight"),
    ],
)
def test_prompts_that_cannot_be_fused_are_refused(arguments, message):
    prompts, *option = arguments
    with pytest.raises(ValueError, match=message):
        fuse(prompts, **dict([option]) if option else {})


def test_bad_prompts_are_refused_before_any_work(tiny_pair):
    engine = Engine(tiny_pair("gqa")[1])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.stream([fuse([[1], [600]])])
    with pytest.raises(ValueError, match="as many positions and segments as ids"):
        Prompt([1, 2], [0], [0, 0])
    with pytest.raises(ValueError, match="lists of token ids"):
        engine.stream([Ensemble([[1, 2]], "mean"), "text"])
    for wrong in ([1, 2], ["ab"], [[1.5]]):
        with pytest.raises(ValueError, match="lists of token ids"):
            fuse(wrong)
    with pytest.raises(ValueError, match="lists of token ids"):
        Ensemble([1, 2])
    with pytest.raises(ValueError, match="combine 'median' is not known"):
        Ensemble([[1]], "median")
    with pytest.raises(ValueError, match="at least one prompt"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"prompt 1: \d+ tokens leave no room in the context"):
        engine.stream([[1], fuse([ids(600, 1), ids(600, 2)])])
    assert engine.check([fuse([ids(600, 1), ids(600, 2)], positions="parallel")]) == [256]  # positions end at 600


@pytest.mark.exhaustive
def test_fused_prompts_with_own_masks_and_scores_of_layers(tiny_pair):
    """Check that a given mask is used as it is, and that weights are applied after a given score function."""
    _, model = tiny_pair("gqa")
    prompt = fuse([ids(30, 1), ids(40, 2)], suffix=[3], weights=[2.0, 1.0])
    soft = scores.softcap(5.0)
    (done,) = Engine(model).generate([prompt], max_new_tokens=4, stop_token_ids=(), score_mod=[soft, None])
    weights = scores.segment_weights(torch.tensor(prompt.log_weights))
    expected = logits_of(model, prompt, masks.fused(), "dense", score_mod=[soft >> weights, weights])
    assert done.tokens[0] == expected[0, -1].argmax()
    (plain,) = Engine(model).generate([prompt], max_new_tokens=4, stop_token_ids=(), mask=masks.causal())
    expected = logits_of(model, prompt, masks.causal(), "dense", score_mod=weights)
    assert plain.tokens[0] == expected[0, -1].argmax()


@pytest.mark.exhaustive
def test_fused_prompts_stay_apart_where_a_layers_mask_is_left_open(tiny_pair):
    engine = Engine(tiny_pair("mha")[1])
    prompt = fuse([ids(30, 1), ids(40, 2)], suffix=[3])
    options = {"max_new_tokens": 2, "stop_token_ids": ()}
    expected, open_, causal = (
        engine.generate([prompt], mask=mask, **options)[0].logprobs
        for mask in (None, [None, masks.fused()], masks.causal())
    )
    assert open_ == expected != causal


def test_ids_come_as_any_integers():
    expected = fuse([[1, 2], [3]], prefix=[4], suffix=[5])
    for kind in (torch.tensor, np.array, tuple):
        assert fuse([kind([1, 2]), kind([3])], prefix=kind([4]), suffix=kind([5])) == expected


# ---- ensembles


@pytest.mark.parametrize("combine", few(["mean"], ["max"]))
def test_ensembles_take_the_mean_or_the_maximum_of_what_their_prompts_predict(engine, combine):
    members = [ids(40, 11), ids(128, 12), ids(5, 13)]
    done, alone, single = engine.generate(
        [Ensemble(members, combine), members[0], Ensemble(members[1:2], combine)], max_new_tokens=8, stop_token_ids=()
    )
    sequences = [list(member) for member in members]
    for token, logprob in zip(done.tokens, done.logprobs, strict=True):
        with torch.no_grad():
            each = [engine.model(torch.tensor([s]), backend="dense")[0, -1].double().softmax(-1) for s in sequences]
        together = torch.stack(each).mean(0) if combine == "mean" else torch.stack(each).amax(0)
        assert token == together.argmax()
        assert logprob == pytest.approx(math.log(together[token] / together.sum()), abs=1e-3)
        for sequence in sequences:
            sequence.append(token)
    plain = engine.generate([members[0], members[1]], max_new_tokens=8, stop_token_ids=())
    assert [alone.tokens, single.tokens] == [completion.tokens for completion in plain]


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n)), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_combining_is_the_formula(requests, seed):
    requests = sorted({r: i for i, r in enumerate(dict.fromkeys(requests))}[r] for r in requests)
    logits = torch.randn(len(requests), 7, generator=torch.Generator().manual_seed(seed)) * 5
    count = max(requests) + 1
    is_max = torch.arange(count) % 2 == 0
    rows_of = torch.tensor([requests.count(q) for q in range(count)])
    found = combined(logits, torch.tensor(requests), is_max, rows_of).log_softmax(-1)
    for q in range(count):
        rows = logits[[r == q for r in requests]].softmax(-1)
        together = rows if len(rows) == 1 else rows.amax(0, True) if is_max[q] else rows.mean(0, True)
        torch.testing.assert_close(found[q], (together / together.sum()).log()[0], rtol=1e-4, atol=1e-4)


def test_ensembles_sample_and_stop_and_penalise_as_one(tiny_pair):
    _, model = tiny_pair("gqa")
    engine = Engine(model)
    ensemble = Ensemble([ids(10, 14), ids(20, 15)])
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=1.3)
    (one,) = engine.generate([ensemble], max_new_tokens=8, stop_token_ids=(), sampling=sampling)
    again = engine.generate([[3], ensemble], max_new_tokens=8, stop_token_ids=(), sampling=[Sampling(), sampling])[1]
    assert one.tokens == again.tokens
    (stopped,) = engine.generate([ensemble], max_new_tokens=8, stop_token_ids=one.tokens[3:4], sampling=sampling)
    assert stopped.tokens == one.tokens[: one.tokens.index(one.tokens[3]) + 1]
    assert stopped.finish_reason == "stop"
    cache = model.new_cache(1, 128)
    with pytest.raises(ValueError, match="the cache has 1 rows but the input has 2"):
        engine.stream([ensemble], cache=cache)
