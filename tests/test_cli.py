"""The command line: what it writes where, its exit codes, and one line for everything the user can put right."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from llama_flex import Engine, Llama, LlamaConfig, Sampling, Tokenizer, generate

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


def test_quiet_leaves_stderr_empty(cli):
    code, _, err = cli("--prompt", "The quick", "--max-new-tokens", 2, "--quiet")
    assert (code, err) == (0, "")


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
    assert re.search(r"load [\d.]+ s; compile [\d.]+ s; first token ", err)


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
        (["--prompt", "x", "--top-p", "0"], ["top_p"]),
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
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
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
        ("another architecture", ["MistralForCausalLM", "not supported"]),
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
    ids=["cut off", "no prompt", "number", "list", "messages of text", "no messages", "empty", "deep", "none", "bytes"],
)
def test_a_malformed_jsonl_file_is_refused_with_its_line(cli, tmp_path, content, fragments):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_error(cli("--prompts-file", path), *fragments)


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
    assert_one_error(cli("--prompts-file", path), "line 2")


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
