"""What a caller gets wrong in Python is told in one line that names the value and the way out, before any work."""

import inspect
import logging
import logging.handlers
import re
import time

import pytest
import torch
from torch.nn.functional import embedding

from llama_flex import Edit, Engine, Llama, LlamaConfig, Mask, Sampling, ScoreMod

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=300,
)
IDS = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
FLAGS, NUMBERS, MANY = torch.ones(3, dtype=torch.bool), torch.zeros(3), torch.zeros(300)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(CONFIG).eval().requires_grad_(False)


short_mask = Mask(lambda q, kv: FLAGS[kv.index], "short")
short_score = ScoreMod(lambda score, q, kv: score + NUMBERS[kv.index], "short")
too_short = (
    r"short: index \d+ into a tensor of 3 in line \d+ of test_messages.py, .*: make it as long as the longest text"
)

FORWARD = {
    "a negative id": (lambda m: m(torch.tensor([[-1]])), "token id -1 is outside the vocabulary of 64 ids"),
    "an id too large": (lambda m: m(torch.tensor([[5, 64]])), "token id 64 is outside the vocabulary of 64 ids"),
    "a list of ids": (lambda m: m([[1, 2]]), r"input_ids must be a tensor .*, such as torch.tensor\(\[\[1, 2, 3\]\]\)"),
    "floats": (lambda m: m(torch.tensor([[1.0]])), r"input_ids must be a tensor of integers .* torch.float32 \[1, 1\]"),
    "one dimension": (lambda m: m(IDS[0]), r"\[batch, tokens\] .* torch.int64 \[200\]"),
    "a list of positions": (lambda m: m(IDS, positions=[[1]]), r"positions must be a tensor of integers \[1, 200\]"),
    "a list of lengths": (lambda m: m(IDS, lengths=[3]), r"lengths must be a tensor of integers \[1\] .* found list"),
    "flags as ids": (
        lambda m: m(torch.tensor([[True]])),
        r"input_ids must be a tensor of integers .* torch.bool \[1, 1\]",
    ),
    "flags as lengths": (
        lambda m: m(IDS, lengths=torch.tensor([True])),
        r"lengths must be a tensor of integers \[1\] .* found torch.bool \[1\]",
    ),
    "flags as positions": (lambda m: m(IDS, positions=IDS > 0), "positions must be a tensor of integers .* torch.bool"),
    "flags as segments": (lambda m: m(IDS, segments=IDS > 0), "segments must be a tensor of integers .* torch.bool"),
    "a wrong cache": (lambda m: m(IDS, cache="x"), "cache must be made with model.new_cache, found str"),
    "true logits": (lambda m: m(IDS, logits_to_keep=True), "logits_to_keep must be a whole number, not True"),
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
        r"Python decides by the value of a tensor in line .*: no `if`",
    ),
    "if": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s if q.index > 3 else s * 2)),
        r"Python decides by the value of a tensor in line .*: no `if`",
    ),
    "tolist": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: kv.index <= q.index.tolist())),
        r"Python decides by the value of a tensor in line .*: no `if`.*`.tolist\(\)`",
    ),
    "numpy": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * q.index.numpy())),
        r"Python decides by the value of a tensor in line .*: no `if`.*`.numpy\(\)`",
    ),
    "nonzero": (
        lambda m: m(IDS, mask=Mask(lambda q, kv: torch.nonzero(q.index).sum() >= 0)),
        "mask <lambda>: a shape depends on the values of a tensor in line .*: no `nonzero`.* a table",
    ),
    "unique": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * torch.unique(kv.index).sum())),
        "score function <lambda>: a shape depends on the values of a tensor in line .*: no `nonzero`, `unique`",
    ),
    "if of a table": (  # which is no fault before FlexAttention traces it
        lambda m: m(IDS, mask=Mask(lambda q, kv: kv.index <= q.index if NUMBERS[0] < 1 else q.index > 3)),
        "mask <lambda>: Python decides by the value of a tensor in line .* of test_messages.py",
    ),
    "what is unique in a table": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s + sum(n for n in NUMBERS.unique()))),
        r"mask causal\(\) or score function <lambda>: Python decides by the value of a tensor in line .* of test_mess",
    ),
    "what torch does not trace": (
        lambda m: m(IDS, score_mod=ScoreMod(lambda s, q, kv: s * bool(time.time()))),
        "or score function <lambda>: torch cannot trace or compile it in line .* of test_messages.py",
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
        "draws random numbers in line .*: take chance from a table",
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
def test_of_a_forward(model, name):
    call, message = FORWARD[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


ENGINE = {
    "true as an id": (lambda e: e.generate([[True, 2]]), r"prompts must be lists of token ids"),
    "true as a limit": (
        lambda e: e.generate([[1]], max_new_tokens=True),
        "max_new_tokens must be a whole number, not True",
    ),
    "true as a stop token": (lambda e: e.submit([1], stop_token_ids=[True]), "stop_token_ids must be token ids"),
    "a text": (lambda e: e.generate("hello"), "prompts must be lists of token ids"),
    "a flat list": (lambda e: e.generate([1, 2]), "prompts must be lists of token ids"),
    "settings as a dict": (
        lambda e: e.generate([[1]], sampling={"temperature": 1}),
        r"such as Sampling\(temperature=0.8\)",
    ),
    "a short table": (lambda e: e.generate([[1, 2]], max_new_tokens=8, mask=short_mask), f"mask {too_short}"),
    "a short table of scores": (
        lambda e: e.generate([[1, 2]], max_new_tokens=8, score_mod=short_score),
        f"score function {too_short}",
    ),
    "a short table in a request": (lambda e: e.submit([1, 2], max_new_tokens=8, mask=short_mask), f"mask {too_short}"),
}


@pytest.mark.parametrize("name", ENGINE)
def test_of_an_engine(model, name):
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


def test_what_torch_logs_of_a_failed_trace_is_not_shown(model):
    """Ninety lines, before the one that says it."""
    log, seen = logging.getLogger("torch._subclasses.fake_tensor"), logging.handlers.BufferingHandler(99)
    log.addHandler(seen)
    try:
        with pytest.raises(ValueError, match="Python decides by the value of a tensor"):
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16", "auto", 16])
def test_a_dtype_that_weights_cannot_have_is_named(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"dtype must be one of torch.float64, .* found {re.escape(repr(dtype))}"):
        Llama.from_pretrained(tmp_path, dtype=dtype)


def test_a_model_without_weights_is_named(tmp_path):
    with torch.device("meta"):
        model = Llama(CONFIG)
    for call in (
        lambda: model(IDS),
        lambda: Engine(model).generate([[1]]),
        lambda: Engine(model).submit([1]),
        lambda: model.save_pretrained(tmp_path / "out"),
    ):
        with pytest.raises(
            ValueError, match=r"on the meta device, without weights; load it with Llama.from_pretrained"
        ):
            call()
    assert not (tmp_path / "out").exists()


def test_a_forward_beyond_the_context_is_warned_of(model):
    """transformers' generate warns too, and both compute what comes of it."""
    ids = IDS.repeat(1, 2)
    with pytest.warns(UserWarning, match=r"^400 tokens are more than the 300 that the model was made for"):
        model(ids)
    cache = model.new_cache(1, 512)
    model(ids[:, :299], cache=cache)
    with pytest.warns(UserWarning, match=r"^301 tokens are more than the 300"):
        model(ids[:, 299:301], cache=cache)


@pytest.mark.filterwarnings("error")
def test_padding_is_not_counted_against_the_context(model):
    ids, real = IDS.repeat(2, 2), torch.tensor([200, 300])
    model(ids, lengths=real)
    cache = model.new_cache(2, 900)
    model(ids[:, :250], lengths=torch.tensor([150, 100]), cache=cache)
    model(ids[:, :100], cache=cache)
    cache.truncate(200)
    model(ids[:, :150], lengths=torch.tensor([100, 50]), cache=cache)
    with pytest.warns(UserWarning, match=r"^310 tokens are more than the 300"):
        model(ids[:, :300], lengths=torch.tensor([10, 0]), cache=cache)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_warning_names_the_line_of_the_call(hooked):
    model = Llama(CONFIG).eval().requires_grad_(False)
    if hooked:
        model.register_forward_hook(lambda *_: None)
    for call in (model, model.forward):
        with pytest.warns(UserWarning, match="tokens are more than") as warned:
            call(IDS.repeat(1, 2))
        assert (warned[0].filename, warned[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)


@pytest.mark.parametrize(("value", "said"), [(10**400, "1000"), (float("nan"), "nan"), (True, "True"), ("1", "'1'")])
def test_a_temperature_that_is_none_is_named(value, said):
    with pytest.raises(ValueError, match=rf"temperature must be 0 \(greedy\) or a positive number, not {said}"):
        Sampling(temperature=value)
