"""Fixtures of the engine's tests. Engines attend by the dense definition where a test is not about FlexAttention, which
takes ten times as long when it is not compiled."""

import random

import pytest
from generation_helpers import save_pieces_tokenizer, successor_model
from request_helpers import Case, make_case, random_ids, random_model

from llama_flex import Engine, Ensemble, Llama, Sampling, Tokenizer, masks
from llama_flex.engine import batch
from llama_flex.engine.paged_batch import PagedBatch
from llama_flex.engine.request import Request
from llama_flex.engine.scheduler import Scheduler


@pytest.fixture
def tiny(tiny_pair) -> Llama:
    """A tiny random model with grouped queries."""
    return tiny_pair("gqa")[1]


@pytest.fixture
def engine(tiny) -> Engine:
    """An engine of the tiny model that attends by the dense definition."""
    return Engine(tiny, backend="dense")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The tokenizer of the successor model."""
    return save_pieces_tokenizer(tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def successor_engine(tokenizer) -> Engine:
    """An engine of the successor model, whose text is known."""
    return Engine(successor_model(), tokenizer, backend="dense")


# ---- submitted requests


@pytest.fixture(scope="session")
def flex() -> Engine:
    """An engine of `random_model` that attends by FlexAttention, uncompiled."""
    return Engine(random_model())


@pytest.fixture(scope="session")
def dense() -> Engine:
    """An engine of `random_model` that attends by the dense definition."""
    return Engine(random_model(), backend="dense")


@pytest.fixture
def read_later(monkeypatch):
    """A step may be read after the next one, as on CUDA, where what it left is copied at once."""
    monkeypatch.setattr(batch, "read_async", lambda x: x.clone().tolist)


@pytest.fixture
def preempted(monkeypatch) -> list[Request]:
    """Every request that had to give way before its end, as often as it had to."""
    found, release = [], Scheduler._release

    def noting(self, request):
        if not request.finished:
            found.append(request)
        release(self, request)

    monkeypatch.setattr(Scheduler, "_release", noting)
    return found


@pytest.fixture
def prefilled(monkeypatch) -> list[tuple[int, int]]:
    """The request and the first token of every chunk of a prompt that is computed."""
    found, run = [], PagedBatch._run

    def noting(self, size, width, buffers, host, rows, *given):
        if width > 1:
            found.extend((r.number, int(host["rows"][0, row])) for row, (r, _) in rows.items())
        return run(self, size, width, buffers, host, rows, *given)

    monkeypatch.setattr(PagedBatch, "_run", noting)
    return found


@pytest.fixture(scope="session")
def short_cases(dense) -> list[Case]:
    """Forty short requests of many kinds."""
    rng = random.Random(3)
    found = []
    for n in range(40):
        prompt = random_ids(
            rng.choice([rng.randint(1, 300), *[rng.choice([128, 128, 256]) - rng.randint(0, 2)] * 3]), n % 3
        )
        options = {
            "max_new_tokens": rng.choice([1, 5, 9, 12]),
            "stop_token_ids": range(3, 160, 40) if n % 4 == 3 else (),
        }
        if n % 2:
            options["sampling"] = Sampling(temperature=0.9, top_p=0.95, seed=n)
        if n % 10 == 4:
            prompt = Ensemble([prompt[:115], prompt[:50]], "max" if n % 20 == 4 else "mean")
        if n % 8 == 6:
            options["mask"] = masks.sliding_window(20 + n)
        found.append(make_case(dense, prompt, **options))
    return found
