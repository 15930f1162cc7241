"""Beam search gives the texts and scores of transformers, and under masks those of its definition."""

import collections
import dataclasses
import functools

import pytest
import torch
from beam_helpers import by_definition, differ, reference_beams
from generation_helpers import PIECES, poisoned_model
from helpers import few, random_ids
from kv_dtype_helpers import rounding, uneven
from request_helpers import random_ids as small_ids
from request_helpers import random_model

from llama_flex import Engine, GenerationConfig, Llama, LlamaConfig, Mask, ScoreMod, Tokenizer, fuse, masks, scores
from llama_flex.engine import beams
from llama_flex.engine.beams import BeamOptions, PromptBeams
from llama_flex.engine.model_runner import ModelRunner
from llama_flex.engine.output import NonFiniteLogitsError
from llama_flex.kernels.kv_cache import KV
from llama_flex.usercode.errors import FunctionError

PROMPTS = [random_ids(length, 2) for length in (5, 41, 17, 9, 28, 33)]
NEW = {"max_new_tokens": 12}


# --- The texts and scores of transformers ---


@functools.cache
def common_tokens(reference) -> list[int]:
    """Return ids that beams often choose, the most common one first."""
    free = reference_beams(reference, PROMPTS, [2], num_beams=4, num_return_sequences=4, **NEW)
    return [id for id, _ in collections.Counter(id for each in free for _, ids in each for id in ids).most_common(4)]


def compare(pair, engine: Engine, num_eos: int, **options) -> bool:
    """Return whether an engine's beams differ from those of transformers, with so many common tokens as end-of-text."""
    eos = common_tokens(pair[0])[:num_eos]
    found = engine.beam_search(PROMPTS, stop_token_ids=eos, **NEW, **options)
    return differ(found, reference_beams(pair[0], PROMPTS, eos, **NEW, **options))


VARIANTS = [
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 1.5},
    {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 1, "early_stopping": True, "length_penalty": 0.0},
    {"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 1.5},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": -1.0},
]
OTHERS = [
    {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": beams}
    for beams in (2, 5)
    for early in (False, True, "never")
    for penalty in (-1.5, 0.3, 1.0, 3.0)
]


@pytest.mark.parametrize("options", few(VARIANTS, OTHERS), ids=str)
@pytest.mark.parametrize("num_eos", [1, 4])
def test_texts_and_scores_are_those_of_transformers(tiny_pair, options, num_eos):
    pair = tiny_pair("gqa")
    assert not compare(pair, Engine(pair[1], compile="auto"), num_eos, **options)


def test_the_variants_give_different_texts(tiny):
    engine, reasons = Engine(tiny, compile="auto"), set()
    found = []
    for options in VARIANTS:
        each = engine.beam_search(PROMPTS, stop_token_ids=[125], **NEW, **options | {"num_return_sequences": 2})
        found.append([done.tokens for texts in each for done in texts])
        reasons |= {done.finish_reason for texts in each for done in texts}
    assert sum(one != other for one in found for other in found) > 20
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("compile", few([False], [True]))
def test_flex_attention_gives_the_texts_of_transformers_whatever_the_lengths_and_compiles_once(tiny_pair, compile):
    reference, model = tiny_pair("gqa")
    engine, eos, counts = Engine(model, compile=compile), common_tokens(reference), []
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6}
    for prompts in (PROMPTS[:2], [random_ids(length, 3) for length in (1, 129)]):
        found = engine.beam_search(prompts, stop_token_ids=eos, **options)
        assert not differ(found, reference_beams(reference, prompts, eos, **options))
        counts.append(engine.graphs.count)
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == compile


def test_a_repetition_penalty_is_that_of_transformers(tiny_pair):
    reference, model = tiny_pair("gqa")
    options = {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.8, "max_new_tokens": 14}
    changed = 0
    for prompt in PROMPTS:  # one at a time: transformers penalises the padding of shorter ones, too
        expected = reference_beams(reference, [prompt], [2], **options)
        engine = Engine(model, compile="auto")
        assert not differ(engine.beam_search([prompt], stop_token_ids=[2], **options), expected)
        free = engine.beam_search([prompt], stop_token_ids=[2], **options | {"repetition_penalty": 1.0})
        changed += differ(free, expected)
    assert changed


def test_log_probabilities_are_the_models_own_and_give_the_score(tiny):
    (found,) = Engine(tiny, compile="auto").beam_search(
        PROMPTS[:1], num_beams=3, num_return_sequences=3, length_penalty=0.7, stop_token_ids=[125], **NEW
    )
    for done in found:
        logits = tiny(torch.tensor([PROMPTS[0] + done.tokens]), backend="dense")[0, len(PROMPTS[0]) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=2e-5, rtol=1e-5)
        assert done.score == pytest.approx(sum(done.logprobs) / len(done.tokens) ** 0.7, rel=1e-5)


# --- Mistakes that these tests find ---


def not_reordered(monkeypatch):
    monkeypatch.setattr(KV, "move", lambda self, rows, slots: self)


def not_penalised(monkeypatch):
    monkeypatch.setattr(BeamOptions, "normalised", lambda self, score, length: score)


def kept_open(monkeypatch):
    monkeypatch.setattr(PromptBeams, "_ends", lambda self, tokens: len(tokens) == self.limit)


def too_few_candidates(monkeypatch):
    monkeypatch.setattr(PromptBeams, "candidates", property(lambda self: self.options.num_beams))


def stopped_early(monkeypatch):
    monkeypatch.setattr(PromptBeams, "_goes_on", lambda self, length: False)


def the_other_rule(monkeypatch):
    """Assume the longest text where the length so far counts, and the other way round."""
    start = PromptBeams.__init__

    def started(self, options, *given):
        other = "never" if options.early_stopping is False else False
        start(self, dataclasses.replace(options, early_stopping=other), *given)

    monkeypatch.setattr(PromptBeams, "__init__", started)


def never_stopped(monkeypatch):
    monkeypatch.setattr(PromptBeams, "_goes_on", lambda self, length: True)


@pytest.mark.parametrize(
    ("mistake", "variant"),
    [
        (not_reordered, 0),
        (not_penalised, 5),
        (kept_open, 0),
        (too_few_candidates, 2),
        (stopped_early, 1),
        (never_stopped, 2),
        (the_other_rule, 1),
        (the_other_rule, 4),
    ],
)
def test_a_mistake_is_noticed(tiny_pair, monkeypatch, mistake, variant):
    mistake(monkeypatch)
    pair = tiny_pair("gqa")
    assert compare(pair, Engine(pair[1], compile="auto"), 4, **VARIANTS[variant])


# --- Masks, score functions, fused prompts ---

LONG = [small_ids(60, 4), small_ids(33, 4)]
FUSED = [
    fuse([LONG[0][:20], LONG[1][:12]], prefix=LONG[0][20:25], suffix=LONG[0][25:28], positions="parallel"),
    fuse([LONG[1][:9], LONG[0][30:50], LONG[1][9:15]], weights=[2, 0.5, 1]),
]
WEIGHTS = torch.tensor([[0.0] * 4, [0.0, 2.0, 0.5, 1.0]]).log().nan_to_num(neginf=0)
BY_ROW = torch.tensor([4, 30])


def far_from(q, kv):
    return (q.index - kv.index < 6 * (q.batch + 1)) | (kv.index < 2)


CASES = {
    "a window": (LONG, {"mask": masks.sliding_window(9)}, {}),
    "a window for each prompt": (LONG, {"mask": masks.sliding_window(BY_ROW)}, {}),
    "a mask of mine": (LONG, {"mask": masks.causal() & Mask(far_from)}, {}),
    "prompts that see all of themselves": (LONG, {"mask": masks.prefix_lm(torch.tensor([60, 33]))}, {}),
    "layers of their own": (LONG, {"mask": [masks.sliding_window(7), None]}, {}),
    "a score function": (
        LONG,
        {"score_mod": ScoreMod(lambda score, q, kv: score * (1 + q.batch) - 0.1 * (q.position - kv.position))},
        {},
    ),
    "fused prompts": (
        FUSED,
        {},
        {"mask": masks.fused() & masks.causal(), "score_mod": scores.segment_weights(WEIGHTS)},
    ),
}


def check_case(engine: Engine, name: str, **changes) -> bool:
    """Return whether the beams of a case differ from their definition."""
    prompts, given, expected = CASES[name]
    options = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 3, "stop_token_ids": range(0, 160, 7)}
    return differ(
        engine.beam_search(prompts, **options, **given | changes),
        by_definition(engine.model, prompts, **options, **given | expected),
    )


@pytest.mark.parametrize("name", CASES)
def test_beams_under_a_mask_are_those_of_full_forwards(dense, name):
    assert not check_case(dense, name)
    if CASES[name][1]:
        assert check_case(dense, name, mask=masks.causal(), score_mod=None)


BY_FLEX = "a window for each prompt"


@pytest.mark.parametrize("name", few([BY_FLEX], [name for name in CASES if name != BY_FLEX]))
def test_flex_attention_under_a_mask_gives_them_too(flex, name):
    assert not check_case(flex, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [BY_FLEX, "layers of their own", "fused prompts"])
def test_compiled_steps_under_a_mask_give_them_too(flex, name):
    assert not check_case(Engine(flex.model, compile=True), name)


def test_a_mask_must_see_the_number_of_the_prompt(dense, monkeypatch):
    monkeypatch.setattr(beams, "plan_of_beams", lambda model, plan, prompts, beams: plan)
    with pytest.raises(FunctionError, match="index 2 into a tensor of 2"):
        check_case(dense, "a window for each prompt")
    assert check_case(dense, "a score function")


@pytest.mark.parametrize("compile", few([False], [True]))
def test_keys_and_values_in_8_bits(compile):
    model = uneven(random_model(), torch.float32)
    options = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 3, "stop_token_ids": [5]}
    found = Engine(model, backend="dense", kv_dtype="fp8", compile=compile).beam_search(LONG, **options)
    rounded = by_definition(model, LONG, edit=rounding(model), **options)
    assert [[d.tokens for d in each] for each in found] == [[tokens for _, tokens in each] for each in rounded]
    assert differ(found, by_definition(model, LONG, **options))


# --- Text ---


@pytest.fixture(scope="module")
def spelling(tokenizer) -> Engine:
    """An engine of a random model of the few tokens of PIECES."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(PIECES), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = Llama(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return Engine(model, tokenizer, backend="dense")


def test_stop_strings_end_a_hypothesis(spelling, tokenizer):
    prompts, stop = [[3, 4], [5]], ["af", "One!"]

    def ends(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        return any(each in text for each in stop)

    options = {"num_beams": 3, "max_new_tokens": 7, "num_return_sequences": 3, "stop_token_ids": [2]}
    found = spelling.beam_search(prompts, stop=stop, **options)
    assert not differ(found, by_definition(spelling.model, prompts, ends=ends, **options))
    assert differ(found, by_definition(spelling.model, prompts, **options))
    for done in [done for each in found for done in each]:
        assert not any(each in done.text for each in stop)
        assert (done.finish_reason == "stop") == (ends(done.tokens) or done.tokens[-1] == 2)


def test_a_vocabulary_smaller_than_the_candidates(spelling):
    options = {"num_beams": 9, "max_new_tokens": 3, "num_return_sequences": 9, "stop_token_ids": [2, 13, 6]}
    assert not differ(spelling.beam_search([[3]], **options), by_definition(spelling.model, [[3]], **options))


def test_a_row_may_have_no_hypothesis_for_a_while(spelling):
    """Of 20 beams 14 begin, as the vocabulary has no more tokens."""
    options = {"num_beams": 20, "max_new_tokens": 5, "num_return_sequences": 20, "stop_token_ids": [2]}
    assert not differ(
        spelling.beam_search([[3], [4, 5]], **options), by_definition(spelling.model, [[3], [4, 5]], **options)
    )


def test_a_text_may_have_fewer_hypotheses_than_beams(spelling):
    (found,) = spelling.beam_search(
        [[3]], num_beams=4, num_return_sequences=4, max_new_tokens=2, stop_token_ids=range(13)
    )
    assert [done.tokens[-1] for done in found].count(13) < 4
    everything = spelling.beam_search([[3]], num_beams=20, num_return_sequences=20, max_new_tokens=1)
    assert sorted(done.tokens for done in everything[0]) == [[id] for id in range(len(PIECES))]


# --- The work ---


def test_a_prompt_is_computed_once_and_the_host_reads_once_a_step(tiny, monkeypatch):
    ran, read = [], []
    step, read_async = ModelRunner.step, beams.read_async

    def counted(self, ids, *given, **options):
        ran.append(tuple(ids.shape))
        return step(self, ids, *given, **options)

    monkeypatch.setattr(ModelRunner, "step", counted)
    monkeypatch.setattr(beams, "read_async", lambda x: read.append(tuple(x.shape)) or read_async(x))
    options = {"num_beams": 4, "stop_token_ids": [], "max_new_tokens": 10}
    Engine(tiny, backend="dense").beam_search(PROMPTS, **options)
    assert ran == [(6, 128), *[(24, 1)] * 9]
    assert read == [(6, 3 * 8 + 1)] * 10


def test_uncompiled_steps_are_recorded_and_replayed(tiny, monkeypatch):
    """Longer than the slots that a row first takes over, and than the slots in use at first."""
    ran = []
    best = beams._best_candidates
    monkeypatch.setattr(beams, "_best_candidates", lambda *given: ran.append(1) or best(*given))
    options = {"num_beams": 3, "num_return_sequences": 3, "stop_token_ids": [], "max_new_tokens": 75}
    found = Engine(tiny, compile="auto").beam_search([random_ids(70)], **options)
    assert len(ran) < 12
    ran.clear()
    plain = Engine(tiny, backend="dense").beam_search([random_ids(70)], **options)
    assert len(ran) == 75
    assert not differ(found, [[(done.score, done.tokens) for done in each] for each in plain])


# --- What is refused ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_beams": 1}, "num_beams must be at least 2, not 1"),
        ({"num_beams": 2.0}, "num_beams must be a whole number, not 2.0"),
        ({"num_return_sequences": 4}, "num_return_sequences 4 is more than num_beams 3"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, not 0"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never', not 'always'"),
        ({"early_stopping": 1}, "early_stopping must be True, False or 'never', not 1"),
        ({"length_penalty": "2"}, "length_penalty must be a number, such as 1.0, not '2'"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number, such as 1.0, not nan"),
        ({"length_penalty": -200}, "length_penalty -200 is too large for texts of up to 5 tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"prompts": []}, "no prompts given"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"stop": ["a"]}, "stop strings need a tokenizer"),
        ({"mask": 3}, "mask must be a Mask, found int"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(engine, changes, match):
    options = {"prompts": PROMPTS, "num_beams": 3, "max_new_tokens": 5} | changes
    with pytest.raises(ValueError, match=match) as error:
        engine.beam_search(**options)
    assert "\n" not in str(error.value)


def test_what_the_file_recommends_and_beams_lack_is_named_as_there(tiny, monkeypatch):
    recommended = GenerationConfig(suppress_tokens=(7,), min_new_tokens=2, do_sample=True, temperature=0.7)
    monkeypatch.setattr(tiny, "generation_config", recommended)
    with pytest.raises(ValueError, match="recommends min_new_tokens, suppress_tokens, which beam search lacks"):
        Engine(tiny).beam_search(PROMPTS, num_beams=2, **NEW)


def test_what_beams_do_not_have_is_refused_by_name(engine):
    from llama_flex import Ensemble

    with pytest.raises(ValueError, match="prompt 1 is an ensemble, which has no beams: use generate, or fuse"):
        engine.beam_search([[5], Ensemble([[5], [6]])], num_beams=2)
    for name in ("capture", "edit", "cache", "sampling"):
        with pytest.raises(TypeError, match=name):
            engine.beam_search(PROMPTS, num_beams=2, **{name: None})
    with pytest.raises(TypeError, match="num_beams"):
        engine.submit([5], num_beams=2)


def test_logits_that_are_not_finite_name_prompt_and_token(tokenizer):
    engine = Engine(poisoned_model(5), tokenizer, backend="dense")
    with pytest.raises(NonFiniteLogitsError, match="prompt 1 at new token 3") as error:
        engine.beam_search([[9], [3]], num_beams=2, max_new_tokens=4)
    assert error.value.where == [(1, 3)]


# --- Real weights ---


@pytest.mark.weights
@pytest.mark.exhaustive
def test_the_demo_weights_give_the_beams_of_transformers(demo_folder, demo, demo_reference):
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    texts = ["Gravity", "The old lighthouse keeper climbed the stairs every evening, and"]
    prompts, stop = [tokenizer.encode(text) for text in texts], [*demo.eos_token_ids, 30]  # 30: a full stop
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20}
    engine = Engine(demo, tokenizer, compile="auto")
    for more in ({}, {"length_penalty": 2.0, "early_stopping": True}):
        found = engine.beam_search(prompts, stop_token_ids=stop, **options, **more)
        assert not differ(found, reference_beams(demo_reference, prompts, stop, **options, **more))
    for prompt, each in zip(prompts, found, strict=True):
        for done in each:
            shown = [id for id in done.tokens if id not in stop]
            assert done.text == tokenizer.decode(prompt + shown).removeprefix(tokenizer.decode(prompt))
