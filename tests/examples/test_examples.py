"""The examples of examples/ do what their docstrings say, with the demo weights."""

import importlib.util
import io
import json

import pytest
import torch
import transformers
from helpers import DEMO, ROOT

from llama_flex import Engine, Llama, Sampling, Tokenizer, masks

pytestmark = pytest.mark.weights


@pytest.fixture(autouse=True)
def demo_weights(demo_folder, monkeypatch):
    """Name the demo weights to the examples, which would look for them in the working directory."""
    monkeypatch.setenv("MODEL", str(demo_folder))


def load_example(name: str):
    """Import an example from its file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_wordings_are_answered_alone_fused_and_together(capsys):
    wordings = ("What is the capital of France?", "Name the city that serves as France's capital.")
    answers = load_example("fusion").main(wordings, new_tokens=8)
    ways = ["fused, one after another", "fused, side by side", "fused, the first weighs 4"]
    assert list(answers) == [*(f"alone: {w}" for w in wordings), *ways, "ensemble, mean", "ensemble, max"]
    assert all("Paris" in answer for answer in answers.values())
    assert len(set(answers.values())) > 1  # otherwise there would be nothing to compare
    lines = capsys.readouterr().out.splitlines()
    assert all(way in line and answer in line for line, (way, answer) in zip(lines, answers.items(), strict=True))


@pytest.mark.exhaustive
def test_streaming_forever_takes_no_more_memory_beyond_the_window(capsys):
    found = load_example("streaming_forever").main(window=16, sinks=4, new_tokens=16, text_tokens=129)
    assert list(found) == [4, 0]
    for sinks, (sizes, losses) in found.items():
        arrived, taken, memory = zip(*sizes, strict=True)
        assert list(arrived) == list(range(arrived[0], arrived[0] + 16))
        assert list(taken) == [min(count, 16 + sinks) for count in arrived]
        assert arrived[-1] > 16 + sinks
        assert len(set(memory)) == 1
        assert len(losses) == 1
    assert found[0][1][0] > found[4][1][0] + 0.5  # nats; about 3.5 with sinks
    assert "20 slots taken" in capsys.readouterr().out


def test_packed_documents_do_not_leak_and_causal_ones_do(capsys):
    found = load_example("packing").main()
    packed, leaking = found["causal & document"], found["causal"]
    assert len(packed) == len(leaking) == 4
    rounding = leaking[0]  # the first text has nothing before it
    assert max(packed) < 8 * rounding
    assert min(leaking[1:]) > 1000 * rounding
    assert capsys.readouterr().out.count("' Paris'") == 2


@pytest.mark.exhaustive
def test_rows_of_a_file_are_written_as_they_are_done():
    rows = [
        {"id": "long", "prompt": "Once upon a time", "max_new_tokens": 9},
        {"id": "short", "prompt": "The capital of France is", "max_new_tokens": 2},
        {"id": 3, "prompt": "Water boils at", "max_new_tokens": 3},
    ]
    output = io.StringIO()
    module = load_example("batch_file")
    module.main([*(json.dumps(row) + "\n" for row in rows), "\n"], output, batch_size=2)
    done = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [row["id"] for row in done] == ["short", 3, "long"]  # 3 begins when "short" ends
    engine = Engine(Llama.from_pretrained(DEMO), Tokenizer.from_pretrained(DEMO))
    for row in rows:
        ids = engine.tokenizer.encode(row["prompt"])
        alone = engine.generate([ids], max_new_tokens=row["max_new_tokens"])[0]
        expected = {"id": row["id"], "prompt": row["prompt"], "text": alone.text, "finish_reason": "length"}
        assert expected in done


def test_a_file_that_cannot_be_written_is_an_error():
    output = io.StringIO()
    output.close()
    with pytest.raises(ValueError, match="closed file"):
        load_example("batch_file").main(['{"id": 1, "prompt": "Water", "max_new_tokens": 1}'], output)


@pytest.mark.exhaustive
def test_a_mask_of_attn_gym_is_checked_and_generates_what_its_full_forward_predicts(demo, capsys):
    generated, predicted = load_example("gym_mask").main(window=3, sinks=1, new_tokens=6)
    assert len(generated) == 6
    assert generated == predicted
    theirs, combined = (line for line in capsys.readouterr().out.splitlines() if line.startswith("check_mask"))
    assert "not-causal" in theirs
    assert combined.endswith("[]")
    engine = Engine(demo, Tokenizer.from_pretrained(DEMO))
    prompt = "Here is a list of fruits that you can buy at the market in summer, and their colours:"
    asked = {"max_new_tokens": 6, "sampling": Sampling(), "stop_token_ids": ()}
    ids = [engine.tokenizer.encode(prompt)]
    ours = engine.generate(ids, mask=masks.sliding_window(4) | masks.sink(1), **asked)
    assert ours[0].tokens == generated
    assert engine.generate(ids, **asked)[0].tokens != generated  # the mask matters


@pytest.mark.exhaustive
@torch.no_grad()
def test_heads_that_look_at_what_came_next_before_are_found(demo_reference, capsys):
    length = 12
    best = load_example("attention_maps").main("One two three. One two", length=length, best=2)
    half = torch.randint(1000, 20000, (length,), generator=torch.Generator().manual_seed(0))
    weights = demo_reference(half.repeat(2)[None], output_attentions=True).attentions
    for share, layer, head in best:
        expected = weights[layer][0, head, length:-1, 1:length].diagonal().mean().item()
        assert share == pytest.approx(expected, abs=1e-4)
    most = max(
        row[head, length:-1, 1:length].diagonal().mean().item() for (row,) in weights for head in range(row.shape[0])
    )
    assert best[0][0] == pytest.approx(most, abs=1e-4)
    assert most > 0.5
    assert "█" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_steering_turns_a_text_towards_the_sea():
    texts = load_example("steering").main(new_tokens=9, strengths=(0.0, 1.0))
    assert "ocean" in texts[1.0]
    assert "ocean" not in texts[0.0]


@pytest.mark.exhaustive
def test_questions_are_answered_and_a_text_scored(capsys):
    right, perplexity = load_example("scoring").main("Once upon a time there was a little girl. " * 20, window=64)
    assert right == 4
    assert 1 < perplexity < 3
    assert "-inf" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_model_learns_a_text_by_heart_and_transformers_loads_it(demo_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("The moon forgot her silver shoe.")
    (tmp_path / "b.txt").write_text("Nine herons count the coins.")
    texts = [word for name in ("a.txt", "b.txt") for word in ("--text", str(tmp_path / name))]
    output = tmp_path / "out"
    arguments = ["--model", str(demo_folder), *texts, "--steps", "8", "--lr", "3e-4", "--output", str(output)]
    load_example("finetune").main(arguments)
    out = capsys.readouterr().out
    assert "' silver shoe.'" in out
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.3 * losses[0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    ids = tokenizer("The moon forgot her silver shoe.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = Llama.from_pretrained(output)(ids)
        torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-3)
    assert logits[0, 3:-1].argmax(-1).tolist() == ids[0, 4:].tolist()
    with pytest.raises(FileExistsError):
        load_example("finetune").main(arguments)


@pytest.mark.exhaustive
def test_an_adapter_learns_a_text_by_heart_and_peft_loads_it(demo_folder, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    (tmp_path / "a.txt").write_text("The moon forgot her silver shoe.")
    output = tmp_path / "out"
    arguments = ["--model", str(demo_folder), "--text", str(tmp_path / "a.txt"), "--steps", "12", "--lora", "8"]
    load_example("finetune").main([*arguments, "--output", str(output)])
    out = capsys.readouterr().out
    assert "' silver shoe.'" in out
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.3 * losses[0]
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    reference = transformers.AutoModelForCausalLM.from_pretrained(demo_folder, **options)
    reference = peft.PeftModel.from_pretrained(reference, output).eval()
    model, tokenizer = Llama.from_pretrained(demo_folder, dtype=torch.float32), Tokenizer.from_pretrained(demo_folder)
    model.adapters.activate(model.adapters.load(output))
    ids = torch.tensor([tokenizer.encode("The moon forgot her silver shoe.")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=0, atol=1e-3)
        model.adapters.activate(None)
        assert (model(ids) - reference(ids).logits).abs().max() > 0.1
