"""Errors in a user's masks, score functions and edits: one line that names the function, the cause and the way out."""

import logging
import logging.handlers
import time

import pytest
import torch
from torch.nn.functional import embedding
from usercode_helpers import IDS

from llama_flex import Edit, Engine, Llama, Mask, ScoreMod

FLAGS, NUMBERS, MANY = torch.ones(3, dtype=torch.bool), torch.zeros(3), torch.zeros(300)

short_mask = Mask(lambda q, kv: FLAGS[kv.index], "short")
short_score = ScoreMod(lambda score, q, kv: score + NUMBERS[kv.index], "short")
too_short = (
    r"short: index \d+ into a tensor of 3 in line \d+ of test_errors.py, .*: make it as long as the longest sequence"
)

FORWARD = {
    "a short table": (lambda m: m(IDS, mask=short_mask), f"mask {too_short}"),
    "a short table, dense": (lambda m: m(IDS, mask=short_mask, backend="dense"), f"mask {too_short}"),
    "a short table of scores": (lambda m: m(IDS, score_mod=short_score), f"score function {too_short}"),
    "a short table of scores, dense": (
        lambda m: m(IDS, score_mod=short_score, backend="dense"),
        f"score function {too_short}",
    ),
    "an attribute that tokens lack": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: q.idx >= kv.index)),
        "'Token' object has no attribute 'idx' in line .*; a token has index, position, segment, head and batch",
    ),
    "four arguments": (
        lambda m: m(IDS, mask=Mask(lambda b, h, q, kv: q >= kv)),
        r"missing 2 required positional arguments.* a mask takes \(q, kv\).*from_mask_mod",
    ),
    "five arguments": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, b, h, q, kv: s)),
        "missing 2 required positional arguments.*from_score_mod",
    ),
    "item": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: kv.index <= q.index.item())),
        r"Python code depends on the value of a tensor in line .*: no `if`",
    ),
    "if": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s if q.index > 3 else s * 2)),
        r"Python code depends on the value of a tensor in line .*: no `if`",
    ),
    "tolist": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: kv.index <= q.index.tolist())),
        r"Python code depends on the value of a tensor in line .*: no `if`.*`.tolist\(\)`",
    ),
    "numpy": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * q.index.numpy())),
        r"Python code depends on the value of a tensor in line .*: no `if`.*`.numpy\(\)`",
    ),
    "nonzero": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: torch.nonzero(q.index).sum() >= 0)),
        "mask <lambda>: a shape depends on the values of a tensor in line .*: no `nonzero`.* a table",
    ),
    "unique": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * torch.unique(kv.index).sum())),
        "score function <lambda>: a shape depends on the values of a tensor in line .*: no `nonzero`, `unique`",
    ),
    "if of a table": (  # which fails only when FlexAttention traces it
        lambda m: m(IDS, mask=Mask(lambda q, kv: kv.index <= q.index if NUMBERS[0] < 1 else q.index > 3)),
        "mask <lambda>: Python code depends on the value of a tensor in line .* of test_errors.py",
    ),
    "what is unique in a table": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s + sum(n for n in NUMBERS.unique()))),
        r"mask causal\(\) or score function <lambda>: Python code depends on the value of a tensor in line .* of test_",
    ),
    "what torch does not trace": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * bool(time.time()))),
        "or score function <lambda>: torch cannot trace or compile it in line .* of test_errors.py",
    ),
    "an index below 0": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: FLAGS.index_select(0, kv.index - 1)[0])),
        r"mask <lambda>: index -1 into a tensor of 3 in line .*: padding and free slots have index -1; clamp it, as in "
        r"`kv.index.clamp\(min=0\)`$",
    ),
    "an index below 0 of an embedding": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s + embedding(kv.index - 1, NUMBERS[:, None])[0])),
        r"an index is out of range in line .*: make the table as long .* index -1, so clamp\(min=0\)$",
    ),
    "the index of a free slot": (
        lambda m: m(
            IDS,
            cache=m.new_cache(1, 200),
            score_mod=ScoreMod(lambda s, q, kv: s + MANY.index_select(0, kv.index)[0]),
        ),
        "score function <lambda>: index -1 into a tensor of 300.*padding and free slots have index -1",
    ),
    "chance": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: torch.rand(()) < 0.5)),
        "draws random numbers in line .*: take random numbers from a table",
    ),
    "an edit of one argument": (
        lambda m: m(IDS, edit=Edit("resid_pre", lambda x: x)),
        r"edit <lambda> at resid_pre raises TypeError: .* an edit \(x, tokens\)",
    ),
    "an edit with a short table": (
        lambda m: m(IDS, edit=Edit("resid_pre", lambda x, t: x + NUMBERS[t.index][..., None])),
        "edit <lambda> at resid_pre: index 3 into a tensor of 3",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_errors_of_a_forward(model, name):
    call, message = FORWARD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


ENGINE = {
    "a short table": (lambda e: e.generate([[1, 2]], max_new_tokens=8, mask=short_mask), f"mask {too_short}"),
    "a short table of scores": (
        lambda e: e.generate([[1, 2]], max_new_tokens=8, score_mod=short_score),
        f"score function {too_short}",
    ),
    "a short table in a request": (lambda e: e.submit([1, 2], max_new_tokens=8, mask=short_mask), f"mask {too_short}"),
}


@pytest.mark.parametrize("name", ENGINE)
def test_errors_of_an_engine(model, name):
    call, message = ENGINE[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(Engine(model, max_length=128, max_batch_size=2))
    assert "\n" not in str(caught.value)


def test_a_table_long_enough_for_the_first_tokens_is_refused_before_any_is_generated(model, monkeypatch):
    calls = []
    monkeypatch.setattr(Llama, "step", lambda *_: calls.append(1))
    table = torch.ones(9, dtype=torch.bool)
    with pytest.raises(ValueError, match="index 9 into a tensor of 9"):
        Engine(model).generate([[1, 2]], max_new_tokens=8, mask=Mask(lambda q, kv: table[kv.index]))
    assert not calls


def test_torchs_log_of_a_failed_trace_is_not_shown(model):
    """torch logs ninety lines before the error that says what is wrong."""
    log, seen = logging.getLogger("torch._subclasses.fake_tensor"), logging.handlers.BufferingHandler(99)
    log.addHandler(seen)
    try:
        with pytest.raises(ValueError, match="Python code depends on the value of a tensor"):
            model(IDS, mask=Mask(lambda q, kv: (kv.index <= q.index) & (NUMBERS[0].item() > 1)))
        log.error("failed while attempting to run meta for another")
    finally:
        log.removeHandler(seen)
    assert [record.getMessage() for record in seen.buffer] == ["failed while attempting to run meta for another"]


def test_a_users_own_exception_comes_through(model):
    class Mine(Exception):
        pass

    def mask(q, kv):
        raise Mine

    with pytest.raises(Mine):
        model(IDS, mask=Mask(mask))
