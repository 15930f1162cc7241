"""--beams and --best-of: the best of several texts, from the command line."""

import json

import pytest
from cli_helpers import assert_one_error, assert_same_rows, interrupted, parse_rows, prompt_arguments, write_jsonl

from llama_flex import Sampling, fuse

PROMPTS = ["The quick brown fox", "the weather is nice today", "señor, a stitch"]
NEW = ("--max-new-tokens", 8)


def encoded(engine) -> list[list[int]]:
    return [engine.tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--length-penalty", "-2.5", "--batch-size", 6], {"length_penalty": -2.5}),
        (["--stop", "e", "--repetition-penalty", 1.4], {"stop": ["e"], "repetition_penalty": 1.4}),
    ],
)
def test_beams_are_those_of_the_engine(cli, engine, arguments, options):
    expected = engine.beam_search(encoded(engine), num_beams=3, max_new_tokens=8, **options)
    code, out, err = cli(*prompt_arguments(PROMPTS), "--beams", 3, *arguments, *NEW, "--json")
    assert code == 0, err
    assert [row["tokens"] for row in parse_rows(out)] == [best.tokens for (best,) in expected]
    assert [row["text"] for row in parse_rows(out)] == [best.text for (best,) in expected]


def test_best_of_is_that_of_the_engine_whatever_the_batches(cli, engine):
    sampling = Sampling(temperature=1.2, seed=5)
    expected = engine.best_of(encoded(engine), 3, sampling=sampling, max_new_tokens=8)
    sampled = ("--best-of", 3, "--temperature", 1.2, "--seed", 5, *NEW, "--json")
    for size in (1, 6, 9):
        code, out, err = cli(*prompt_arguments(PROMPTS), *sampled, "--batch-size", size)
        assert code == 0, err
        assert [row["tokens"] for row in parse_rows(out)] == [best.tokens for (best,) in expected]


def test_one_prompt_gives_its_text_alone_and_fused_prompts_have_beams(cli, engine):
    ((best,),) = engine.beam_search(encoded(engine)[:1], num_beams=2, max_new_tokens=8)
    assert cli("--prompt", PROMPTS[0], "--beams", 2, *NEW)[:2] == (0, best.text + "\n")
    ((best,),) = engine.beam_search([fuse(encoded(engine))], num_beams=2, max_new_tokens=8)
    assert cli(*prompt_arguments(PROMPTS), "--fuse", "--beams", 2, *NEW)[:2] == (0, best.text + "\n")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--beams", "1"], ["--beams must be at least 2, not 1"]),
        (["--best-of", "0"], ["--best-of must be at least 1, not 0"]),
        (["--length-penalty", "1"], ["--length-penalty needs --beams"]),
        (["--beams", "2", "--length-penalty", "nan"], ["length_penalty must be a number"]),
        (["--beams", "2", "--best-of", "2"], ["--beams takes of these only --repetition-penalty", "--best-of"]),
        (["--beams", "2", "--top-k", "2", "--seed", "0"], ["leave out --top-k, --seed"]),
        (["--beams", "2", "--fuse", "mean"], ["--fuse mean has no beams"]),
        (["--best-of", "2"], ["2 greedy samples", "temperature"]),
    ],
)
def test_what_does_not_go_together_is_refused(cli, arguments, fragments):
    assert_one_error(cli("--prompt", "x", *arguments), *fragments)


def test_a_conversation_has_neither(cli):
    for option in ("--beams", "--best-of"):
        assert_one_error(cli("--chat", option, "2"), f"--chat streams its answers; leave out {option}")


def test_the_best_text_follows_what_the_answer_is_to_begin_with(cli):
    given = ["--instruct", "--prompt", "hello", *NEW]
    for option in (["--beams", 2], ["--best-of", 2, "--temperature", 1, "--seed", 1]):
        (row,) = parse_rows(cli(*given, *option, "--prefill-response", "I am", "--json")[1])
        assert row["text"].startswith("I am")
        assert cli(*given, *option, "--prefill-response", "I am")[1] == row["text"] + "\n"


def test_a_row_that_is_left_out_changes_no_other_row(cli, tmp_path):
    rows = [{"id": n, "prompt": text} for n, text in enumerate(PROMPTS)]
    sampled = ("--best-of", 2, "--temperature", 1.2, "--seed", 5, *NEW, "--json", "--batch-size", 6)
    whole = parse_rows(cli("--prompts-file", write_jsonl(tmp_path / "whole.jsonl", rows), *sampled)[1])
    file = write_jsonl(tmp_path / "bad.jsonl", [rows[0], {"id": 1, "prompt": 5}, rows[2]])
    assert parse_rows(cli("--prompts-file", file, *sampled)[1]) == [whole[0], whole[2]]
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(whole[1]) + "\n")
    assert cli("--prompts-file", tmp_path / "whole.jsonl", *sampled, "--output", out, "--resume")[0] == 0
    assert sorted(parse_rows(out.read_text()), key=lambda row: row["id"]) == whole


@pytest.mark.parametrize("option", [["--beams", 2], ["--best-of", 2, "--temperature", 1, "--seed", 1]])
def test_a_row_that_fails_ends_no_other_row(cli, damaged, tmp_path, option):
    rows = [{"id": text, "prompt": text} for text in ("The quick", "lazy dog", "the sea")]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    code, out, err = cli("--prompts-file", file, *option, "--max-new-tokens", 2, "--json", model=damaged)
    assert code == 2
    assert [row["finish_reason"] for row in parse_rows(out)] == ["length", "error", "length"]
    assert "1 of 3 prompts ended in an error; the first: " in err
    assert "line 2 at new token 1: the model's logits" in err


@pytest.mark.parametrize("option", [["--beams", 2], ["--best-of", 2, "--temperature", 1, "--seed", 1]])
def test_an_interrupted_run_is_resumed(cli, tmp_path, option):
    out, given = tmp_path / "out.jsonl", [*prompt_arguments(PROMPTS), *option, *NEW, "--json", "--batch-size", 2]
    whole = parse_rows(cli(*given)[1])
    with interrupted(lambda step: step == 12):
        code, _, err = cli(*given, "--output", out)
    assert code == 130
    assert "2 of 3 prompts are unfinished; use --resume to continue" in err
    assert cli(*given, "--output", out, "--resume")[0] == 0
    assert_same_rows(parse_rows(out.read_text()), whole)
