"""Few queries as heads of one, which CUDA's decoding kernel computes: the same attention, compiled for a CPU here."""

import pytest
import torch

from llama_flex import Mask, Tokens, masks, scores
from llama_flex.attention import attend, build_attention_metadata
from llama_flex.masks import few_queries
from llama_flex.masks.plan import LayerAttention


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(few_queries, "are_few", lambda q, lists: 1 < q.shape[2] <= few_queries.MOST)


def attended(mask, score_mod=None, queries: int = 5, held: int = 200, fault: int = 0):
    """Return compiled attention of a row's newest queries, and of another's that has fewer, and its definition."""
    torch.manual_seed(0)
    kv = Tokens.arriving(256, batch=2, segments=torch.arange(256) % 3)
    kv = kv._replace(index=torch.where(kv.index < torch.tensor([[held], [held - 2]]), kv.index, -1))
    q = kv.map(lambda x: x[:, held - queries : held].clone())
    q = q._replace(index=q.index + fault * (q.index > 0))
    given = [torch.randn(2, heads, n, 16) for heads, n in ((4, queries), (2, 256), (2, 256))]
    attention = LayerAttention(mask, score_mod)

    def run(q_, k, v, q: Tokens, kv: Tokens):
        return attend(q_, k, v, build_attention_metadata(attention, q, kv, 4, "flex"))

    found = torch.compile(run, fullgraph=True, dynamic=False)(*given, q, kv)
    true = kv.map(lambda x: x[:, held - queries : held].clone())
    return found, attend(*given, build_attention_metadata(attention, true, kv, 4, "dense")), true.index >= 0


@pytest.mark.parametrize(
    ("mask", "score_mod", "queries"),
    [
        (masks.causal(), None, 2),
        (masks.sliding_window(7) | masks.sink(2), scores.alibi(4), 16),
        (masks.causal() & masks.document(), scores.softcap(2.0), 5),
        (Mask(lambda q, kv: kv.index <= q.index - (q.position % 2)), scores.relative_bias(torch.randn(4, 9)), 8),
    ],
    ids=["causal", "window, alibi", "documents, softcap", "own, table by head"],
)
@torch.no_grad()
def test_few_queries_attend_as_defined(mask, score_mod, queries):
    found, expected, real = attended(mask, score_mod, queries)
    error = (found - expected).abs().amax((1, 3))
    assert error[real].max() < 2e-6


@torch.no_grad()
def test_queries_at_another_place_are_found():
    found, expected, real = attended(masks.sliding_window(3), fault=1)
    assert (found - expected).abs().amax((1, 3))[real].max() > 1e-2
