"""Log-sum-exp and entropy of attention: what the dense definition gives, in every way of running."""

import copy
import math

import pytest
import torch
from helpers import random_ids
from interp_helpers import hooked
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from llama_flex import Capture, Edit, Engine, Llama, Mask, ScoreMod, masks, scores
from llama_flex.interp import capture as capture_file
from llama_flex.interp.hook_points import ATTENTION, ENTROPY, LSE

N, NEW = 30, 4
# Masks and score functions, each beside what it says of indices and scores [H, T, S] of all heads.
CASES = {
    "causal": (None, None, lambda h, q, k: k <= q, lambda s, h, q, k: s),
    "window and sink, softcap": (
        masks.sliding_window(7) | masks.sink(2),
        scores.softcap(3.0),
        lambda h, q, k: (k <= q) & ((q - k < 7) | (k < 2)),
        lambda s, h, q, k: 3 * (s / 3).tanh(),
    ),
    "by head, some see nothing": (
        Mask(lambda q, kv: kv.index + 5 * (q.head % 3) <= q.index, never_looks_ahead=True),
        ScoreMod(lambda score, q, kv: score - 0.1 * q.head * (q.index - kv.index)),
        lambda h, q, k: k + 5 * (h % 3) <= q,
        lambda s, h, q, k: s - 0.1 * h * (q - k),
    ),
}


def new_capture(**options) -> Capture:
    """Return a capture of both, and of what they follow from."""
    return Capture("q", "k", LSE, ENTROPY, **options)


def defined(capture: Capture, layer: int, allowed, scored, row: int, count: int):
    """Return log-sum-exp and entropy `[N, H]` of a row of `count` tokens, in float64, from its queries and keys."""
    q, k = (capture[name, layer][row, :count].double().transpose(0, 1) for name in ("q", "k"))
    index = torch.arange(count)
    at = torch.arange(len(q))[:, None, None], index[:, None], index
    s = scored(q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) / math.sqrt(q.shape[-1]), *at)
    s = s.masked_fill(~allowed(*at), -torch.inf)
    lse = s.logsumexp(-1)
    entropy = torch.special.entr(s.softmax(-1).nan_to_num()).sum(-1)
    return lse.t(), entropy.t()


def check(capture: Capture, case: str, counts: list[int], atol: float = 1e-5) -> None:
    """Check what was captured of rows of `counts` tokens."""
    *_, allowed, scored = CASES[case]
    for layer in range(2):
        for row, count in enumerate(counts):
            for name, expected in zip(
                (LSE, ENTROPY), defined(capture, layer, allowed, scored, row, count), strict=True
            ):
                found = capture[name, layer][row, :count].double()
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("by head, some see nothing", "flex"),
        *((case, "dense") for case in CASES),
        pytest.param("causal", "flex", marks=pytest.mark.exhaustive),
        pytest.param("window and sink, softcap", "flex", marks=pytest.mark.exhaustive),
    ],
)
@torch.no_grad()
def test_a_forward_and_a_cache_give_the_dense_definition(pair, case, backend):
    model, (mask, score_mod, *_) = pair[1], CASES[case]
    ids, options = torch.tensor([random_ids(N), random_ids(N, 1)]), {"mask": mask, "score_mod": score_mod}
    whole, steps, cache = new_capture(), new_capture(), model.new_cache(2, N)
    model(ids, lengths=torch.tensor([N, N - 9]), capture=whole, backend=backend, **options)
    check(whole, case, [N, N - 9])
    for part in ids.split((17, 10, 1, 1, 1), dim=1):
        model(part, cache=cache, capture=steps, backend=backend, **options)
    check(steps, case, [N, N])


@pytest.mark.parametrize("case", CASES)
def test_float64_gives_float64(pair, case):
    model, (mask, score_mod, *_), capture = copy.deepcopy(pair[1]).double(), CASES[case], new_capture()
    with torch.no_grad():
        model(torch.tensor([random_ids(N)]), capture=capture, mask=mask, score_mod=score_mod, backend="dense")
    assert capture[LSE, 0].dtype == torch.float64
    check(capture, case, [N], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"backend": "dense"}, False),
        ({"compile": "auto"}, True),
        ({}, True),
        pytest.param({"compile": True}, False, marks=pytest.mark.exhaustive),
        pytest.param({"compile": True}, True, marks=pytest.mark.exhaustive),
    ],
)
def test_generation_captures_them_in_streams_and_requests(pair, options, together):
    check_generation(pair[1], options, together)


def check_generation(model: Llama, options: dict, together: bool, atol: float = 1e-5) -> None:
    """Check what is captured in a stream, or in submitted requests, of two prompts."""
    mask, score_mod, *_ = CASES[case := "by head, some see nothing"]
    prompts = [random_ids(9), random_ids(20)]
    given = {"mask": mask, "score_mod": score_mod, "max_new_tokens": NEW, "stop_token_ids": ()}
    engine = Engine(model, max_batch_size=2, max_length=128, **options)
    if together:
        captures = [new_capture(device="cpu") for _ in prompts]
        for prompt, capture in zip(prompts, captures, strict=True):
            engine.submit(prompt, capture=capture, **given)
        engine.run()
        for prompt, capture in zip(prompts, captures, strict=True):
            check(capture, case, [len(prompt) + NEW - 1], atol)
    else:
        engine.generate(prompts, capture=(capture := new_capture(device="cpu")), **given)
        check(capture, case, [len(prompt) + NEW - 1 for prompt in prompts], atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("compile", [False, True, "auto"])
def test_generation_on_cuda_captures_them(pair, compile, together):
    check_generation(copy.deepcopy(pair[1]).cuda(), {"compile": compile}, together, atol=1e-4)


@torch.no_grad()
def test_entropy_is_that_of_the_weights_of_transformers(pair):
    reference, model, _ = pair
    ids, capture = torch.tensor([random_ids(N)]), Capture(ENTROPY)
    model(ids, capture=capture)
    for layer in range(2):
        expected = torch.special.entr(hooked(reference, ids)[ATTENTION, layer]).sum(-1)
        torch.testing.assert_close(capture[ENTROPY, layer], expected, rtol=0, atol=1e-5)
        assert capture[ENTROPY, layer][:, 0].eq(0).all()  # the first token sees itself alone
        assert capture[ENTROPY, layer].max() > 1


@torch.no_grad()
def test_lse_is_that_of_flex_attention(pair):
    capture = Capture("q", "k", LSE, layers=0)
    pair[1](torch.tensor([random_ids(N)]), capture=capture, mask=masks.bidirectional())
    q, k = (capture[name, 0].transpose(1, 2).contiguous() for name in ("q", "k"))
    _, aux = flex_attention(q, k, k.clone(), enable_gqa=True, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(capture[LSE, 0].transpose(1, 2), aux.lse, rtol=1e-6, atol=1e-5)


def test_rows_that_see_nothing_have_their_values_and_no_nan_in_gradients(pair):
    model, mask = pair[1], Mask(lambda q, kv: kv.index < q.index)
    shift = torch.zeros(model.config.hidden_size, requires_grad=True)
    capture, ids = Capture(LSE, ENTROPY), torch.tensor([random_ids(N)])
    with model.layers[0].attention.norm.register_forward_hook(lambda module, args, x: x + shift):
        model(ids, capture=capture, mask=mask, backend="dense")
    for layer in range(2):
        assert capture[LSE, layer][:, 0].eq(-torch.inf).all()
        assert capture[ENTROPY, layer][:, :2].eq(0).all()
    (capture[ENTROPY, 1].sum() + capture[LSE, 1][:, 1:].sum()).backward()
    assert shift.grad.isfinite().all()
    assert shift.grad.any()


@torch.no_grad()
def test_they_take_memory_for_a_block_of_queries_and_the_heads_asked_for(pair, monkeypatch):
    model, ids, sizes = pair[1], torch.tensor([random_ids(700)]), []
    define = capture_file.attention_scores

    def spy(*given):
        sizes.append(define(*given).numel())
        return define(*given)

    monkeypatch.setattr(capture_file, "attention_scores", spy)
    capture, every = Capture(LSE, ENTROPY, layers=1, heads=[6, 1]), Capture(LSE, ENTROPY, layers=1)
    model(ids, capture=capture, backend="dense")
    assert max(sizes) == 2 * 128 * 700
    model(ids, capture=every, backend="dense")
    for name in (LSE, ENTROPY):
        torch.testing.assert_close(capture[name, 1], every[name, 1][:, :, [6, 1]])
        assert capture[name, 1].shape == (1, 700, 2)
    some = Capture(ENTROPY, layers=1, where=[3, 699])
    model(ids, capture=some, backend="dense")
    torch.testing.assert_close(some[ENTROPY, 1], every[ENTROPY, 1][:, [3, 699]])


RIGHT = capture_file.lse_and_entropy
MUTATIONS = {
    "base 2": lambda scores: tuple(x / math.log(2) for x in RIGHT(scores)),
    "other scores": lambda scores: RIGHT(scores.clamp(max=1.0)),
    "one for the other": lambda scores: RIGHT(scores)[::-1],
    "what is masked": lambda scores: RIGHT(scores.masked_fill(scores == -torch.inf, 0.0)),
}


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_a_wrong_formula_would_be_noticed(pair, monkeypatch, name):
    case, capture = "window and sink, softcap", new_capture()
    mask, score_mod, *_ = CASES[case]
    monkeypatch.setattr(capture_file, "lse_and_entropy", MUTATIONS[name])
    pair[1](torch.tensor([random_ids(N)]), capture=capture, mask=mask, score_mod=score_mod, backend="dense")
    with pytest.raises(AssertionError):
        check(capture, case, [N])


def test_what_cannot_be_asked_for_is_refused_in_words():
    assert Capture(LSE, heads=[1]).heads == (1,)
    with pytest.raises(ValueError, match=r"attention, attention.lse, attention.entropy, found 'lse'"):
        Capture("lse")
    with pytest.raises(ValueError, match=r"site .attention\.lse. cannot be edited"):
        Edit(LSE, lambda x, tokens: x)
