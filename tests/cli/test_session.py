"""Loading a model and completing prompts with it: texts, JSON rows, sampling, and models that cannot be used."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import assert_one_error, copy_with_bos, expected_text, parse_rows, prompt_arguments, write_jsonl

from llama_flex import Engine, Llama, Sampling

# ---- texts and rows


def test_one_prompt_prints_its_text_and_a_newline(cli, engine):
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 6)
    assert (code, out) == (0, expected_text(engine, "The quick", 6) + "\n")
    assert re.fullmatch(
        r"load [\d.]+ s; first token [\d.]+ s; prefill \d+ tokens, [\d.]+ tok/s; "
        r"decode 5 tokens, [\d.]+ tok/s, [\d.]+ GB/s\n",
        err,
    )


def test_keys_and_values_in_8_bits(cli, engine):
    """Of one prompt, of several, and in a conversation."""
    rounded = Engine(engine.model, engine.tokenizer, kv_dtype="fp8")
    options = "--max-new-tokens", 6, "--kv-dtype", "fp8", "--explain"
    code, out, err = cli("--prompt", "The quick", *options)
    assert (code, out) == (0, expected_text(rounded, "The quick", 6) + "\n")
    assert "keys and values in fp8" in err
    code, out, err = cli("--prompt", "The quick", "--prompt", "señor", "--json", *options)
    assert [row["text"] for row in parse_rows(out)] == [expected_text(rounded, x, 6) for x in ("The quick", "señor")]
    assert "keys and values in fp8" in err
    code, _, err = cli("--chat", *options, stdin="The quick\n")
    assert code == 0
    assert "keys and values in fp8" in err


def test_an_adapter_of_one_prompt_and_of_several(cli, engine, tmp_path):
    adapted = Engine(copy.deepcopy(engine.model), engine.tokenizer, backend="dense")
    adapted.model.adapters.add("mine", rank=2)
    for name, parameter in adapted.model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.model.adapters.save("mine", tmp_path / "mine")
    adapted.model.adapters.activate("mine")
    options = "--max-new-tokens", 6, "--adapter", tmp_path / "mine"
    expected = [expected_text(adapted, prompt, 6) for prompt in ("The quick", "señor")]
    assert expected[0] != expected_text(engine, "The quick", 6)
    code, out, _ = cli("--prompt", "The quick", *options)
    assert (code, out) == (0, expected[0] + "\n")
    code, out, _ = cli("--prompt", "The quick", "--prompt", "señor", "--json", *options)
    assert [row["text"] for row in parse_rows(out)] == expected
    assert_one_error(cli("--prompt", "x", "--adapter", tmp_path), "adapter_config.json: no such file")


def test_json_rows_hold_what_was_generated(cli, engine):
    code, out, _ = cli("--prompt", "The quick", "--prompt", "señor", "--max-new-tokens", 5, "--json")
    rows = parse_rows(out)
    assert code == 0
    assert [row["prompt"] for row in rows] == ["The quick", "señor"]
    for number, row in enumerate(rows):
        assert list(row) == ["id", "prompt", "text", "tokens", "logprobs", "finish_reason"]
        (done,) = engine.generate([engine.tokenizer.encode(row["prompt"])], max_new_tokens=5)
        assert (row["id"], row["text"], row["tokens"]) == (number, done.text, done.tokens)
        assert row["logprobs"] == pytest.approx(done.logprobs, abs=2e-5)
        assert row["finish_reason"] == "length"


def test_streamed_text_is_the_text_of_the_json_row(cli):
    sampled = ("--prompt", "naïve", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 3)
    _, streamed, _ = cli(*sampled)
    _, row, _ = cli(*sampled, "--json")
    assert streamed == json.loads(row)["text"] + "\n"


def test_several_prompts_are_titled(cli, engine):
    _, out, _ = cli("--prompt", "The quick", "--prompt", "two\nlines", "--max-new-tokens", 3)
    first, second = (expected_text(engine, prompt, 3) for prompt in ("The quick", "two\nlines"))
    assert out == f"### 0: The quick\n{first}\n\n### 1: two lines\n{second}\n\n"


def test_a_small_batch_size_changes_nothing(cli):
    prompts = prompt_arguments(["one", "a longer prompt", "3", "four", "five 5"])
    sampled = ("--max-new-tokens", 4, "--temperature", 1.0, "--seed", 1)
    outputs = [cli(*prompts, *sampled, "--batch-size", size)[1] for size in (1, 2, 5, 8)]
    assert outputs == [outputs[0]] * 4
    assert outputs[0].count("### ") == 5


def test_instruct_and_system_use_the_chat_template(cli, engine):
    user = {"role": "user", "content": "hello"}
    system = {"role": "system", "content": "fine"}
    for arguments, messages in ((["--instruct"], [user]), (["--system", "fine"], [system, user])):
        _, out, _ = cli("--prompt", "hello", "--max-new-tokens", 4, *arguments)
        rendered = engine.tokenizer.apply_chat_template(messages)
        assert out == expected_text(engine, rendered, 4, special=False) + "\n"


def test_a_chat_template_writes_bos_itself(cli, folder, tmp_path):
    copy_with_bos(folder, copy := tmp_path / "model")
    for arguments, stdin, same in (
        (["--prompt", "how are you?"], "", False),
        (["--prompt", "how are you?", "--instruct"], "", True),
        (["--chat"], "how are you?\nand now?\n", True),
    ):
        texts = [cli(*arguments, "--max-new-tokens", 12, stdin=stdin, model=m)[1] for m in (folder, copy)]
        assert (texts[0] == texts[1]) == same


def test_stop_strings_end_the_text(cli, engine):
    whole = expected_text(engine, "The quick", 8)
    stop = whole[2:5]
    _, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 8, "--stop", "never there", "--stop", stop, "--json")
    row = json.loads(out)
    assert row["text"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"


def test_a_stop_string_may_be_a_special_token(cli, folder, tmp_path):
    """The model generates the end of turn of its own template, which is not a stop token here."""
    copy = shutil.copytree(folder, tmp_path / "model")
    model = Llama.from_pretrained(folder, device="cpu")
    model.lm_head.weight[:] = 0
    model.lm_head.weight[2] = 1.0
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    model.norm.weight.fill_(1.0)
    model.save_pretrained(copy)
    for text in ("<|im_end|>", "<|im_end|><|im_end|>"):
        code, out, _ = cli("--prompt", "a", "--max-new-tokens", 9, "--stop", text, "--json", model=copy)
        row = json.loads(out)
        said = row["tokens"].count(2)
        assert (code, row["text"]) == (0, "")
        assert said == len(row["tokens"]) or row["finish_reason"] == "length"


def test_a_seed_repeats_and_gives_each_prompt_its_own(cli, engine):
    sampled = ("--max-new-tokens", 6, "--temperature", 1.0, "--json")
    runs = [cli("--prompt", "same", "--prompt", "same", *sampled, "--seed", 7)[1] for _ in "ab"]
    assert runs[0] == runs[1]
    texts = [row["text"] for row in parse_rows(runs[0])]
    assert texts[0] != texts[1]
    for number, text in enumerate(texts):
        assert text == expected_text(engine, "same", 6, sampling=Sampling(temperature=1.0, seed=7 + number))
    unseeded = {cli("--prompt", "same", *sampled)[1] for _ in "abc"}
    assert len(unseeded) == 3


def test_the_largest_seed_is_for_more_than_one_prompt(cli):
    arguments = "--prompt", "a", "--prompt", "a", "--json", "--quiet", "--max-new-tokens", 5, "--temperature", 1
    code, out, _ = cli(*arguments, "--seed", 2**63 - 1)
    assert code == 0
    assert len({tuple(row["tokens"]) for row in parse_rows(out)}) == 2


def test_sampling_arguments_reach_the_sampler(cli, engine):
    given = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    _, out, _ = cli("--prompt", "The sea", "--max-new-tokens", 6, *arguments)
    assert out == expected_text(engine, "The sea", 6, sampling=Sampling(**given)) + "\n"


def test_generation_config_gives_the_defaults(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 3, "repetition_penalty": 1.5}')
    _, out, _ = cli("--prompt", "The sea", "--json", model=copy)
    assert len(json.loads(out)["tokens"]) == 3
    _, asked, _ = cli("--prompt", "The sea", "--json", "--max-new-tokens", 3, "--repetition-penalty", 1.5)
    assert json.loads(out)["tokens"] == json.loads(asked)["tokens"]


def test_the_command_line_takes_a_saved_folder(cli, engine, tmp_path):
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    code, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 6, "--instruct", model=tmp_path)
    messages = [{"role": "user", "content": "The quick"}]
    prompt = engine.tokenizer.apply_chat_template(messages)
    assert (code, out) == (0, expected_text(engine, prompt, 6, special=False) + "\n")


# ---- models that cannot be used


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(cli):
    assert_one_error(cli("--prompt", "x", "--device", "cuda"), "cuda", "0 CUDA devices")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "nobody/nothing"])
def test_a_model_that_is_not_there_is_named(cli, name):
    assert_one_error(cli("--prompt", "x", model=name), name, "no such ", "folder")


def copy_changed(folder: Path, copy: Path, change: str) -> None:
    """Copy a model's folder and spoil the copy."""
    shutil.copytree(folder, copy)
    if change == "empty":
        shutil.rmtree(copy)
        copy.mkdir()
    elif change == "no weights":
        (copy / "model.safetensors").unlink()
    elif change == "damaged weights":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    elif change == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    elif change == "no config":
        (copy / "config.json").unlink()
    elif change == "damaged config":
        (copy / "config.json").write_text('{"vocab_size": ')
    elif change == "another architecture":
        config = json.loads((copy / "config.json").read_text())
        config |= {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
        (copy / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ("empty", []),
        ("no weights", ["model.safetensors"]),
        ("damaged weights", ["model.safetensors", "damaged"]),
        ("no tokenizer", ["tokenizer.json"]),
        ("no config", ["config.json"]),
        ("damaged config", ["config.json", "JSON"]),
        ("another architecture", ["GemmaForCausalLM", "not supported"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(cli, folder, tmp_path, change, fragments):
    copy_changed(folder, tmp_path / "model", change)
    assert_one_error(cli("--prompt", "x", model=tmp_path / "model"), str(tmp_path / "model"), *fragments)


def test_a_file_in_place_of_a_folder_is_named(cli, folder):
    assert_one_error(cli("--prompt", "x", model=folder / "model.safetensors"), "is a file", "folder")


def test_instruct_without_a_chat_template_says_so(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "tokenizer_config.json").write_text("{}")
    assert_one_error(cli("--prompt", "x", "--instruct", model=copy), "chat template")


# ---- prompts that cannot be completed


def test_memory_for_no_token_is_the_fault_of_no_row(cli, tmp_path):
    prompts = write_jsonl(tmp_path / "p.jsonl", ["a", "b"])
    result = cli("--prompts-file", prompts, "--json", "--memory-fraction", "1e-12")
    assert_one_error(result, "1e-12", "is less than a page")


def test_a_file_of_prompts_for_a_model_that_attends_both_ways_is_refused_and_no_success(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((copy / "config.json").read_text()) | {"is_causal": False}
    (copy / "config.json").write_text(json.dumps(settings))
    (tmp_path / "p.txt").write_text("hello\nthe dog\n")
    code, out, err = cli("--prompts-file", tmp_path / "p.txt", "--max-new-tokens", 4, model=copy)
    assert (code, out) == (2, "")
    assert err.count("--prompt without --json") == 2
    assert "error: no prompt is left to complete" in err
    assert cli("--prompt", "hello", "--max-new-tokens", 4, model=copy)[0] == 0


def test_a_prompt_whose_logits_are_nan_is_named_and_not_a_success(cli, damaged):
    code, out, err = cli("--prompt", "the lazy dog", "--max-new-tokens", 4, "--quiet", model=damaged)
    assert (code, out) == (2, "")
    assert "error: prompt 0 at new token 1: the model's logits are NaN or infinite" in err


def test_prompts_whose_logits_are_nan_end_alone(cli, damaged, engine, tmp_path):
    rows = [{"id": name, "prompt": text} for name, text in (("a", "hello"), ("b", "the lazy dog"), ("c", "the sea"))]
    prompts = write_jsonl(tmp_path / "in.jsonl", rows)
    arguments = ["--prompts-file", prompts, "--output", tmp_path / "out.jsonl", "--json"]
    code, _, err = cli(*arguments, "--max-new-tokens", 4, model=damaged)
    assert code == 2
    assert re.search(r"error: 1 of 3 prompts ended in an error; the first: .*line 2 at new token 1: the model's", err)
    written = {row["id"]: row for row in parse_rows((tmp_path / "out.jsonl").read_text())}
    assert {name: row["finish_reason"] for name, row in written.items()} == {"a": "length", "b": "error", "c": "length"}
    assert written["a"]["text"] == expected_text(engine, "hello", 4)
    code, _, _ = cli(*arguments, "--max-new-tokens", 4, "--resume")  # with the undamaged model
    assert code == 0
    written = {row["id"]: row for row in parse_rows((tmp_path / "out.jsonl").read_text())}
    assert written["b"]["text"] == expected_text(engine, "the lazy dog", 4)
