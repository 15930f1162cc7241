"""tools.bench, serving and training run to their end at the smallest sizes; the last line is JSON with sane figures."""

import json
import math
import shutil

import pytest
import torch
from helpers import DEMO, few

from llama_flex import Llama, LlamaConfig
from tools import bench, serving, training
from tools._measuring import CONFIGS

TINY = ["--config", "tiny", "--device", "cpu", "--rounds", "1"]


def figures(value) -> list[float]:
    """Return all numbers in a JSON value, however deep."""
    if isinstance(value, dict | list):
        return [n for each in (value.values() if isinstance(value, dict) else value) for n in figures(each)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def measured(capsys, tool, name: str, *arguments: object) -> dict:
    """Run a measurement; check its table and its figures; return the JSON of its last line."""
    assert tool.main([name, *map(str, arguments)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["name"] == name
    assert sum(line.startswith("| --- |") for line in table) == 1
    numbers = figures(found | {"seed": 1})
    assert all(math.isfinite(n) and n > 0 for n in numbers), found
    return found


@pytest.fixture
def eager():
    """Do not compile, which would take most of the time; `test_decode` does."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=few(["given"], ["measured"]))
def machine(monkeypatch, request):
    """The speeds of the machine: measured, which takes seconds, or given."""
    if request.param == "measured":
        return
    for tool in (bench, serving):
        monkeypatch.setattr(tool, "read_bandwidth", lambda device: 1e10)
    for tool in (bench, serving, training):
        monkeypatch.setattr(tool, "products", lambda device, dtype: {"operations": 10**9, "seconds": [0.01] * 5})


def check_cases(cases: list[dict], rounds: int, tokens: int, peers: list[str]) -> None:
    """Check that every way ran in every round, and that its tokens are ours."""
    for case in cases:
        assert list(case["ways"]) == ["llama_flex", *(f"transformers, {peer}" for peer in peers)]
        for way in case["ways"].values():
            assert way["error"] is None
            assert len(way["seconds"]) == rounds
            assert way["first_tokens_as_ours"] == tokens


@pytest.mark.exhaustive
def test_decode(capsys):
    found = measured(capsys, bench, "decode", *TINY, "--context", 16, "--new", 4, "--warm-up", 1)
    check_cases(found["cases"], 1, 4, ["dynamic"])
    assert found["cases"][0]["size"] == 16


@pytest.mark.exhaustive
def test_prefill(capsys, eager):
    lengths, peers = ["--length", 16, 40], ["dynamic", "static", "flex"]
    found = measured(capsys, bench, "prefill", *TINY[:-1], 2, *lengths, "--peers", *peers)
    check_cases(found["cases"], 2, 1, peers)
    assert [case["size"] for case in found["cases"]] == [16, 40]
    assert found["cases"][0]["work"] < found["cases"][1]["work"]


def test_a_peer_that_fails_costs_no_other_result(capsys, eager, machine, monkeypatch):
    from tools import _peers

    def fail(*given):
        raise RuntimeError("no such thing\nfor a thousand lines")

    monkeypatch.setattr(_peers.Peer, "prefill", fail)
    found = measured(capsys, bench, "prefill", *TINY, "--length", 16)
    ways = found["cases"][0]["ways"]
    assert ways["transformers, dynamic"]["error"] == "RuntimeError: no such thing"
    assert len(ways["llama_flex"]["seconds"]) == 1


def test_a_start_prints_its_events(capsys, eager):
    """Check, in this process, what `startup` reads from the processes that it starts."""
    assert bench.main(["first-token", *TINY]) == 0
    assert capsys.readouterr().out.splitlines() == ["imported", "model", *(f"token {n}" for n in range(1, 11))]


@pytest.mark.exhaustive
def test_startup(capsys, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # for the processes that it starts
    found = measured(capsys, bench, "startup", *TINY)
    assert [start["kind"] for start in found["starts"]] == ["cold", "warm"]
    for start in found["starts"]:
        assert list(start["seconds"]) == ["imported", "model", *(f"token {n}" for n in range(1, 11))]
        times = list(start["seconds"].values())
        assert times == sorted(times)


@pytest.mark.exhaustive
@pytest.mark.weights
def test_fusion(capsys, eager, demo_folder, tmp_path):
    """Check it with a tiny model and the demo's tokenizer."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig.from_dict(CONFIGS["tiny"] | {"vocab_size": 49152})).requires_grad_(False)
    for parameter in model.layers.parameters():
        if parameter.dim() == 2:  # large enough for masks and positions to change the tokens
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    for path in DEMO.glob("*token*.json"):
        shutil.copy(path, tmp_path)
    given = ["--model", tmp_path, "--device", "cpu", "--rounds", 1, "--new", 3]
    found = measured(capsys, bench, "fusion", *given)
    assert found["prompt"] > 400
    assert [len(seconds) for seconds in found["cases"][0]["seconds"].values()] == [1, 1, 1]
    assert list(found["cases"][0]["same_tokens"].values()) == [True, True, True]


def test_window(capsys, eager):
    found = measured(capsys, bench, "window", *TINY, "--context", 300, "--window", 128)
    assert list(found["cases"][0]["seconds"]) == ["context 128", "context 300, window 128", "context 300"]


def test_throughput(capsys, eager, machine):
    sizes = ["--count", 3, "--low", 3, "--high", 6, "--batch-size", 2, "--peer", "one by one"]
    found = measured(capsys, serving, "throughput", *TINY, *sizes)
    assert [way["name"] for way in found["ways"]] == ["llama_flex", "one by one"]
    assert len({(way["requests"], way["tokens"]) for way in found["ways"]}) == 1
    assert all(way["bound"] < min(way["seconds"]) for way in found["ways"])


def test_sweep(capsys, eager, machine):
    found = measured(capsys, serving, "sweep", *TINY, "--context", 16, "--sizes", 1, 2)
    assert [step["size"] for step in found["steps"]] == [1, 2]
    assert found["steps"][0]["bound"] < found["steps"][1]["bound"]


def test_prefix(capsys, eager):
    found = measured(capsys, serving, "prefix", *TINY, "--count", 2, "--prefix", 130, "--own", 4)
    # Only whole pages of 128 tokens are shared.
    own = {"the rest, prefix in caches of their own": 4}
    assert found["computed"] == own | {"the first": 134, "the rest": 6, "the rest, without a prefix": 4}


@pytest.mark.exhaustive
def test_latency(capsys, eager):
    sizes = ["--count", 1, "--own", 20, "--new", 24, "--long", 300, "--chunk", 128]
    found = measured(capsys, serving, "latency", *TINY, *sizes)
    for name in ("in chunks", "in one piece"):
        assert found[name]["p50"] <= found[name]["p99"] <= found[name]["most"]


def test_requests_are_the_same_for_the_same_arguments(capsys):
    asked = ["requests", "--config", "tiny", "--count", "3", "--low", "2", "--high", "4"]
    assert serving.main(asked) == serving.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == lines[3:]
    for row in map(json.loads, lines):
        assert 2 <= len(row["tokens"]) <= 4
        assert 2 <= row["max_new_tokens"] <= 4
        assert 0 <= min(row["tokens"]) <= max(row["tokens"]) < 512
    assert serving.main([*asked, "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines() != lines[:3]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (bench, "decode --model nowhere", "nowhere: no such folder"),
        (bench, "decode --config tiny --new 4", "--new 4 leaves nothing to measure after --warm-up 8"),
        (bench, "decode --config tiny --context 131072", "131200 tokens exceed the model's context of 131072"),
        (bench, "prefill --config tiny --device nothing", "--device nothing is not known"),
        (bench, "window --config tiny --device meta", "--device meta is not supported"),
        (bench, "startup --config tiny --device cuda:99", "--device cuda:99 does not exist"),
        (bench, "decode --config tiny --rounds 0", "must be at least 1, not 0"),
        (serving, "throughput --model nowhere", "nowhere: no such folder"),
        (serving, "requests --config tiny --low 5 --high 4", "--low 5 is more than --high 4"),
        (serving, "throughput --config tiny --high 70000", "140000 tokens exceed the model's context of 131072"),
        (serving, "latency --config tiny --long 131072", "131073 tokens exceed the model's context of 131072"),
        (serving, "prefix --config tiny --prefix 131000 --own 72", "131073 tokens exceed"),
        (serving, "sweep --config tiny --context 131072 --sizes 1", "131374 tokens exceed"),
        (serving, "sweep --config tiny --device nothing", "--device nothing is not known"),
    ],
)
def test_impossible_measurements_are_refused_at_once(capsys, tool, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recompute", few([True], [False]))
def test_training(capsys, eager, machine, recompute):
    sizes = ["--tokens", "64", "--documents", "4", "--rounds", "2", "--dtype", "float32", "--device", "cpu"]
    peers = ["sdpa", "sdpa-compiled"]
    more = ["--recompute"] if recompute else []
    assert training.main(["--config", "tiny", *sizes, *more, "--peers", *peers]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["ways"]) == ["llama_flex", *(f"transformers, {peer}" for peer in peers)]
    assert all(len(way["seconds"]) == 2 and min(way["seconds"]) > 0 for way in found["ways"].values())
    assert found["recompute"] is recompute
    layer = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256
    attention = 4 * 2 * 16**2 * 4 * 32 * 2
    assert found["flop"] == 3 * (2 * 64 * (2 * layer + 512 * 128) + attention)
    with pytest.raises(SystemExit):
        training.main(["--config", "tiny", "--tokens", "8", "--documents", "8", "--device", "cpu"])
    assert "from 2 to" in capsys.readouterr().err
