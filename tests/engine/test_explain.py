"""`Engine.explain`: what ran last, compiled or not, in lines of text."""

import pytest
from helpers import few
from request_helpers import new_engine, random_ids

from llama_flex import Engine, masks, scores
from llama_flex.engine.explain import bytes_per_step


@pytest.mark.parametrize("compile", few([False], [True]))
def test_explain_says_what_ran(tiny_pair, compile):
    _, model = tiny_pair("gqa")
    engine, prompt = Engine(model, compile=compile), list(range(3, 203))
    with pytest.raises(ValueError, match="nothing has run"):
        engine.explain()
    mask, score_mod = [masks.sliding_window(20), masks.causal()], [None, scores.softcap(5.0)]
    engine.generate([prompt], max_new_tokens=5, stop_token_ids=(), mask=mask, score_mod=score_mod)
    lines = engine.explain().splitlines()
    assert lines[0] == "float32 on cpu; float32 products at precision 'highest'"
    if compile:
        assert lines[1] == f"2 steps compiled in {engine.graphs.count} graphs, 0 of them again"
        assert lines[2:4] == ["  1 x 1 tokens against 1024 slots", "  1 x 128 tokens against 1024 slots"]
    else:
        assert lines[1].startswith("not compiled: ")
    assert "1 layers, mask sliding_window(20)" in lines
    assert "1 layers, mask causal(), scores softcap(5.0)" in lines
    # The last token fed has index 203: a window of 20 ends in the second block, and causal sees the first as a whole.
    blocks = 9 if compile else 3
    assert [line for line in lines if "visits" in line] == [
        f"  the last query visits 1 of {blocks} blocks of 128 slots, 0 unmasked",
        f"  the last query visits 2 of {blocks} blocks of 128 slots, 1 unmasked",
    ]
    assert lines[-1].startswith(f"a step of 1 rows reads {bytes_per_step(model, [204]) / 1e9:.3f} GB")


@pytest.mark.parametrize("backend", ["dense", "flex"])
def test_explain_names_the_backend_that_ran(tiny_pair, backend):
    _, model = tiny_pair("gqa")
    engine = Engine(model, backend=backend)
    engine.generate([[1, 2, 3]], max_new_tokens=2, stop_token_ids=())
    assert f"attention backend {backend!r}" in engine.explain()


@pytest.mark.parametrize("backend", ["sdpa", None, 5])
def test_an_unknown_backend_is_refused(tiny_pair, backend):
    _, model = tiny_pair("gqa")
    with pytest.raises(ValueError, match="is not known; choose 'flex' or 'dense'"):
        Engine(model, backend=backend)


@pytest.mark.parametrize("backend", few(["dense"], ["flex"]))
def test_explain_is_of_what_ran_last_though_it_gave_one_token(backend, request):
    like = request.getfixturevalue(backend)
    engine = new_engine(like, max_batch_size=4, max_slots=1024, prefill_tokens=512)
    for width, new in ((9, 3), (19, 1)):
        engine.submit(random_ids(300, width), mask=masks.sliding_window(width), max_new_tokens=new, stop_token_ids=())
        engine.run()
        assert f"mask sliding_window({width})" in engine.explain()
