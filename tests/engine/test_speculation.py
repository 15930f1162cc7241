"""Drafters, the number of drafts, what is refused of them, and what caches forget of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from request_helpers import random_model
from speculation_helpers import VOCAB, Schedule, check, guesses, held, model, small_model

from llama_flex import Engine, Llama, Quantization, Sampling, scores
from llama_flex.checkpoint.quantization import quantise_beside
from llama_flex.engine.drafting import COST, SIZES, Acceptance, prompt_lookup
from llama_flex.engine.model_runner import ModelRunner
from llama_flex.engine.speculation import Speculation
from llama_flex.kernels.lora import LoRA
from llama_flex.layers import Linear

NEW = {"max_new_tokens": 9, "stop_token_ids": ()}

# ---- lookup in the text


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 9, 8, 7, 6, 1, 2], [9, 8, 7, 6, 1]),
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2, 6, 1]),  # of the most recent place, repeated
        ([4, 1, 2, 3, 5, 1, 2, 6, 4, 1, 2], [3, 5, 1, 2, 6]),  # of the longest ending
        ([9, 4, 1, 2, 3, 5, 4, 1, 2, 6, 9, 4, 1, 2], [3, 5, 4, 1, 2]),
        ([7, 7, 7], [7, 7, 7, 7, 7]),
        ([1, 2, 1, 2], [1, 2, 1, 2, 1]),
        ([1, 2, 3, 2], []),  # a single token says too little
        ([1, 2], []),
        ([1], []),
        ([], []),
    ],
)
def test_lookup_drafts_what_followed(text, drafts):
    assert prompt_lookup(text, 5) == drafts
    assert all(type(id) is int for id in prompt_lookup(np.array(text), 5))


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 15))
@settings(max_examples=300, deadline=None)
def test_lookup_is_its_definition(text, most):
    def define() -> list[int]:
        for n in (4, 3, 2):
            for start in reversed(range(len(text) - n)):
                if text[start : start + n] == text[-n:]:
                    return (text[start + n :] * most)[:most]
        return []

    assert prompt_lookup(text, most) == define()


# ---- how many drafts


def test_drafts_double_while_all_are_accepted():
    text, asked = Acceptance(), []
    for _ in range(4):
        asked.append(text.most)
        text.add(text.most, text.most + 1, 0.1)
    assert asked == [3, 6, 12, SIZES[-1]]
    text.add(15, 5, 0.1)
    assert text.most == 5
    text.add(5, 1, 0.1)
    assert text.most == 1
    assert (text.steps, text.drafted, text.accepted) == (6, 3 + 6 + 12 + 15 + 15 + 5, 3 + 6 + 12 + 15 + 4)


@pytest.mark.parametrize("cost", [0.1, 0.5])
def test_a_text_gives_up_when_drafts_cost_more_than_they_give(cost):
    text = Acceptance()
    for step in range(1, 40):
        if text.most == 0:
            break
        text.add(3, 1, cost)
        assert (text.most == 0) == (step >= 16)
    paying = Acceptance()
    for _ in range(40):
        paying.add(3, 3, cost)
    assert paying.most == 3


@pytest.mark.parametrize("drafter", [guesses, small_model()])
def test_drafts_that_are_never_right_are_given_up_and_counted(drafter):
    engine = Engine(model(), backend="dense", speculate=drafter)
    engine.generate([[5, 6], [7, 8, 9]], max_new_tokens=60, stop_token_ids=())
    speculation = engine.speculation
    assert (speculation.texts, speculation.given_up) == (2, 2)
    assert speculation.drafted < 2 * 60
    assert speculation.describe().endswith("tokens a step, given up in 2 texts, where they did not pay")
    assert engine.explain().splitlines()[-1] == speculation.describe()


def test_speculation_is_described():
    engine = Engine(model(), backend="dense", speculate="lookup")
    assert engine.speculation.describe() == "drafts by prompt lookup: 0 in 0 texts, 0 accepted"
    engine.speculation.texts = engine.speculation.given_up = 1
    assert engine.speculation.describe().startswith("drafts by prompt lookup: 0 in 1 text, ")
    copied, other = (Engine(model(), speculate=x).speculation for x in ("self", small_model()))
    assert "a copy in 4 bits (a step reads 0.000 GB of weights, one of the model 0.000 GB)" in copied.describe()
    assert "drafts by a draft model (a step reads" in other.describe()
    assert copied.weights[0] < copied.weights[1] > other.weights[0]
    assert copied.cost == COST["cpu"] + copied.weights[0] / copied.weights[1]
    assert "drafts by guesses: " in Engine(model(), speculate=guesses).speculation.describe()


# ---- what is refused


@pytest.mark.parametrize("value", ["other", "", 5, True, [1, 2], b"self"])
def test_what_cannot_draft_is_refused_in_one_line(value):
    with pytest.raises(
        ValueError, match=r"^speculate must be 'lookup', 'self', a Llama or a function of token ids, not"
    ):
        Speculation.of(value, ModelRunner(model()))


def test_a_draft_model_with_other_tokens_or_on_another_device_is_refused():
    other = Llama(replace(small_model().config, vocab_size=VOCAB + 1))
    with pytest.raises(ValueError, match=r"^the draft model's tokens, 161, must be those of the model, 160$"):
        Engine(model(), speculate=other.eval())
    with torch.device("meta"):
        nowhere = Llama(small_model().config).eval()
    with pytest.raises(ValueError, match="device"):
        Engine(model(), speculate=nowhere)


@pytest.mark.parametrize("drafts", [["a"], None, 5, [1.5], [True], [[1]]])
def test_a_drafter_that_returns_no_ids_is_refused(drafts):
    engine = Engine(model(), backend="dense", speculate=lambda ids, most: drafts)
    with pytest.raises(ValueError, match=r"^a drafter must return a list of token ids, not "):
        engine.generate([[5, 6, 7]], **NEW)


@pytest.mark.parametrize("id", [-1, VOCAB, 10**9])
def test_a_drafter_that_returns_ids_outside_the_vocabulary_is_refused(id):
    engine = Engine(model(), backend="dense", speculate=lambda ids, most: [3, id])
    with pytest.raises(ValueError, match=f"^the drafter returned {id}, which is outside the vocabulary of {VOCAB}$"):
        engine.generate([[5, 6, 7]], **NEW)


def test_what_a_drafter_raises_reaches_the_caller_and_leaves_the_engine_usable():
    def draft(ids, most):
        raise KeyError(len(ids))

    engine = Engine(model(), backend="dense", speculate=draft)
    cache = engine.new_cache(1, 128)
    with pytest.raises(KeyError):
        engine.generate([[5, 6, 7]], cache=cache, **NEW)
    assert [index for index, *_ in held(cache)[0]] == [0, 1, 2]
    engine.speculation.drafter = prompt_lookup
    assert engine.generate([[5, 6, 7]], **NEW)[0].tokens == Engine(model()).generate([[5, 6, 7]], **NEW)[0].tokens


def test_drafts_beyond_those_asked_for_are_left_out_and_any_sequence_will_do():
    for drafts in ([3] * 1000, np.full(100, 3), torch.full((100,), 3), (3, 4)):
        asked = []

        def draft(ids, most, drafts=drafts, asked=asked):
            asked.append((list(ids), most))
            return drafts

        engine = Engine(model(), backend="dense", speculate=draft)
        tokens = engine.generate([[5, 6, 7]], **NEW)[0].tokens
        assert tokens == Engine(model()).generate([[5, 6, 7]], **NEW)[0].tokens
        assert asked[0] == ([5, 6, 7, tokens[0]], 3)
        assert all(1 <= most <= SIZES[-1] and len(ids) + most < 3 + 9 for ids, most in asked)


def test_requests_that_need_the_host_for_each_token_have_no_drafts():
    engine = Engine(model(), backend="dense", speculate=lambda ids, most: [3] * most)
    sampling = Sampling(no_repeat_ngram_size=2)
    tokens = engine.generate([[5, 6, 7]], sampling=sampling, **NEW)[0].tokens
    assert tokens == Engine(model()).generate([[5, 6, 7]], sampling=sampling, **NEW)[0].tokens
    assert engine.speculation.drafted == 0


@pytest.mark.parametrize("drafter", ["self", "small"])
def test_a_model_drafts_after_the_model_was_moved(drafter):
    mine = random_model()
    engine = Engine(mine, backend="dense", speculate="self" if drafter == "self" else small_model())
    mine.to(torch.float64)
    assert engine.generate([[5, 6, 7]], **NEW)[0].tokens == Engine(mine).generate([[5, 6, 7]], **NEW)[0].tokens
    assert engine.speculation.drafted > 0


def test_a_score_function_by_head_is_not_for_a_draft_model():
    check(Schedule([[5, 6, 7]], NEW | {"score_mod": scores.alibi(4)}), "small")


# ---- what caches forget


def filled(lengths: list[int], rolling: bool = False):
    """Return a cache with rows of random tokens."""
    made = model().new_rolling_cache(len(lengths), 9, sinks=2) if rolling else model().new_cache(len(lengths), 256)
    prompts = [random_ids(n) for n in lengths]
    prompts = [[id % VOCAB for id in prompt] for prompt in prompts]
    Engine(model(), backend="dense").generate(prompts, max_new_tokens=1, stop_token_ids=(), cache=made)
    return made


def test_a_ragged_cache_drops_the_last_tokens_of_each_row_and_releases_their_room():
    cache = filled([5, 140, 1])
    room = cache.room
    with cache.appending(4):
        ids = torch.tensor([[3, 4, 5, 6]] * 3)
        plan = model().attention_plan(None)
        inputs = torch.tensor([4, 2, 0], dtype=torch.int32), cache.next_position[:, None] + torch.arange(4), 0 * ids
        model().step(ids, *inputs, cache, plan, "dense")
    assert cache.length.tolist() == [9, 142, 1]
    cache.drop(torch.tensor([3, 0, 0], dtype=torch.int32))
    assert cache.length.tolist() == [6, 142, 1]
    assert cache.room == room - 4
    cache.release(2)
    assert cache.room == room - 2
    cache.drop(torch.tensor([6, 142, 1], dtype=torch.int32))
    assert cache.length.tolist() == [0, 0, 0]


def test_a_rolling_cache_drops_its_newest_tokens_and_has_no_room_to_release():
    cache = filled([30, 7], rolling=True)
    before = held(cache)
    cache.drop(torch.tensor([1, 3], dtype=torch.int32))
    assert cache.length.tolist() == [29, 4]
    assert held(cache)[1] == before[1][:4]
    cache.release(5)
    assert cache.reserved == 0
    assert cache.room is None


# ---- a copy in 4 bits


def test_a_copy_in_4_bits_shares_all_but_the_matrices_of_its_layers(tmp_path):
    mine = random_model()
    with torch.device("meta"):
        copied = Llama(mine.config).eval()
    quantise_beside(mine, copied, Quantization("int4"))
    places = {name: parameter.data_ptr() for name, parameter in mine.named_parameters()}
    matrices = {f"{path}.weight" for path, x in mine.named_modules() if isinstance(x, Linear) and "layers" in path}
    found = dict(copied.named_parameters())
    assert not any(parameter.is_meta for parameter in (*found.values(), *copied.buffers()))
    for name, place in places.items():
        assert (found[name].data_ptr() == place) == (name not in matrices), name
    assert {name for name in found if name not in places} == {
        f"{name}_{part}" for name in matrices for part in ("scale", "zero_point")
    }
    mine.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path, device="cpu", quantize="int4")
    ids = torch.tensor([random_ids(20)]) % VOCAB
    assert torch.equal(copied(ids), loaded(ids))


@pytest.mark.parametrize("active", [False, True])
def test_a_model_with_adapters_has_a_copy_without_them(active):
    mine = random_model()
    name = mine.adapters.add("one")
    for each in (module for module in mine.modules() if isinstance(module, LoRA)):
        for factor in each.parameters():
            torch.nn.init.normal_(factor, std=0.2)
    mine.requires_grad_(False)
    mine.adapters.activate(name if active else None)
    options = NEW | {"adapter": [None, "one", "__base__"]}
    expected = [c.tokens for c in Engine(mine, backend="dense").generate([[5, 6, 7]] * 3, **options)]
    assert expected[1] != expected[2]
    engine = Engine(mine, backend="dense", speculate="self", max_slots=512)
    assert [c.tokens for c in engine.generate([[5, 6, 7]] * 3, **options)] == expected
    requests = [engine.submit([5, 6, 7], adapter=each, **NEW) for each in options["adapter"]]
    engine.run()
    assert [r.completion.tokens for r in requests] == expected


def test_a_model_whose_modules_were_replaced_has_no_copy():
    mine = random_model()
    mine.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"the model has no module layers\.1\.mlp\.\w+ any more"):
        Engine(mine, speculate="self")


def test_a_quantised_model_has_no_copy(tiny_pair, tmp_path):
    tiny_pair("gqa")[1].save_pretrained(tmp_path)
    quantised = Llama.from_pretrained(tmp_path, device="cpu", quantize="int8")
    with pytest.raises(ValueError, match=r"^the model is quantised already, so a copy of few bits is hardly faster$"):
        Engine(quantised, speculate="self")
    engine = Engine(quantised, backend="dense", speculate="lookup")
    assert (
        engine.generate([[5, 6, 5, 6]], **NEW)[0].tokens == Engine(quantised).generate([[5, 6, 5, 6]], **NEW)[0].tokens
    )


def test_a_model_whose_rows_no_groups_divide_is_refused():
    odd = Llama(replace(model().config, hidden_size=40)).eval()
    with pytest.raises(ValueError, match="groups of 32 do not divide rows of 40 numbers"):
        Engine(odd, speculate="self")
