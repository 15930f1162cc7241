"""Arguments of the command line: all that is wrong with them is said in one line on stderr."""

import importlib.metadata
import os

import pytest
from cli_helpers import assert_one_error

import llama_flex
from llama_flex import generate


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
        (["--prompt", "x", "--typical-p", "0"], ["typical_p", "0"]),
        (["--prompt", "x", "--presence-penalty", "3"], ["presence_penalty", "3"]),
        (["--prompt", "x", "--frequency-penalty", "-3"], ["frequency_penalty", "-3"]),
        (["--prompt", "x", "--no-repeat-ngram-size", "-1"], ["no_repeat_ngram_size", "-1"]),
        (["--prompt", "x", "--min-new-tokens", "-1"], ["min_new_tokens", "-1"]),
        (["--prompt", "x", "--min-new-tokens", "9", "--max-new-tokens", "8"], ["min_new_tokens 9", "8 new tokens"]),
        (["--prompt", "x", "--logit-bias", "5"], ["--logit-bias", "'5'", "42=-1.5"]),
        (["--prompt", "x", "--logit-bias", "5=nan"], ["logit_bias", "nan"]),
        (["--prompt", "x", "--logit-bias", "5000=1"], ["logit_bias", "5000", "vocabulary"]),
        (["--prompt", "x", "--ban-token", "y"], ["--ban-token", "y"]),
        (["--prompt", "x", "--ban-token", "5000"], ["banned_tokens", "5000", "vocabulary"]),
        (["--prompt", "x", "--top-logprobs", "2"], ["--top-logprobs", "--json"]),
        (["--prompt", "x", "--regex", "("], ["regular expression", "unclosed group"]),
        (["--prompt", "x", "--regex", "a", "--grammar", "b"], ["--grammar", "not allowed with", "--regex"]),
        (["--prompt", "x", "--json-schema", "/no/schema.json"], ["--json-schema", "/no/schema.json"]),
        (["--prompt", "x", "--grammar", "/no/grammar.lark"], ["--grammar", "/no/grammar.lark"]),
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
        (["--prompt", "x", "--kv-dtype", "int8"], ["--kv-dtype", "int8", "fp8"]),
        (["--prompt", "x", "--speculate", "magic"], ["--speculate", "magic", "lookup", "self"]),
        (
            ["--prompt", "x", "--speculate", "self", "--draft-model", "y"],
            ["--draft-model", "not allowed", "--speculate"],
        ),
        (["--prompt", "x", "--speculate", "self", "--beams", "2"], ["--speculate", "--beams"]),
        (["--prompt", "x", "--speculate", "lookup", "--regex", "a*"], ["--speculate", "--regex"]),
        (
            ["--prompt", "x", "--draft-model", "y", "--no-repeat-ngram-size", "2"],
            ["--draft-model", "--no-repeat-ngram"],
        ),
        (["--chat", "--draft-model", "y"], ["--draft-model", "--chat", "--speculate"]),
        (["--prompt", "x", "--prompt", "z", "--draft-model", "y"], ["--draft-model", "one prompt", "--speculate"]),
        (["--prompt", "x", "--json", "--draft-model", "y"], ["--draft-model", "one prompt", "--speculate"]),
        (["--prompt", "x", "--best-of", "2", "--draft-model", "y"], ["--draft-model", "one prompt", "--speculate"]),
        (["--prompt", "x", "--speculate", "self", "--quantize", "int8"], ["quantised already"]),
        (["--prompt", "x", "--draft-model", "/nowhere/at/all"], ["/nowhere/at/all"]),
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


def test_without_a_model_the_argument_is_named(cli):
    assert_one_error(cli("--prompt", "x", model=None), "--model")


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
        (["--fuse", "--fuse-weights", "one,two"], ["--fuse-weights", "'one,two' must be numbers"]),
        (["--fuse", "--fuse-weights", "1,"], ["--fuse-weights", "'1,'"]),
        (["--fuse", "--fuse-weights", ""], ["--fuse-weights", "''"]),
        (["--fuse", "mean", "--fuse-weights", "1,1"], ["--fuse mean", "weights"]),
        (["--fuse", "max", "--fuse-weights", "1,1"], ["--fuse max", "weights"]),
        (["--fuse", "mean", "--fuse-positions", "parallel"], ["--fuse mean", "positions"]),
        (["--fuse", "--prompt", ""], ["--prompt", "non-empty"]),
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


def test_fuse_with_nothing_to_fuse_says_so(cli, tmp_path):
    (tmp_path / "p.jsonl").touch()
    for arguments in (["--fuse"], ["--fuse", "--prompts-file", tmp_path / "p.jsonl"]):
        assert_one_error(cli(*arguments), "nothing to complete")


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main(["--help"])
    assert exit.value.code == 0
    assert "--prompts-file" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as done:
        generate.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"llama_flex {llama_flex.__version__}\n"
    assert importlib.metadata.version("llama_flex") == llama_flex.__version__
