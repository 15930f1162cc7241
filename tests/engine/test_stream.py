"""Decoding, compiled: few graphs for all prompts, and recorded steps that follow what happens to the cache."""

import pytest
import torch
from generation_helpers import assert_same
from helpers import few, random_ids

from llama_flex import Engine, Sampling


def test_three_graphs_serve_prompts_of_every_length_and_give_the_eager_tokens(tiny):
    eager, compiled = Engine(tiny), Engine(tiny, compile=True)
    prompts = [random_ids(length, 25) for length in (1, 5, 127, 128, 129, 300, 600)]
    options = {"max_new_tokens": 3, "stop_token_ids": []}
    expected = [eager.generate([prompt], **options)[0] for prompt in [*prompts, prompts[-1][:200]]]
    torch._dynamo.utils.counters.clear()  # run eagerly, flex_attention traces itself too
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [compiled.generate([prompt], **options)[0] for prompt in prompts]
        long = prompts[-1]
        compiled.generate([long], max_new_tokens=2, sampling=Sampling(temperature=1.0, top_p=0.9, seed=1))
        compiled.generate([long], max_new_tokens=2, sampling=Sampling(repetition_penalty=1.1))
        cache = compiled.new_cache(1, 700)
        compiled.generate([long[:50]], max_new_tokens=2, cache=cache)
        cache.truncate(20)
        found += compiled.generate([long[20:200]], cache=cache, **options)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert sorted(key[:3] for key in compiled.runner.shapes) == [(1, 1, 1024), (1, 128, 1024), (1, 512, 1024)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled.graphs.count == 2 * 3 + 3
    assert compiled.compile_seconds > 0
    assert not eager.runner.shapes
    assert not eager.graphs.count


@pytest.mark.parametrize("rolling", few([False], [True]))
@pytest.mark.parametrize("operation", few(["evict"], ["fork", "reorder", "truncate"]))
def test_a_compiled_stream_follows_what_happens_to_its_cache(tiny, operation, rolling):
    check_a_stream_follows_its_cache(tiny, operation, rolling, compile=True)


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("operation", ["evict", "fork", "reorder", "truncate"])
def test_an_uncompiled_stream_follows_what_happens_to_its_cache(tiny, operation, rolling):
    check_a_stream_follows_its_cache(tiny, operation, rolling, compile="auto")


def check_a_stream_follows_its_cache(tiny, operation, rolling, compile):
    """Check that a step is not replayed on the memory it was recorded on once the cache has moved to other memory."""
    prompts, forks, ends = [random_ids(40, 31), random_ids(9, 31)], [], []

    def generated(engine: Engine) -> list[int]:
        cache = tiny.new_rolling_cache(2, 20, 2, largest_append=128) if rolling else tiny.new_cache(2, 200)
        tokens = []
        for n, step in enumerate(engine.stream(prompts, max_new_tokens=16, stop_token_ids=[], cache=cache)):
            tokens.append(step.token)
            if n == 15:
                if operation == "fork":
                    forks.append(cache.fork())
                elif operation == "reorder":
                    cache.reorder([1, 0])
                elif operation == "evict":
                    cache.evict(lambda t: (t.index == t.index.amax(1, keepdim=True)) | (t.index == 0))
                elif rolling:
                    cache.truncate(0)
                else:
                    cache.truncate(9)
        ends.append((cache.tokens.index.amax(1).tolist(), cache.rolled_out.tolist()))
        return tokens

    found, expected = generated(Engine(tiny, compile=compile)), generated(Engine(tiny))
    assert found == expected
    assert ends[0] == ends[1]
    if forks:  # they hold what the cache held then
        ours, theirs = (fork.layers[0][0] for fork in forks)
        assert torch.equal(forks[0].tokens.index, forks[1].tokens.index)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
