"""Arguments and tensors that callers give: what does not fit is named in one line, before any work."""

import inspect
import re

import pytest
import torch
from usercode_helpers import CONFIG, IDS

from llama_flex import Engine, Llama, Sampling

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
}


@pytest.mark.parametrize("name", FORWARD)
def test_wrong_inputs_of_a_forward_are_named(model, name):
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
}


@pytest.mark.parametrize("name", ENGINE)
def test_wrong_arguments_of_an_engine_are_named(model, name):
    call, message = ENGINE[name]
    with pytest.raises(ValueError, match=message) as caught:
        call(Engine(model, max_length=128, max_batch_size=2))
    assert "\n" not in str(caught.value)


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
    """The tokens are computed all the same, as transformers' generate does."""
    ids = IDS.repeat(1, 2)
    with pytest.warns(UserWarning, match=r"^400 tokens exceed the 300 that the model was trained for"):
        model(ids)
    cache = model.new_cache(1, 512)
    model(ids[:, :299], cache=cache)
    with pytest.warns(UserWarning, match=r"^301 tokens exceed the 300"):
        model(ids[:, 299:301], cache=cache)


@pytest.mark.filterwarnings("error")
def test_padding_is_not_counted_against_the_context(model):
    dense = {"backend": "dense"}  # which is faster, and counts alike
    ids, real = IDS.repeat(2, 2), torch.tensor([200, 300])
    model(ids, lengths=real, **dense)
    cache = model.new_cache(2, 900)
    model(ids[:, :250], lengths=torch.tensor([150, 100]), cache=cache, **dense)
    model(ids[:, :100], cache=cache, **dense)
    cache.truncate(200)
    model(ids[:, :150], lengths=torch.tensor([100, 50]), cache=cache, **dense)
    with pytest.warns(UserWarning, match=r"^310 tokens exceed the 300"):
        model(ids[:, :300], lengths=torch.tensor([10, 0]), cache=cache, **dense)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_warning_names_the_line_of_the_call(hooked):
    model = Llama(CONFIG).eval().requires_grad_(False)
    if hooked:
        model.register_forward_hook(lambda *_: None)
    for call in (model, model.forward):
        with pytest.warns(UserWarning, match="tokens exceed") as warned:
            call(IDS.repeat(1, 2))
        assert (warned[0].filename, warned[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)


@pytest.mark.parametrize(("value", "said"), [(10**400, "1000"), (float("nan"), "nan"), (True, "True"), ("1", "'1'")])
def test_a_wrong_temperature_is_named(value, said):
    with pytest.raises(ValueError, match=rf"temperature must be 0 \(greedy\) or a positive number, not {said}"):
        Sampling(temperature=value)
