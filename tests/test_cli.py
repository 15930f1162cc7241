"""The command line: what it writes where, its exit codes, and one line for everything the user can put right."""

import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from torch._inductor.exc import InductorError
from torch.torch_version import TorchVersion

import llama_flex
from llama_flex import Engine, Ensemble, Llama, LlamaConfig, Sampling, Tokenizer, fuse, generate
from llama_flex.engine.fusion import AnyPrompt
from llama_flex.engine.graphs import Graphs

ROOT = Path(__file__).parent.parent
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog. A stitch in time saves nine, and the early bird catches the worm.\n"
    "user system assistant hello how are you today? I am fine, thank you; the weather is nice and the sea is blue.\n"
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000. Größe, café, naïve, señor, 日本語. def f(x): return x + 1\n"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny LLaMA with a byte-level tokenizer and a ChatML template, that never ends a text by itself."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Llama(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(folder) -> Engine:
    return Engine(Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder))


@pytest.fixture
def cli(folder, capsys, monkeypatch):
    """Run the command line in this process: (exit code, stdout, stderr). A model of None leaves the argument out."""

    def run(*arguments, model: str | Path | None = folder, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        given = [] if model is None else ["--model", str(model)]
        defaults = [] if "--compile" in arguments else ["--compile", "off"]
        defaults += [] if "--device" in arguments else ["--device", "cpu"]
        code = generate.main([*given, *defaults, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def start(*arguments, **options) -> subprocess.Popen:
    """The command line as a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "llama_flex.generate", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def expected_text(engine: Engine, prompt: str, new: int, *, special: bool = True, **options) -> str:
    ids = engine.tokenizer.encode(prompt, add_special_tokens=special)
    return engine.generate([ids], max_new_tokens=new, **options)[0].text


def assert_one_error(result: tuple[int, str, str], *fragments: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    for fragment in fragments:
        assert fragment in err


# --- Text, files, rows ---


def test_one_prompt_prints_its_text_and_a_newline(cli, engine):
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 6)
    assert (code, out) == (0, expected_text(engine, "The quick", 6) + "\n")
    assert re.fullmatch(
        r"load [\d.]+ s; first token [\d.]+ s; prefill \d+ tokens, [\d.]+ tok/s; "
        r"decode 5 tokens, [\d.]+ tok/s, [\d.]+ GB/s\n",
        err,
    )


def test_statistics_of_many_prompts_count_all_tokens(cli, engine, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", prompts := ["The quick", "the sea is blue", "a"])
    code, _, err = cli("--prompts-file", path, "--json", "--max-new-tokens", 5)
    count = sum(len(engine.tokenizer.encode(prompt)) for prompt in prompts)
    assert code == 0
    assert f"; {count} tokens in, 15 out, " in err


def test_auto_does_not_compile_where_that_would_be_refused(cli, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    code, _, err = cli("--prompt", "The quick", "--compile", "auto", "--max-new-tokens", generate.COMPILE_FROM)
    assert (code, "compile" in err) == (0, False)
    assert_one_error(cli("--prompt", "The quick", "--compile", "on"), "torch 2.13", "--compile off")
    code, _, err = cli("--chat", "--compile", "auto", "--max-new-tokens", 3, stdin="hello\n")
    assert (code, "compile" in err) == (0, False)


def test_quiet_leaves_stderr_empty(cli):
    code, _, err = cli("--prompt", "The quick", "--max-new-tokens", 2, "--quiet")
    assert (code, err) == (0, "")


def test_explain_says_what_ran_even_if_quiet(cli):
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 3, "--quiet", "--explain")
    assert code == 0
    assert out
    assert re.match("float32 on cpu; .*\nnot compiled: .*\n", err)
    assert re.search(r"\n2 layers, mask causal\(\)\n  the last query visits 1 of \d+ blocks of 128 slots", err)
    assert re.search(r"GB/s reached of .* that memory gives to a reduction: \d+%\n$", err)


def test_a_process_of_its_own_prints_the_same_and_nothing_on_stderr_if_quiet(folder, engine):
    arguments = ("--model", folder, "--prompt", "The quick", "--max-new-tokens", 6, "--compile", "off", "--quiet")
    out, err = start(*arguments, "--device", "cpu").communicate(timeout=120)
    assert (out.decode(), err.decode()) == (expected_text(engine, "The quick", 6) + "\n", "")


def test_json_rows_hold_what_was_generated(cli, engine):
    code, out, _ = cli("--prompt", "The quick", "--prompt", "señor", "--max-new-tokens", 5, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
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
    texts = ("one", "a longer prompt", "3", "four", "five 5")
    prompts = [argument for text in texts for argument in ("--prompt", text)]
    sampled = ("--max-new-tokens", 4, "--temperature", 1.0, "--seed", 1)
    outputs = [cli(*prompts, *sampled, "--batch-size", size)[1] for size in (1, 2, 5, 8)]
    assert outputs == [outputs[0]] * 4
    assert outputs[0].count("### ") == 5


def test_a_text_file_has_a_prompt_a_line(cli, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The quick\n\n  \nsail the sea\u2028and back\r\nlast", encoding="utf-8")
    code, out, _ = cli("--prompts-file", path, "--max-new-tokens", 2, "--json")
    rows = [json.loads(line) for line in out.split("\n") if line]
    assert code == 0
    assert [row["prompt"] for row in rows] == ["The quick", "sail the sea\u2028and back", "last"]
    assert len({row["id"] for row in rows}) == 3


def test_a_jsonl_file_has_texts_or_messages_and_ids(cli, engine, tmp_path):
    messages = [{"role": "system", "content": "fine"}, {"role": "user", "content": "hello"}]
    given = [{"id": "a", "prompt": "The quick"}, {"id": 7, "messages": messages}, {"prompt": "no id"}, "bare"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, given)) + "\n\n")
    code, out, _ = cli("--prompt", "first", "--prompts-file", path, "--max-new-tokens", 3, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["id"] for row in rows[:3]] == [0, "a", 7]
    assert [row["prompt"] for row in rows] == ["first", "The quick", messages, "no id", "bare"]
    rendered = engine.tokenizer.apply_chat_template(messages)
    assert rows[2]["text"] == expected_text(engine, rendered, 3, special=False)


def test_json_rows_can_be_given_back_as_prompts(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    prompts = ["The quick", "a\u2028b\x85c\x0bd\x0ce\x1cf", "tab\tand\nnewline"]
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    cli(*arguments, "--max-new-tokens", 2, "--json", "--output", path)
    code, out, err = cli("--prompts-file", path, "--max-new-tokens", 2, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert out == path.read_text(encoding="utf-8")


def test_instruct_and_system_use_the_chat_template(cli, engine):
    user = {"role": "user", "content": "hello"}
    system = {"role": "system", "content": "fine"}
    for arguments, messages in ((["--instruct"], [user]), (["--system", "fine"], [system, user])):
        _, out, _ = cli("--prompt", "hello", "--max-new-tokens", 4, *arguments)
        rendered = engine.tokenizer.apply_chat_template(messages)
        assert out == expected_text(engine, rendered, 4, special=False) + "\n"


def test_stop_strings_end_the_text(cli, engine):
    whole = expected_text(engine, "The quick", 8)
    stop = whole[2:5]
    _, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 8, "--stop", "never there", "--stop", stop, "--json")
    row = json.loads(out)
    assert row["text"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"


def test_a_seed_repeats_and_gives_each_prompt_its_own(cli, engine):
    sampled = ("--max-new-tokens", 6, "--temperature", 1.0, "--json")
    runs = [cli("--prompt", "same", "--prompt", "same", *sampled, "--seed", 7)[1] for _ in "ab"]
    assert runs[0] == runs[1]
    texts = [json.loads(line)["text"] for line in runs[0].splitlines()]
    assert texts[0] != texts[1]
    for number, text in enumerate(texts):
        assert text == expected_text(engine, "same", 6, sampling=Sampling(temperature=1.0, seed=7 + number))
    unseeded = {cli("--prompt", "same", *sampled)[1] for _ in "abc"}
    assert len(unseeded) == 3


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


def test_compiled_gives_the_same_text(cli):
    arguments = ("--prompt", "The quick brown", "--max-new-tokens", 8)
    _, eager, _ = cli(*arguments)
    code, compiled, err = cli(*arguments, "--compile", "on")
    assert (code, compiled) == (0, eager)
    assert re.search(r"load [\d.]+ s; first token [\d.]+ s, [\d.]+ s of it compiling; compiling [\d.]+ s in all; ", err)


# --- --output ---


def test_output_goes_to_a_file_in_place_of_what_it_held(cli, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old " * 1000)
    code, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 4, "--output", path)
    assert (code, out) == (0, "")
    assert path.read_text(encoding="utf-8") == cli("--prompt", "The quick", "--max-new-tokens", 4)[1]


@pytest.mark.parametrize("failure", ["no model", "no tokenizer", "bad sampling", "too long", "too many"])
def test_an_output_file_keeps_what_it_held_if_nothing_can_be_generated(cli, folder, tmp_path, failure):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    arguments, model = ["--prompt", "The quick", "--output", path, "--json"], folder
    if failure == "no model":
        model = tmp_path / "nowhere"
    elif failure == "no tokenizer":
        model = shutil.copytree(folder, tmp_path / "model")
        (model / "tokenizer.json").unlink()
    elif failure == "bad sampling":
        arguments += ["--top-p", "2"]
    elif failure == "too long":
        arguments += ["--prompt", "1 " * 600]
    else:
        arguments += ["--max-new-tokens", "600"]
    assert_one_error(cli(*arguments, model=model))
    assert path.read_text() == "old\n"


def unwritable(tmp_path: Path, kind: str) -> Path:
    if kind == "missing folder":
        return tmp_path / "missing" / "out.txt"
    if kind == "folder":
        return tmp_path
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    return tmp_path / "locked" / "out.txt"


@pytest.mark.parametrize("kind", ["missing folder", "folder", "no permission"])
def test_an_unwritable_output_is_refused_within_a_second(folder, tmp_path, kind):
    path = unwritable(tmp_path, kind)
    seconds = []
    for _ in range(3):  # the fastest of three: other processes may hold the machine up
        began = time.perf_counter()
        process = start("--model", folder, "--prompt", "x", "--output", path)
        out, err = process.communicate(timeout=60)
        seconds.append(time.perf_counter() - began)
        assert_one_error((process.returncode, out.decode(), err.decode()), "--output", str(path))
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


# --- What the user can put right ---


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--frobnicate"], ["--frobnicate"]),
        ([], ["nothing to complete", "--prompt"]),
        (["--prompt", ""], ["prompt 0 is empty"]),
        (["--prompt", "x", "--prompt", ""], ["prompt 1 is empty"]),
        (["--prompt", "x", "--temperature", "nan"], ["temperature"]),
        (["--prompt", "x", "--temperature", "inf"], ["temperature"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["--prompt", "x", "--temperature", "warm"], ["--temperature", "warm"]),
        (["--prompt", "x", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["--prompt", "x", "--top-p", "nan"], ["top_p"]),
        (["--prompt", "x", "--top-k", "-1"], ["top_k", "-1"]),
        (["--prompt", "x", "--top-k", "2.5"], ["--top-k", "2.5"]),
        (["--prompt", "x", "--min-p", "2"], ["min_p", "2"]),
        (["--prompt", "x", "--repetition-penalty", "0"], ["repetition_penalty", "0"]),
        (["--prompt", "x", "--seed", str(2**64)], ["seed"]),
        (["--prompt", "x", "--seed", "1.5"], ["--seed", "1.5"]),
        (["--prompt", "x", "--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (["--prompt", "x", "--max-new-tokens", "2.5"], ["--max-new-tokens", "2.5"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["new", "must be at least 1, not 0"]),
        (["--prompt", "x", "--max-new-tokens", "-1"], ["new", "must be at least 1, not -1"]),
        (["--prompt", "x", "--max-new-tokens", "512"], ["512", "context"]),
        (["--prompt", "1 " * 600], ["context of 512"]),
        (["--prompt", "x", "--batch-size", "0"], ["--batch-size", "0"]),
        (["--prompt", "x", "--memory-fraction", "0"], ["--memory-fraction", "0"]),
        (["--prompt", "x", "--memory-fraction", "1.5"], ["--memory-fraction", "1.5"]),
        (["--prompt", "x", "--memory-fraction", "nan"], ["--memory-fraction", "nan"]),
        (["--prompt", "x", "--dtype", "int8"], ["--dtype", "int8"]),
        (["--prompt", "x", "--compile", "maybe"], ["--compile", "maybe"]),
        (["--prompt", "x", "--stop", ""], ["stop string"]),
        (["--prompt", "x", "--device", "toaster"], ["device", "toaster"]),
        (["--prompt", "x", "--device", "cuda:99"], ["cuda:99"]),
        (["--prompt", "x", "--device", "meta"], ["meta"]),
        (["--prompt", "x", "--device", "xpu"], ["xpu"]),
        (["--chat", "--prompt", "x"], ["--chat", "--prompt"]),
        (["--chat", "--json"], ["--chat", "--json"]),
        (["--prompt", "bad \ud800 surrogate"], ["surrogate"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_argument_is_one_line_on_stderr_and_exit_code_2(cli, arguments, fragments):
    assert_one_error(cli(*arguments), *fragments)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--temp", "--temperature"),
        ("--temp=0.8", "--temperature"),
        ("--max-tokens", "--max-new-tokens"),
        ("--top_p=0.5", "--top-p"),
        ("--promt", "--prompt"),
    ],
)
def test_an_argument_that_is_nearly_one_is_no_argument_but_says_what_is_meant(cli, argument, meant):
    assert_one_error(cli("--prompt", "a", argument, "1"), "unrecognized arguments", f"did you mean {meant}?")


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as done:
        generate.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"llama_flex {llama_flex.__version__}\n"
    assert importlib.metadata.version("llama_flex") == llama_flex.__version__


def test_what_is_saved_is_a_folder_that_the_command_line_takes(cli, engine, tmp_path):
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    code, out, _ = cli("--prompt", "The quick", "--max-new-tokens", 6, "--instruct", model=tmp_path)
    messages = [{"role": "user", "content": "The quick"}]
    prompt = engine.tokenizer.apply_chat_template(messages)
    assert (code, out) == (0, expected_text(engine, prompt, 6, special=False) + "\n")


def test_a_stop_string_may_be_a_special_token(cli, folder, tmp_path):
    """The template's own end, which the model says, and which is no stop token here."""
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


def test_without_a_model_the_argument_is_named(cli):
    assert_one_error(cli("--prompt", "x", model=None), "--model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(cli):
    assert_one_error(cli("--prompt", "x", "--device", "cuda"), "cuda", "0 CUDA devices")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "nobody/nothing"])
def test_a_model_that_is_not_there_is_named(cli, name):
    assert_one_error(cli("--prompt", "x", model=name), name, "no such folder")


def changed(folder: Path, copy: Path, change: str) -> None:
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
    changed(folder, tmp_path / "model", change)
    assert_one_error(cli("--prompt", "x", model=tmp_path / "model"), str(tmp_path / "model"), *fragments)


def test_a_file_in_place_of_a_folder_is_named(cli, folder):
    assert_one_error(cli("--prompt", "x", model=folder / "model.safetensors"), "is a file", "folder")


def test_instruct_without_a_chat_template_says_so(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "tokenizer_config.json").write_text("{}")
    assert_one_error(cli("--prompt", "x", "--instruct", model=copy), "chat template")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ('{"prompt": "a", "id": NaN}', ["line 1", "not JSON", "float"]),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', ["line 3", "'prompt'"]),
        ('{"prompt": 5}', ["line 1", "'prompt'"]),
        ("[1, 2]", ["line 1"]),
        ('{"messages": ["hello"]}', ["line 1", "'messages'"]),
        ('{"messages": []}', ["empty"]),
        ('{"prompt": ""}', ["empty"]),
        ("[" * 100_000, ["line 1", "not JSON"]),
        ("", ["nothing to complete"]),
        (b'{"prompt": "\xff"}', ["utf-8"]),
    ],
    ids=[
        "cut off",
        "NaN",
        "no prompt",
        "number",
        "list",
        "messages of text",
        "no messages",
        "empty",
        "deep",
        "none",
        "bytes",
    ],
)
def test_a_malformed_jsonl_file_is_refused_with_its_line(cli, tmp_path, content, fragments):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_error(cli("--prompts-file", path, "--strict"), *fragments)


def test_a_malformed_row_is_said_and_skipped(cli, engine, tmp_path):
    path, text = tmp_path / "p.jsonl", "long " * 2000
    lines = ['{"prompt": "a"}', '{"prompt": ', json.dumps(text), '{"prompt": ""}', '{"id": "z", "prompt": "b"}']
    path.write_text("\n".join(lines))
    code, out, err = cli("--prompts-file", path, "--max-new-tokens", 2, "--json", "--quiet")
    assert code == 0
    rows = {row["id"]: row for row in parsed(out)}
    assert set(rows) == {0, "z"}
    for id, prompt in ((0, "a"), ("z", "b")):
        assert rows[id]["text"] == expected_text(engine, prompt, 2)
    said = err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["skipped"] * 3
    for line, (number, what) in zip(said, ((2, "not JSON"), (4, "empty"), (3, "tokens")), strict=True):
        assert f"{path}, line {number}: " in line
        assert what in line
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 2")
    path.write_text("\n".join(lines[2:3]))
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 1", "tokens")
    code, out, err = cli("--prompts-file", path)
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == ["error: no prompt is left to complete"]


def test_messages_without_content_are_refused(cli, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user"}]}\n')
    code, _, err = cli("--prompts-file", path, "--max-new-tokens", 1, "--quiet")
    assert code == 0 or (code == 2 and re.fullmatch(r"error: .+\n", err))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_prompts_file_that_cannot_be_read_is_named(cli, tmp_path, name):
    assert_one_error(cli("--prompts-file", tmp_path / name), "--prompts-file", str(tmp_path))


def test_a_traceback_never_shows_in_a_process_of_its_own():
    process = start("--prompt", "x", "--model", "/no/such/folder")
    out, err = process.communicate(timeout=120)
    assert_one_error((process.returncode, out.decode(), err.decode()), "/no/such/folder")


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main(["--help"])
    assert exit.value.code == 0
    assert "--prompts-file" in capsys.readouterr().out


# --- Interrupted ---


def test_an_interrupt_ends_the_line_with_exit_code_130_and_no_traceback(folder):
    arguments = ("--model", folder, "--device", "cpu", "--compile", "off", "--prompt", "The quick")
    with start(*arguments, "--max-new-tokens", 480) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert len(out) < 2000
    assert b"Traceback" not in err
    assert b"error" not in err


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_loses_nothing_of_what_was_generated(cli, engine, monkeypatch, as_json):
    step, calls = Llama.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Llama, "step", interrupted)
    code, out, err = cli("--prompt", "The sea", "--max-new-tokens", 9, *(["--json"] if as_json else []))
    monkeypatch.setattr(Llama, "step", step)
    assert code == 130
    assert "error" not in err
    ids = engine.tokenizer.encode("The sea")
    steps = list(engine.stream([ids], max_new_tokens=9))[:3]
    text = "".join(s.text for s in steps)
    if as_json:
        row = json.loads(out)
        assert (row["text"], row["tokens"], row["finish_reason"]) == (text, [s.token for s in steps], None)
    else:
        assert out == text + "\n"


@pytest.mark.parametrize("extra", [[], ["--prompt", "and more", "--json", "--batch-size", "1"]])
def test_a_reader_that_leaves_early_causes_no_traceback(folder, extra):
    arguments = ("--model", folder, "--device", "cpu", "--compile", "off", "--prompt", "The quick", *extra)
    with start(*arguments, "--max-new-tokens", 60) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"rror" not in err


# --- --chat ---


def conversation(engine: Engine, messages: list[str], new: int, system: str | None = None) -> list[str]:
    """The replies, each generated afresh from the whole conversation so far."""
    history = [] if system is None else [{"role": "system", "content": system}]
    replies = []
    for message in messages:
        history.append({"role": "user", "content": message})
        replies.append(expected_text(engine, engine.tokenizer.apply_chat_template(history), new, special=False))
        history.append({"role": "assistant", "content": replies[-1]})
    return replies


@pytest.mark.parametrize("system", [None, "the weather is nice"])
def test_chat_keeps_the_history_and_answers_as_a_fresh_conversation_would(cli, engine, system):
    messages = ["hello", "how are you today?", "and the dog?"]
    arguments = ["--chat", "--max-new-tokens", 6, *([] if system is None else ["--system", system])]
    code, out, err = cli(*arguments, stdin="\n".join(messages) + "\n\n")
    replies = conversation(engine, messages, 6, system)
    assert code == 0
    assert out == "".join(reply + "\n" for reply in replies)
    assert replies[1] != conversation(engine, messages[1:2], 6, system)[0]  # the history matters
    # Of the later prompts only what is new was computed.
    computed = int(re.search(r"prefill (\d+) tokens", err)[1])
    alone = sum(
        len(engine.tokenizer.encode(f"<|im_start|>user\n{m}<|im_end|>\n<|im_start|>assistant\n")) for m in messages
    )
    assert computed < alone + 3 * 10 + 20


def test_chat_continues_beyond_the_first_cache(cli, engine):
    messages = ["hello", "the quick brown fox " * 12, "and the dog?", "1 2 3 " * 30]
    code, out, _ = cli("--chat", "--max-new-tokens", 5, stdin="\n".join(messages))
    assert code == 0
    assert out == "".join(reply + "\n" for reply in conversation(engine, [m.strip() for m in messages], 5))


def test_chat_without_a_limit_uses_the_room_that_the_context_leaves(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    code, out, err = cli("--chat", "--quiet", model=copy, stdin="hello\n")
    assert code == 0, err
    assert out.endswith("\n")
    assert len(out) > 1


def test_an_interrupt_in_chat_ends_the_reply_and_not_the_conversation(cli, engine, monkeypatch):
    step, calls = Llama.step, []

    def interrupted(self, *arguments):
        logits = step(self, *arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Llama, "step", interrupted)
    code, out, _ = cli("--chat", "--max-new-tokens", 5, stdin="hello\nhow are you?\n")
    monkeypatch.setattr(Llama, "step", step)
    assert code == 0
    first = [{"role": "user", "content": "hello"}]
    ids = engine.tokenizer.encode(engine.tokenizer.apply_chat_template(first), add_special_tokens=False)
    cut = "".join(s.text for s in list(engine.stream([ids], max_new_tokens=5))[:2])
    history = [*first, {"role": "assistant", "content": cut}, {"role": "user", "content": "how are you?"}]
    second = expected_text(engine, engine.tokenizer.apply_chat_template(history), 5, special=False)
    assert out == f"{cut}\n{second}\n"


def test_chat_penalises_what_was_said_in_earlier_turns(cli, folder, tmp_path):
    """As a fresh prompt of the whole conversation does."""
    penalised = Engine(Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder))
    messages = ["hello", "hello", "hello you"]
    options = {"sampling": Sampling(repetition_penalty=1.6)}
    history, replies = [], []
    for message in messages:
        history.append({"role": "user", "content": message})
        prompt = penalised.tokenizer.apply_chat_template(history)
        replies.append(expected_text(penalised, prompt, 12, special=False, **options))
        history.append({"role": "assistant", "content": replies[-1]})
    assert replies != conversation(penalised, messages, 12)
    code, out, _ = cli("--chat", "--max-new-tokens", 12, "--repetition-penalty", 1.6, stdin="\n".join(messages))
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies))


def test_each_turn_of_a_chat_has_a_seed_of_its_own(cli, engine):
    arguments = ["--chat", "--max-new-tokens", 8, "--temperature", 1.5, "--top-k", 0, "--seed", 5]
    _, out, _ = cli(*arguments, stdin="hello\nhow are you?\n")
    history, replies = [], []
    for turn, message in enumerate(["hello", "how are you?"]):
        history.append({"role": "user", "content": message})
        prompt = engine.tokenizer.apply_chat_template(history)
        sampling = Sampling(temperature=1.5, seed=5 + turn)
        replies.append(expected_text(engine, prompt, 8, special=False, sampling=sampling))
        history.append({"role": "assistant", "content": replies[-1]})
    assert out == "".join(reply + "\n" for reply in replies)
    assert cli(*arguments, stdin="hello\nhow are you?\n")[1] == out


STRICT = (
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ '' }}"
)


@pytest.mark.parametrize("how", ["interrupt", "end of text", "white space"])
def test_an_empty_reply_is_left_out_of_the_conversation(cli, engine, folder, tmp_path, monkeypatch, how):
    """Llama 2's and Mistral's templates refuse an empty turn, and two turns of the user in a row.

    They strip white space."""
    copy = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"chat_template": STRICT}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    step, calls = Llama.step, []

    def empty(self, *arguments):
        calls.append(1)
        output = step(self, *arguments)
        if len(calls) == 1 and how == "interrupt":
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(Llama, "step", empty)
    if how == "end of text":
        put, made = Steps.put, []

        def ended(self, token, logprob):
            made.append(1)
            return put(self, 2, logprob) if len(made) == 1 else put(self, token, logprob)

        monkeypatch.setattr(Steps, "put", ended)
    if how == "white space":
        put, made = Steps.put, []

        def blank(self, token, logprob):
            made.append(1)
            return put(self, token, logprob) if len(made) > 5 else dataclasses.replace(put(self, 5, logprob), text=" ")

        monkeypatch.setattr(Steps, "put", blank)
    code, out, err = cli("--chat", "--max-new-tokens", 5, model=copy, stdin="hello\nhow are you?\nand now?\n")
    monkeypatch.undo()
    assert code == 0
    assert "no reply: the message is left out of the conversation" in err
    assert "error" not in err
    nothing = " " * 5 if how == "white space" else ""
    assert out == "".join(f"{reply}\n" for reply in [nothing, *conversation(engine, ["how are you?", "and now?"], 5)])


def test_a_chat_at_the_end_of_the_context_forgets_its_oldest_messages(cli, engine):
    long = "the quick brown fox " * 20
    messages = [f"{n} {long}".strip() for n in range(8)]
    code, out, err = cli("--chat", "--system", "be brief", "--max-new-tokens", 5, stdin="\n".join(messages))
    replies = out.splitlines()
    assert code == 0
    assert len(replies) == len(messages)
    assert "error" not in err
    assert "a conversation has 512 tokens: 2 messages are forgotten" in err
    history = [{"role": "system", "content": "be brief"}]
    for message, reply in zip(messages[-3:-1], replies[-3:-1], strict=True):
        history += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
    history.append({"role": "user", "content": messages[-1]})
    encode, apply = engine.tokenizer.encode, engine.tokenizer.apply_chat_template
    while len(encode(apply(history), add_special_tokens=False)) + 5 > 512:
        del history[1:3]
    assert replies[-1] == expected_text(engine, apply(history), 5, special=False)


def test_a_chat_at_the_end_of_what_max_length_allows_forgets_its_oldest_messages(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text('{"max_length": 120}')
    code, out, err = cli("--chat", model=copy, stdin="hello\nhow are you?\nand now?\nwhat?\n" + "x y " * 60)
    assert code == 0
    assert "a conversation has 120 tokens: " in err
    assert "leave no room in the 120 that generation_config.json has as max_length; give max_new_tokens" in err
    assert out.count("\n") >= 4


def test_a_message_too_long_by_itself_leaves_the_conversation_as_it_is(cli, engine):
    messages = ["hello", "x y " * 600, "and you?"]
    _, out, err = cli("--chat", "--max-new-tokens", 4, stdin="\n".join(messages))
    assert re.search(r"error: \d+ tokens leave no room", err)
    assert "forgotten" not in err
    assert out == "".join(reply + "\n" for reply in conversation(engine, ["hello", "and you?"], 4))


def test_commands_of_a_chat_do_not_go_to_the_model(cli, engine):
    said = "hello\n/help\n  /clear \nhow are you today?\n/usr/bin is a folder\n/exit\nhello\n"
    code, out, err = cli("--chat", "--max-new-tokens", 4, stdin=said)
    replies = conversation(engine, ["hello"], 4) + conversation(
        engine, ["how are you today?", "/usr/bin is a folder"], 4
    )
    assert (code, out) == (0, "".join(reply + "\n" for reply in replies))
    assert "/clear forgets the conversation" in err


# --- Logits that are no numbers ---


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A model whose logits are NaN after the word " dog"."""
    copy = shutil.copytree(folder, tmp_path / "damaged")
    model, tokenizer = Llama.from_pretrained(folder, device="cpu"), Tokenizer.from_pretrained(folder)
    model.embed.weight[tokenizer.encode(" dog")[-1]] = torch.nan
    model.save_pretrained(copy)
    return copy


def test_a_prompt_whose_logits_are_nan_is_named_and_not_a_success(cli, damaged):
    code, out, err = cli("--prompt", "the lazy dog", "--max-new-tokens", 4, "--quiet", model=damaged)
    assert (code, out) == (2, "")
    assert "error: prompt 0 at new token 1: the model's logits are NaN or infinite" in err


def test_of_many_prompts_those_whose_logits_are_nan_end_alone(cli, damaged, engine, tmp_path):
    rows = [{"id": name, "prompt": text} for name, text in (("a", "hello"), ("b", "the lazy dog"), ("c", "the sea"))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--prompts-file", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--json"]
    code, _, err = cli(*arguments, "--max-new-tokens", 4, model=damaged)
    assert code == 2
    assert re.search(r"error: 1 of 3 prompts ended in an error; the first: .*line 2 at new token 1: the model's", err)
    written = {row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert {name: row["finish_reason"] for name, row in written.items()} == {"a": "length", "b": "error", "c": "length"}
    assert written["a"]["text"] == expected_text(engine, "hello", 4)
    code, _, _ = cli(*arguments, "--max-new-tokens", 4, "--resume")  # with a model that is whole
    assert code == 0
    written = {row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert written["b"]["text"] == expected_text(engine, "the lazy dog", 4)


def test_in_a_chat_the_turn_whose_logits_are_nan_ends(cli, damaged, engine):
    code, out, err = cli("--chat", "--max-new-tokens", 4, model=damaged, stdin="hello\nthe lazy dog\nand you?\n")
    assert code == 0
    assert "error: at new token 1: the model's logits are NaN or infinite" in err
    first, last = conversation(engine, ["hello", "and you?"], 4)
    assert out == f"{first}\n\n{last}\n"


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


# --- Where torch cannot compile ---

NAMELESS = """
import os, pwd

def none(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = none
for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ.pop(name, None)
import llama_flex
llama_flex.Engine
"""
DAMAGED = """
import logging
import llama_flex
llama_flex.Engine
for _ in range(2):
    try:
        1 / 0
    except ZeroDivisionError:
        log = logging.getLogger("torch._inductor.codecache")
        log.warning("fx graph cache unable to load compiled graph", exc_info=True)
"""


def python(code: str, **environment: str) -> str:
    """What Python code prints to stderr, warnings of llama_flex among it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stderr


def test_the_folder_of_compiled_code_may_be_unwritable_or_its_user_nameless(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "x")
    err = python("import llama_flex; llama_flex.Engine", TORCHINDUCTOR_CACHE_DIR=folder)
    assert f"{folder}, where torch keeps compiled code, cannot be written to (Not a directory); what is" in err
    assert python(NAMELESS) == ""


def test_damaged_files_of_compiled_code_are_one_line(tmp_path):
    err = python(DAMAGED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert err.endswith(f"] files in {tmp_path} are damaged: compiled anew\n")
    assert err.count("\n") == 1


FAKE = """#!/bin/sh
case "$*" in *--version*) echo "g++ (none) 12.2.0"; exit 0;; esac
echo "x.cpp:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nope"}, "there is no C++ compiler; install g++, or name one in CXX"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "this processor is none that it knows; if ATEN_CPU_CAPABILITY is set"),
        ({"CXX": "fake"}, "Python's headers are missing; install them (python3-dev)"),
    ],
    ids=["no compiler", "no instructions", "no headers"],
)
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 does not compile for a CPU")
def test_where_torch_cannot_compile_auto_goes_on_and_on_says_why(folder, engine, tmp_path, environment, reason):
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    if environment.get("CXX") == "fake":
        environment = {"CXX": str(tmp_path / "fake")}
    environment = os.environ | environment | {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "llama_flex.generate", "--model", str(folder), "--prompt", "The quick", "--quiet"]
    command += ["--device", "cpu", "--max-new-tokens", "40"]

    def run(compile: str) -> subprocess.CompletedProcess:
        given = [*command, "--compile", compile]
        return subprocess.run(
            given, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    done = run("auto")
    assert (done.returncode, done.stdout) == (0, expected_text(engine, "The quick", 40) + "\n")
    assert re.fullmatch(r"warning: goes on uncompiled, more slowly: torch cannot compile: .*\n", done.stderr)
    assert reason in done.stderr
    done = run("on")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: torch cannot compile: .*--compile off\n", done.stderr)
    assert reason in done.stderr


class NoCompiler(Exception):
    """What stands in for the compiler's error."""


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling fails, quickly; after so many parts, as by a damaged file."""

    def after(count: int = 0) -> None:
        compiled = Graphs._compiled

        def failing(self, function):
            if len(self.parts) >= count:

                def part(*_):
                    raise InductorError(NoCompiler("a file is damaged"), None)

                return part
            return compiled(self, function)

        monkeypatch.setattr(Graphs, "_compiled", failing)

    return after


@pytest.mark.parametrize("parts", [0, 3])
def test_a_compiler_that_fails_amid_a_text_changes_nothing_in_it(cli, engine, no_compiler, parts):
    no_compiler(parts)
    code, out, err = cli("--prompt", "The quick", "--max-new-tokens", 40, "--compile", "auto", "--quiet")
    assert (code, out) == (0, expected_text(engine, "The quick", 40) + "\n")
    assert err.count("\n") == 1
    assert "goes on uncompiled, more slowly: torch cannot compile: a file is damaged; a mask or score " in err


def test_what_is_drawn_at_random_is_drawn_once(cli, engine, no_compiler, monkeypatch):
    """A text that begins anew, uncompiled, goes on with what was given already."""
    seeds = itertools.count(1)
    monkeypatch.setattr("secrets.randbits", lambda _: next(seeds))
    no_compiler(3)
    drawn = ["--max-new-tokens", 40, "--temperature", 1, "--compile", "auto", "--quiet"]
    _, out, err = cli("--prompt", "The quick", *drawn)
    assert "goes on uncompiled" in err
    assert out == expected_text(engine, "The quick", 40, sampling=Sampling(temperature=1, seed=1)) + "\n"


def test_many_prompts_and_a_chat_go_on_uncompiled_too(cli, engine, no_compiler, tmp_path):
    no_compiler()
    (tmp_path / "p.txt").write_text("The quick\nhello\n")
    arguments = ["--prompts-file", tmp_path / "p.txt", "--json", "--max-new-tokens", 40]
    code, out, err = cli(*arguments, "--compile", "auto", "--quiet")
    assert code == 0
    assert err.count("goes on uncompiled") == 1
    texts = {row["prompt"]: row["text"] for row in map(json.loads, out.splitlines())}
    assert texts == {prompt: expected_text(engine, prompt, 40) for prompt in ("The quick", "hello")}
    code, out, err = cli("--chat", "--max-new-tokens", 5, "--compile", "auto", stdin="hello\nand you?\n")
    assert (code, out) == (0, "".join(reply + "\n" for reply in conversation(engine, ["hello", "and you?"], 5)))
    assert err.count("goes on uncompiled") == 1
    assert_one_error(
        cli("--prompt", "The quick", "--compile", "on", "--quiet"), "torch cannot compile", "--compile off"
    )


def test_a_folder_for_compiled_code_that_cannot_be_written_is_replaced(folder, tmp_path):
    """torch does not even start without one."""
    (tmp_path / "file").write_text("")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    command = [sys.executable, "-m", "llama_flex.generate", "--model", str(folder), "--prompt", "a", "--quiet"]
    command += ["--device", "cpu", "--compile", "off", "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert re.fullmatch(
        r"warning: .*/file/cache, where torch keeps compiled code, cannot be written to .*\n", done.stderr
    )


# --- What users do to files and streams ---


def test_the_prompts_file_is_not_written_over(cli, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n")
    assert_one_error(cli("--prompts-file", path, "--output", path), "is the prompts file")
    assert path.read_text() == "one\n"


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(cli, tmp_path):
    for name, line in (("p.txt", "One"), ("p.jsonl", '{"prompt": "One"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode())
        _, out, _ = cli("--prompts-file", tmp_path / name, "--max-new-tokens", 1, "--json")
        assert json.loads(out)["prompt"] == "One"


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "id": "\\ud800"}', '{"messages": [{"content": "a"}]}', "9" * 5000, '{"prompt": 5}']
)
def test_a_wrong_row_is_refused_with_its_line_number(cli, tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    assert_one_error(cli("--prompts-file", path, "--strict"), "line 2")


def test_a_message_that_does_not_fit_does_not_end_the_conversation(cli):
    code, out, err = cli("--chat", "--max-new-tokens", 3, stdin="hello\n" + "x y " * 600 + "\nhello again\n")
    assert code == 0
    assert out.count("\n") == 2
    assert "leave no room" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(cli):
    assert_one_error(
        cli("--prompt", "One", "--max-new-tokens", 2, "--output", "/dev/full"), "/dev/full", "No space left"
    )


def test_a_refused_run_leaves_no_empty_output(cli, tmp_path):
    assert_one_error(cli("--prompt", "One", "--output", tmp_path / "new.txt", model="nowhere"), "nowhere")
    assert not (tmp_path / "new.txt").exists()


def test_closed_streams_are_named(folder):
    for redirect, arguments in (("<&-", "--chat"), (">&-", "--prompt One")):
        command = f"{sys.executable} -m llama_flex.generate --model {folder} --compile off {arguments} {redirect}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert re.fullmatch("error: .*closed.*\n", done.stderr)


# --- --fuse ---

PROMPTS = ["The quick brown fox", "the weather is nice today", "señor, a stitch"]


def given(prompts: list[str]) -> list[str]:
    return [argument for prompt in prompts for argument in ("--prompt", prompt)]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parsed(out: str) -> list[dict]:
    return [json.loads(line) for line in out.split("\n") if line]


def fused_text(engine: Engine, request: AnyPrompt, new: int, **options) -> str:
    return engine.generate([request], max_new_tokens=new, **options)[0].text


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--fuse-prefix", "Numbers: ", "--fuse-suffix", "\nuser"], {"prefix": "Numbers: ", "suffix": "\nuser"}),
        (["--fuse-positions", "parallel", "--fuse-suffix", " is"], {"positions": "parallel", "suffix": " is"}),
        (["--fuse-weights", "3,0.5,1e-3"], {"weights": [3, 0.5, 1e-3]}),
    ],
    ids=["prompts alone", "prefix and suffix", "parallel", "weights"],
)
def test_fused_prompts_give_the_text_of_the_engine(cli, engine, arguments, options):
    pieces = {name: engine.tokenizer.encode(text) for name, text in options.items() if name in ("prefix", "suffix")}
    request = fuse([engine.tokenizer.encode(p) for p in PROMPTS], **options | pieces)
    code, out, err = cli(*given(PROMPTS), "--fuse", *arguments, "--max-new-tokens", 12)
    assert (code, out) == (0, fused_text(engine, request, 12) + "\n"), err
    assert f"prefill {len(request.ids)} tokens" in err
    assert out == cli(*given(PROMPTS), "--fuse", "attention", *arguments, "--max-new-tokens", 12)[1]
    plain = fuse([engine.tokenizer.encode(p) for p in PROMPTS])
    assert not arguments or out != fused_text(engine, plain, 12) + "\n"  # the arguments matter


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_fuse_mean_and_max_are_ensembles(cli, engine, combine):
    encode = engine.tokenizer.encode
    around = ("--fuse-prefix", "Numbers: ", "--fuse-suffix", " is")
    request = Ensemble([[*encode("Numbers: "), *encode(p), *encode(" is")] for p in PROMPTS], combine)
    sampled = ("--temperature", 1.0, "--seed", 11, "--max-new-tokens", 12)
    code, out, err = cli(*given(PROMPTS), "--fuse", combine, *around, *sampled)
    assert (code, out) == (0, fused_text(engine, request, 12, sampling=Sampling(temperature=1.0, seed=11)) + "\n")
    assert f"prefill {sum(len(p.ids) for p in request.prompts)} tokens" in err


@pytest.mark.parametrize("mode", ["attention", "mean", "max"])
def test_one_fused_prompt_is_the_prompt(cli, mode):
    for template in ([], ["--instruct"], ["--system", "fine"]):
        arguments = ("--prompt", "how are you today?", *template, "--max-new-tokens", 10, "--json")
        (plain,), (fused,) = (parsed(cli(*arguments, *extra)[1]) for extra in ([], ["--fuse", mode]))
        assert fused["tokens"] == plain["tokens"]
        assert fused["logprobs"] == pytest.approx(plain["logprobs"], abs=2e-5)
        assert (fused["prompts"], plain["prompt"]) == (["how are you today?"], "how are you today?")


@pytest.mark.parametrize("mode", ["attention", "mean"])
def test_the_chat_template_goes_around_all_fused_prompts(cli, engine, mode):
    prefix = "<|im_start|>system\nfine<|im_end|>\n<|im_start|>user\nNumbers: "
    suffix = " how<|im_end|>\n<|im_start|>assistant\n"
    prefix, suffix, *prompts = (
        engine.tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix, *PROMPTS)
    )
    request = fuse(prompts, prefix=prefix, suffix=suffix)
    if mode != "attention":
        request = Ensemble([[*prefix, *prompt, *suffix] for prompt in prompts], mode)
    around = ("--system", "fine", "--fuse-prefix", "Numbers: ", "--fuse-suffix", " how")
    _, out, _ = cli(*given(PROMPTS), "--fuse", mode, *around, "--max-new-tokens", 8)
    assert out == fused_text(engine, request, 8) + "\n"


def with_bos(folder: Path, copy: Path) -> tokenizers.Tokenizer:
    """Copy a model; the copy's tokenizer, which puts BOS before a text."""
    shutil.copytree(folder, copy)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    begins = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.post_processor = begins
    tokenizer.save(str(copy / "tokenizer.json"))
    return tokenizer


def test_a_chat_template_writes_bos_itself(cli, folder, tmp_path):
    with_bos(folder, copy := tmp_path / "model")
    for arguments, stdin, same in (
        (["--prompt", "how are you?"], "", False),
        (["--prompt", "how are you?", "--instruct"], "", True),
        (["--chat"], "how are you?\nand now?\n", True),
    ):
        texts = [cli(*arguments, "--max-new-tokens", 12, stdin=stdin, model=m)[1] for m in (folder, copy)]
        assert (texts[0] == texts[1]) == same


def test_special_tokens_of_the_tokenizer_begin_each_prompt_or_the_prefix(cli, folder, tmp_path):
    tokenizer = with_bos(folder, copy := tmp_path / "model")
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in ("Numbers: ", *PROMPTS)]
    for arguments, extra in (
        (["--fuse", "--fuse-prefix", "Numbers: "], 1 + lengths[0]),
        (["--fuse"], 3),
        (["--fuse", "mean", "--fuse-prefix", "Numbers: "], 3 * (1 + lengths[0])),
        (["--fuse", "max"], 3),
        (["--fuse", "--instruct"], len(tokenizer.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")) - 1),
    ):
        _, _, err = cli(*given(PROMPTS), *arguments, "--max-new-tokens", 1, model=copy)
        assert f"prefill {sum(lengths[1:]) + extra} tokens" in err


def test_a_template_that_does_not_hold_a_message_once_is_refused(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    for template in (TEMPLATE + "{{ messages[0].content }}", "{{ messages[0].role }}"):
        (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert_one_error(cli(*given(PROMPTS), "--fuse", "--instruct", model=copy), "template", "once")
    (copy / "tokenizer_config.json").write_text("{}")
    assert_one_error(cli(*given(PROMPTS), "--fuse", "--instruct", model=copy), "chat template")


def test_fused_rows_of_a_file_are_each_what_they_are_alone(cli, engine, tmp_path):
    rows = [
        {"id": "three", "prompts": PROMPTS},
        {"id": 7, "prompts": PROMPTS[:2], "suffix": " is", "weights": [0.1, 10]},
        {"id": None, "prompt": PROMPTS[1]},
        PROMPTS[::-1],
        {"id": ["x", 1], "prompts": PROMPTS * 6, "prefix": ""},
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    code, out, err = cli("--prompts-file", path, "--fuse", "--fuse-prefix", "hello ", "--max-new-tokens", 7, "--json")
    assert code == 0, err
    done = parsed(out)
    assert [row["id"] for row in done] == ["three", 7, 2, 3, ["x", 1]]
    assert [row["prompts"] for row in done] == [PROMPTS, PROMPTS[:2], [PROMPTS[1]], PROMPTS[::-1], PROMPTS * 6]
    for number, row in enumerate(done):
        assert list(row) == ["id", "prompts", "text", "tokens", "logprobs", "finish_reason"]
        encode = engine.tokenizer.encode
        extra = {"suffix": encode(" is"), "weights": [0.1, 10]} if number == 1 else {}
        request = fuse(
            [encode(p) for p in row["prompts"]],
            prefix=encode("hello ") if number != 4 else [],
            **extra,
        )
        (alone,) = engine.generate([request], max_new_tokens=7)
        assert (row["text"], row["tokens"], row["finish_reason"]) == (alone.text, alone.tokens, "length")
        assert row["logprobs"] == pytest.approx(alone.logprobs, abs=2e-5)


@pytest.mark.parametrize("mode", ["attention", "mean", "max"])
def test_the_batch_size_changes_no_fused_answer(cli, tmp_path, mode):
    path = jsonl(tmp_path / "p.jsonl", [PROMPTS, PROMPTS[:1], PROMPTS[1:], PROMPTS * 2, "alone"])
    arguments = ("--prompts-file", path, "--fuse", mode, "--max-new-tokens", 4, "--temperature", 1.0, "--seed", 5)
    outputs = [sorted(cli(*arguments, "--batch-size", size)[1].split("### ")[1:]) for size in (1, 2, 8)]
    assert outputs == [outputs[0]] * 3
    assert len(outputs[0]) == 5


def test_prompts_of_the_command_line_are_one_question_before_those_of_the_file(cli, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [PROMPTS[:2], "alone"])
    sampled = ("--temperature", 1.0, "--max-new-tokens", 5, "--json")
    _, out, _ = cli(*given(PROMPTS), "--prompts-file", path, "--fuse", *sampled, "--seed", 4)
    rows = parsed(out)
    assert [(row["id"], row["prompts"]) for row in rows] == [(0, PROMPTS), (1, PROMPTS[:2]), (2, ["alone"])]
    _, alone, _ = cli(*given(PROMPTS[:2]), "--fuse", *sampled, "--seed", 5)
    assert parsed(alone)[0]["tokens"] == rows[1]["tokens"]


def test_each_line_of_a_text_file_is_its_own_question(cli, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("The quick\n\nthe weather\n")
    code, fused, _ = cli("--prompts-file", path, "--fuse", "--max-new-tokens", 4, "--json")
    _, plain, _ = cli("--prompts-file", path, "--max-new-tokens", 4, "--json")
    assert code == 0
    assert [row["prompts"] for row in parsed(fused)] == [["The quick"], ["the weather"]]
    assert [(row["id"], row["tokens"]) for row in parsed(fused)] == [
        (row["id"], row["tokens"]) for row in parsed(plain)
    ]


def test_fused_rows_can_be_given_back_as_prompts(cli, tmp_path):
    rows = [{"id": "a", "prompts": ["one\u2028two", "three\nfour"]}, {"id": [1], "prompts": ["x"]}]
    first, second = jsonl(tmp_path / "first.jsonl", rows), tmp_path / "second.jsonl"
    arguments = ("--fuse", "--max-new-tokens", 2, "--json", "--quiet")
    assert cli("--prompts-file", first, "--output", second, *arguments) == (0, "", "")
    assert cli("--prompts-file", second, *arguments) == (0, second.read_text(encoding="utf-8"), "")


def test_a_single_question_streams(cli, engine, monkeypatch):
    pieces, write = [], generate._Output.write
    monkeypatch.setattr(generate._Output, "write", lambda self, text: (pieces.append(text), write(self, text)))
    code, out, _ = cli(*given(PROMPTS), "--fuse", "mean", "--max-new-tokens", 6)
    assert (code, out) == (0, "".join(pieces))
    assert len(pieces) > 3


def test_stop_strings_end_a_fused_text(cli):
    whole = cli(*given(PROMPTS), "--fuse", "--max-new-tokens", 10, "--quiet")[1]
    stop = whole[4:7]
    row = json.loads(cli(*given(PROMPTS), "--fuse", "--max-new-tokens", 10, "--stop", stop, "--json")[1])
    assert (row["text"], row["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--fuse-prefix", "x"], ["--fuse-prefix", "need --fuse"]),
        (["--fuse-suffix", "x"], ["--fuse-suffix", "need --fuse"]),
        (["--fuse-positions", "parallel"], ["--fuse-positions", "need --fuse"]),
        (["--fuse-weights", "1,1"], ["--fuse-weights", "need --fuse"]),
        (["--fuse", "median"], ["--fuse", "median"]),
        (["--fuse", "--fuse-positions", "random"], ["--fuse-positions", "random"]),
        (["--fuse", "--fuse-weights", "1"], ["--prompt", "2 prompts", "weights"]),
        (["--fuse", "--fuse-weights", "1,1,1"], ["2 prompts", "weights"]),
        (["--fuse", "--fuse-weights", "0,1"], ["positive weights"]),
        (["--fuse", "--fuse-weights=-1,1"], ["positive weights"]),
        (["--fuse", "--fuse-weights", "-1,1"], ["--fuse-weights"]),
        (["--fuse", "--fuse-weights", "nan,1"], ["positive weights"]),
        (["--fuse", "--fuse-weights", "inf,1"], ["positive weights"]),
        (["--fuse", "--fuse-weights", "1e999,1"], ["positive weights"]),
        (["--fuse", "--fuse-weights", "one,two"], ["--fuse-weights", "'one,two' are not numbers"]),
        (["--fuse", "--fuse-weights", "1,"], ["--fuse-weights", "'1,'"]),
        (["--fuse", "--fuse-weights", ""], ["--fuse-weights", "''"]),
        (["--fuse", "mean", "--fuse-weights", "1,1"], ["--fuse mean", "weights"]),
        (["--fuse", "max", "--fuse-weights", "1,1"], ["--fuse max", "weights"]),
        (["--fuse", "mean", "--fuse-positions", "parallel"], ["--fuse mean", "positions"]),
        (["--fuse", "--prompt", ""], ["--prompt", "none empty"]),
        (["--fuse", "--prompt", "1 " * 600], ["context of 512"]),
        (["--fuse", "mean", "--prompt", "1 " * 600], ["context of 512"]),
        (["--fuse", "--max-new-tokens", "511"], ["context of 512"]),
        (["--fuse", "--prompt", "bad \ud800"], ["surrogate"]),
        (["--fuse", "--fuse-suffix", "bad \ud800"], ["surrogate"]),
        (["--fuse", "--system", "<the fused prompts>"], ["template"]),
        (["--chat", "--fuse"], ["--chat", "--fuse"]),
        (["--resume"], ["--resume", "--output", "--json"]),
        (["--resume", "--json"], ["--resume", "--output"]),
        (["--resume", "--output", "never.jsonl"], ["--resume", "--json"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_wrong_argument_about_fusing_or_resuming_is_one_line(cli, tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    assert_one_error(cli("--prompt", "a", "--prompt", "b", *arguments), *fragments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "arguments", "fragments"),
    [
        ({"prompts": ["a", "b"]}, [], ["line 2", "--fuse"]),
        (["a", "b"], [], ["line 2", "--fuse"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["--fuse"], ["line 2", "'prompts'"]),
        ({"prompts": ["a", ""]}, ["--fuse"], ["line 2", "none empty"]),
        ({"prompts": ["a", "b"], "weights": [1]}, ["--fuse"], ["line 2", "weights"]),
        ({"prompts": ["a", "b", "c"]}, ["--fuse", "--fuse-weights", "1,2"], ["line 2", "3 prompts", "weights"]),
        ({"prompts": ["a", "b"], "weights": [1, 2]}, ["--fuse", "mean"], ["--fuse mean", "weights"]),
        ({"prompts": ["a"], "prefix": 5}, ["--fuse"], ["line 2", "'prefix'"]),
    ],
)
def test_a_row_that_cannot_be_fused_is_refused(cli, tmp_path, row, arguments, fragments):
    fine = {"prompts": ["x", "y"]} if arguments else "x"
    path = jsonl(tmp_path / "p.jsonl", [fine, row])
    assert_one_error(cli("--prompts-file", path, "--strict", *arguments), *fragments)


def test_fuse_with_nothing_to_fuse_says_so(cli, tmp_path):
    (tmp_path / "p.jsonl").touch()
    for arguments in (["--fuse"], ["--fuse", "--prompts-file", tmp_path / "p.jsonl"]):
        assert_one_error(cli(*arguments), "nothing to complete")


# --- --resume ---

ASKED = [
    {"id": "a\u2028b", "prompts": ["one\u2028two", "three\x85four\x0b\x1c"]},
    {"id": 1, "prompts": ["The quick"], "suffix": " is"},
    {"id": None, "prompts": ["hello", "how are you", "today?"]},
    {"id": ["x", 2], "prompts": ["日本語", "señor"]},
    {"prompts": ["the sea", "the sea is blue"]},
]
SAMPLED = ("--fuse", "--max-new-tokens", 6, "--temperature", 1.0, "--seed", 21, "--batch-size", 2, "--json")


def assert_same_rows(rows: list[dict], expected: list[dict]) -> None:
    """Every row once, in any order; what was batched otherwise differs in the last digits of log-probabilities."""
    ids = [json.dumps(row["id"]) for row in rows]
    assert sorted(ids) == sorted(json.dumps(row["id"]) for row in expected)
    for row in expected:
        found = rows[ids.index(json.dumps(row["id"]))]
        assert found["logprobs"] == pytest.approx(row["logprobs"], abs=1e-4)
        assert {k: v for k, v in found.items() if k != "logprobs"} == {k: v for k, v in row.items() if k != "logprobs"}


@pytest.fixture
def asked(tmp_path) -> Path:
    return jsonl(tmp_path / "asked.jsonl", ASKED)


@pytest.fixture
def uninterrupted(cli, asked) -> str:
    code, out, err = cli("--prompts-file", asked, *SAMPLED)
    assert code == 0, err
    return out


def test_resuming_what_was_not_begun_is_a_run(cli, asked, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume", "--quiet") == (0, "", "")
    assert path.read_text(encoding="utf-8") == uninterrupted


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_from_any_row_on_a_resumed_run_gives_the_same_rows(cli, asked, uninterrupted, tmp_path, kept):
    lines = uninterrupted.split("\n")
    path = tmp_path / "rows.jsonl"
    unfinished = json.dumps(json.loads(lines[kept]) | {"finish_reason": None, "tokens": [1], "text": "x"})
    for last in ("", lines[kept][: len(lines[kept]) // 2], lines[kept][:-1], lines[kept], unfinished + "\n"):
        path.write_text("\n".join([*lines[:kept], last]), encoding="utf-8")
        code, out, err = cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume", "--quiet")
        assert (code, out) == (0, ""), err
        assert_same_rows(parsed(path.read_text(encoding="utf-8")), parsed(uninterrupted))


def test_an_interrupted_run_is_resumed(cli, asked, uninterrupted, tmp_path, monkeypatch):
    step, calls, path = Llama.step, [], tmp_path / "rows.jsonl"

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) % 9 == 0:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Llama, "step", interrupted)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume")[0])
        assert len(codes) < 9
    assert codes[0] == 130
    assert codes[-1] == 0
    assert_same_rows(parsed(path.read_text(encoding="utf-8")), parsed(uninterrupted))


def test_an_interrupted_run_marks_what_is_not_finished(cli, asked, tmp_path, monkeypatch):
    step, calls, path = Llama.step, [], tmp_path / "rows.jsonl"

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Llama, "step", interrupted)
    assert cli("--prompts-file", asked, *SAMPLED, "--output", path)[0] == 130
    rows = parsed(path.read_text(encoding="utf-8"))
    assert [row["finish_reason"] for row in rows] == ["length", "length", None, None]
    assert all(0 < len(row["tokens"]) < 6 for row in rows[2:])


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda kind: kind.name)
def test_a_killed_run_is_resumed(cli, folder, tmp_path, kind):
    prompts = jsonl(tmp_path / "p.jsonl", [[f"number {i}", f"the {i} sea"] for i in range(12)])
    path, arguments = tmp_path / "rows.jsonl", ("--prompts-file", prompts, "--fuse", "--max-new-tokens", 20, "--json")
    single = ("--batch-size", 1, "--output", path)
    with start("--model", folder, "--device", "cpu", "--compile", "off", *arguments, *single) as process:
        began = time.monotonic()
        while not path.exists() or path.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.005)
        process.send_signal(kind)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert b"Traceback" not in err
    assert 2 <= path.read_bytes().count(b'"finish_reason": "length"}\n') < 12
    code, out, _ = cli(*arguments, "--batch-size", 12, "--output", path, "--resume")
    assert (code, out) == (0, "")
    assert_same_rows(parsed(path.read_text()), parsed(cli(*arguments, "--batch-size", 12)[1]))


def test_with_all_done_no_model_is_loaded(cli, asked, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(uninterrupted, encoding="utf-8")
    before = path.stat()
    code, out, err = cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume", model="/no/such/model")
    assert (code, out) == (0, "")
    assert re.fullmatch(rf"--output {re.escape(str(path))} has all results\n", err)
    assert path.read_text(encoding="utf-8") == uninterrupted
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_with_all_done_torch_is_not_imported(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"id": 0, "prompt": "a", "finish_reason": "stop"}])
    arguments = ["--model", "/no/such/model", "--prompt", "a", "--json", "--output", str(path), "--resume"]
    script = f"import sys; from llama_flex import generate; code = generate.main({arguments}); "
    script += "sys.exit(code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode == 0


def test_resuming_keeps_the_mode_of_the_file(cli, asked, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(uninterrupted[:-30], encoding="utf-8")
    path.chmod(0o644)
    assert cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume")[0] == 0
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(tmp_path)) == ["asked.jsonl", "rows.jsonl"]
    assert_same_rows(parsed(path.read_text(encoding="utf-8")), parsed(uninterrupted))


@pytest.mark.parametrize(
    "other",
    [
        '{"id": "z", "prompts": ["x"], "text": "y", "finish_reason": "stop"}\n',
        '{"id": 1, "prompts": ["The slow"], "text": "y", "finish_reason": "stop"}\n',
        '{"id": 1, "prompt": "The quick", "text": "y", "finish_reason": "stop"}\n',
        "### 1: The quick\nsome text\n\n",
        "precious notes",
    ],
    ids=["another id", "other prompts", "not fused", "titled text", "notes"],
)
def test_the_output_of_another_run_is_left_alone(cli, asked, tmp_path, other):
    path = tmp_path / "rows.jsonl"
    path.write_text(other)
    result = cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume")
    assert_one_error(result, "--output", str(path), "line 1")
    assert path.read_text() == other


def test_resuming_plain_prompts_and_messages(cli, tmp_path):
    messages = [{"role": "user", "content": "hello\u2028there"}]
    prompts = jsonl(tmp_path / "p.jsonl", ["The quick", {"id": "m", "messages": messages}, {"id": 9, "prompt": "日本"}])
    path, arguments = tmp_path / "rows.jsonl", ("--prompt", "first", "--prompts-file", prompts, "--json", "--quiet")
    arguments = (*arguments, "--max-new-tokens", 3)
    _, whole, _ = cli(*arguments)
    lines = whole.split("\n")
    path.write_text(lines[2] + "\n" + lines[0] + "\n" + lines[3][:-9], encoding="utf-8")
    assert cli(*arguments, "--output", path, "--resume") == (0, "", "")
    assert_same_rows(parsed(path.read_text(encoding="utf-8")), parsed(whole))


def test_when_all_that_is_left_cannot_be_completed_resuming_says_so_and_is_done(cli, tmp_path):
    prompts = jsonl(tmp_path / "p.jsonl", ["a", {"prompt": "long " * 5000}])
    arguments = "--prompts-file", prompts, "--json", "--output", tmp_path / "rows.jsonl", "--max-new-tokens", 1
    for _ in range(2):
        code, out, err = cli(*arguments, "--resume", "--quiet")
        assert (code, out) == (0, "")
        assert re.fullmatch(r"skipped: .*line 2: .* tokens.*\n", err)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_memory_for_no_token_is_the_fault_of_no_row(cli, tmp_path):
    prompts = jsonl(tmp_path / "p.jsonl", ["a", "b"])
    result = cli("--prompts-file", prompts, "--json", "--memory-fraction", "1e-12")
    assert_one_error(result, "1e-12", "does not hold a page")


def test_the_largest_seed_is_for_more_than_one_prompt(cli):
    arguments = "--prompt", "a", "--prompt", "a", "--json", "--quiet", "--max-new-tokens", 5, "--temperature", 1
    code, out, _ = cli(*arguments, "--seed", 2**63 - 1)
    assert code == 0
    assert len({tuple(row["tokens"]) for row in parsed(out)}) == 2


def test_a_row_with_the_id_of_another_is_skipped_so_that_resuming_knows_all(cli, tmp_path):
    prompts = jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "a"}, "b", "c"])  # "b" has no id: its number, 1
    path, arguments = tmp_path / "rows.jsonl", ("--prompts-file", prompts, "--json", "--max-new-tokens", 1)
    said = f"skipped: {prompts}, line 2: id 1 is that of line 1; give each row its own"
    code, _, err = cli(*arguments, "--output", path, "--quiet")
    assert (code, err.splitlines()) == (0, [said])
    assert sorted(row["id"] for row in parsed(path.read_text())) == [1, 2]
    code, _, err = cli(*arguments, "--output", path, "--resume")
    assert (code, err.splitlines()) == (0, [said, f"--output {path} has all results"])
    assert_one_error(cli(*arguments, "--strict"), "line 2", "id 1 is that of line 1")


@pytest.mark.parametrize("kind", ["missing folder", "folder", "no permission"])
def test_resuming_to_where_nothing_can_be_written_is_refused(cli, tmp_path, kind):
    path = unwritable(tmp_path, kind)
    result = cli("--prompt", "a", "--json", "--output", path, "--resume", model="nowhere")
    assert_one_error(result, "cannot write to --output", str(path))


def test_the_prompts_file_is_no_output_to_resume(cli, asked):
    before = asked.read_bytes()
    assert_one_error(cli("--prompts-file", asked, *SAMPLED, "--output", asked, "--resume"), "is the prompts file")
    assert asked.read_bytes() == before


def test_prompts_come_from_a_pipe(cli, tmp_path):
    path, (reader, writer) = tmp_path / "rows.jsonl", os.pipe()
    os.write(writer, b"The quick\n\nthe sea")
    os.close(writer)
    arguments = ("--prompts-file", f"/dev/fd/{reader}", "--fuse", "--max-new-tokens", 2, "--json", "--quiet")
    assert cli(*arguments, "--output", path, "--resume") == (0, "", "")
    os.close(reader)
    assert [row["prompts"] for row in parsed(path.read_text())] == [["The quick"], ["the sea"]]


# --- The progress bar ---


def terminal_output(run: Callable[[], object], *streams: str) -> str:
    """What a function writes to a terminal that is its stderr, and what else is named."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with pytest.MonkeyPatch.context() as patch, os.fdopen(follower, "w") as terminal:
        for stream in ("stderr", *streams):
            patch.setattr(sys, stream, terminal)
        run()
        terminal.write("<end>")
        terminal.flush()
        content = b""
        while not content.endswith(b"<end>"):  # a terminal passes on what was written in parts, and not at once
            content += os.read(leader, 4096)
    os.close(leader)
    return content.decode().removesuffix("<end>")


def test_a_terminal_shows_progress_for_a_prompts_file(cli, asked):
    arguments = ("--prompts-file", asked, *SAMPLED)
    shown = terminal_output(lambda: cli(*arguments))
    assert re.search(r"100%.*5/5", shown)
    assert "0/5" in shown
    assert re.search(r"\nload [\d.]+ s; .*\n$", shown.replace("\r\n", "\n"))  # on a line of its own
    assert terminal_output(lambda: cli(*arguments, "--quiet")) == ""
    alone = terminal_output(lambda: cli("--prompt", "a", "--prompt", "b", "--max-new-tokens", 2))
    assert alone.startswith("load ")
    assert "%" not in alone


def test_progress_and_texts_on_one_terminal_do_not_share_lines(cli, asked):
    shown = terminal_output(lambda: cli("--prompts-file", asked, *SAMPLED[:-1]), "stdout")
    assert re.search(r"100%.*5/5", shown)
    assert len(re.findall(r"[\r\n]### ", shown)) == 5


def test_progress_counts_only_what_is_left(cli, asked, uninterrupted, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(uninterrupted.split("\n")[:2]), encoding="utf-8")
    shown = terminal_output(lambda: cli("--prompts-file", asked, *SAMPLED, "--output", path, "--resume"))
    assert re.search(r"100%.*3/3", shown)


def test_without_a_terminal_there_is_no_progress(cli, asked):
    _, _, err = cli("--prompts-file", asked, *SAMPLED)
    assert re.fullmatch(r"load .*\n", err)


def test_a_closed_stderr_changes_nothing_on_stdout(cli, asked, uninterrupted, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("--prompts-file", asked, *SAMPLED) == (0, uninterrupted, "")
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("--frobnicate") == (2, "", "")
