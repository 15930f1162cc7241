"""Generation under masks and score functions: whatever they are, the tokens are those of the full forward."""

import pytest
import torch
import transformers
from generation_helpers import reference_tokens
from helpers import few, random_ids

from llama_flex import Engine, Llama, LlamaConfig, Mask, Prompt, ScoreMod, masks
from llama_flex.engine import prefill
from llama_flex.masks import block_mask
from llama_flex.usercode.errors import CompileError


@pytest.mark.parametrize("compile", few([False], [True]))
def test_a_mask_holds_in_cached_generation(tiny_pair, compile):
    """Check greedy tokens under a window against a full forward with the same window at every step."""
    _, model = tiny_pair("gqa")
    window = masks.causal() & Mask(lambda q, kv: q.index - kv.index < 20, "window(20)")
    prompts = [list(range(3, 140)), [7, 8, 9]]
    engine = Engine(model, compile=compile, backend="dense")
    found = engine.generate(prompts, max_new_tokens=5, stop_token_ids=(), mask=window)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            assert token == model(torch.tensor([ids]), mask=window, backend="dense")[0, -1].argmax()
            ids.append(token)
    plain = engine.generate(prompts, max_new_tokens=5, stop_token_ids=())
    assert plain[0].tokens != found[0].tokens


@pytest.mark.parametrize("compile", few([False], [True]))
def test_functions_that_hold_for_one_cell_at_a_time_hold_in_generation(tiny, compile):
    """Check a mask that takes a row of a table and a number of that, and a score function that multiplies two rows,
    which torch cannot compile."""
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


# --- Masks that look ahead ---


@pytest.mark.parametrize("compile", few([False], [True]))
def test_a_mask_that_looks_ahead_holds_in_prompts_of_any_length(tiny_pair, compile):
    """Check every prompt's token against one dense forward over the whole prompt."""
    _, model = tiny_pair("gqa")
    engine, new = Engine(model, compile=compile, backend="dense"), {"max_new_tokens": 1, "stop_token_ids": ()}
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


@pytest.mark.parametrize(
    ("kind", "window"), [("Llama", None), pytest.param("Mistral", 40, marks=pytest.mark.exhaustive)]
)
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


def cells_of_a_prompt(monkeypatch, engine: Engine, length: int, mask: Mask | None) -> tuple[int, int]:
    """Count the cells of the mask that are evaluated to find out whether it looks ahead, and to list its blocks."""
    counts = {True: 0, False: 0}
    evaluate_cells, looks_ahead, asking = block_mask.evaluate_cells, prefill._looks_ahead, []

    def counted(*given):
        answers = evaluate_cells(*given)
        counts[bool(asking)] += answers[:, 0].numel()
        return answers

    def asked(*given):
        asking.append(1)
        try:
            return looks_ahead(*given)
        finally:
            asking.pop()

    with monkeypatch.context() as patch:
        patch.setattr(block_mask, "evaluate_cells", counted)
        patch.setattr(prefill, "_looks_ahead", asked)
        engine.generate([[3] * length], max_new_tokens=1, mask=mask)
    return counts[True], counts[False]


@pytest.mark.exhaustive
def test_only_opaque_masks_are_asked_whether_they_look_ahead_and_at_no_more_than_their_lists_cost(monkeypatch, tiny):
    named = masks.causal() & masks.sliding_window(64) | masks.sink(4) & masks.causal()
    for mask in (None, masks.causal(), named, masks.document() & masks.chunked(30), masks.fused()):
        asked, _ = cells_of_a_prompt(monkeypatch, Engine(tiny), 700, mask)
        assert asked == 0, mask
    opaque = Mask(lambda q, kv: (kv.index <= q.index) & (q.index - kv.index < 64))
    asked, listed = cells_of_a_prompt(monkeypatch, Engine(tiny), 700, opaque)
    assert 0 < asked <= listed


# --- Refused ---


def test_anything_but_a_score_function_is_refused(tiny_pair):
    _, model = tiny_pair("gqa")
    with pytest.raises(ValueError, match="score_mod must be a ScoreMod, found function"):
        model(torch.tensor([[1]]), score_mod=lambda score, q, kv: score)
    with pytest.raises(ValueError, match="3 masks for 2 layers"):
        model(torch.tensor([[1]]), mask=[masks.causal()] * 3)
    with pytest.raises(ValueError, match="ScoreMod needs a function"):
        ScoreMod(3)
