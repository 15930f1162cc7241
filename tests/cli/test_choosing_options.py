"""Options that choose tokens: biases, penalties, bans, grammars, and the most likely tokens in rows of JSON."""

import json
import re

import pytest
from cli_helpers import assert_one_error, parse_rows

from llama_flex import Grammar, Sampling

PROMPTS = "The quick", "señor"
PLAIN = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json", "--max-new-tokens", 8]


def rows_of(engine, sampling: Sampling) -> list:
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    return engine.generate(prompts, sampling=sampling, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (["--logit-bias", "40=9", "--logit-bias", "41=8.5"], Sampling(logit_bias={40: 9.0, 41: 8.5})),
        (["--ban-token", "299", "--ban-token", "40", "--logit-bias", "40=30"], None),
        (
            ["--presence-penalty", "2", "--frequency-penalty", "-1.5", "--logit-bias", "40=5"],
            Sampling(presence_penalty=2.0, frequency_penalty=-1.5, logit_bias={40: 5.0}),
        ),
        (
            ["--min-new-tokens", "4", "--logit-bias", "2=50", "--no-repeat-ngram-size", "1"],
            Sampling(min_new_tokens=4, logit_bias={2: 50.0}, no_repeat_ngram_size=1),
        ),
        (
            ["--typical-p", "0.5", "--temperature", "1.5", "--seed", "3", "--regex", "[a-c]+"],
            Sampling(typical_p=0.5, temperature=1.5, seed=3, grammar=Grammar.regex("[a-c]+")),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_the_parameters_of_the_same_name(cli, engine, options, sampling):
    sampling = sampling or Sampling(banned_tokens=[299, 40], logit_bias={40: 30.0})
    code, out, _ = cli(*PLAIN, *options)
    rows = parse_rows(out)
    assert code == 0
    expected = rows_of(engine, sampling)
    assert rows[0]["tokens"] == expected[0].tokens  # the second has another seed
    assert rows[0]["tokens"] != rows_of(engine, Sampling())[0].tokens
    assert "top_logprobs" not in rows[0]


def test_the_most_likely_tokens_are_in_rows_of_json(cli, engine):
    code, out, _ = cli(*PLAIN, "--top-logprobs", 3, "--temperature", "2", "--seed", "1")
    rows = parse_rows(out)
    (expected, _) = rows_of(engine, Sampling(top_logprobs=3, temperature=2.0, seed=1))
    assert code == 0
    assert [[id for id, _ in most] for most in rows[0]["top_logprobs"]] == [
        [id for id, _ in most] for most in expected.top_logprobs
    ]
    assert rows[0]["top_logprobs"][0][0][1] == pytest.approx(expected.top_logprobs[0][0][1], abs=1e-4)


def test_a_json_schema_and_a_grammar_are_read_from_files(cli, tmp_path):
    schema, lark = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps({"enum": [[12, "ä"], 7]}))
    lark.write_text('start: "x" NUMBER\nNUMBER: /[0-9]{2}/')
    length = ["--max-new-tokens", 40, "--temperature", 1, "--seed", 2]
    code, out, _ = cli("--prompt", "The quick", "--json-schema", schema, *length)
    assert code == 0
    assert json.loads(out) in ([12, "ä"], 7)
    code, out, _ = cli("--prompt", "The quick", "--grammar", lark, *length)
    assert code == 0
    assert re.fullmatch("x[0-9]{2}\n", out)
    schema.write_text("{")
    code, _, err = cli("--prompt", "The quick", "--json-schema", schema)
    assert (code, err.count("\n")) == (2, 1)
    assert "JSON schema" in err


def test_a_grammar_holds_for_every_answer_of_a_conversation(cli):
    code, out, _ = cli("--chat", "--regex", "(yes|no)!", "--quiet", "--max-new-tokens", 20, stdin="The quick\nbrown\n")
    assert code == 0
    assert len(re.findall("(yes|no)!", out)) == 2


def test_a_text_that_no_token_may_continue_is_named_and_ends_no_conversation(cli):
    never = ["--regex", "[0-9]{3}", "--min-new-tokens", 8, "--max-new-tokens", 9]
    code, _, err = cli("--prompt", "x", "--prompt", "y", *never, "--json")
    assert code == 2
    assert "the first: prompt 0: no token is left" in err
    code, _, err = cli("--chat", *never, "--quiet", stdin="The quick\nbrown\n")
    assert code == 0
    assert len(re.findall("error: no token is left .*: all are ruled out by grammar with min_new_tokens", err)) == 2


def test_a_grammar_without_stop_tokens_says_how_to_give_some(cli):
    result = cli("--prompt", "x", "--regex", "[0-9]{3}", "--ignore-eos")
    assert_one_error(result, "a grammar needs stop tokens", "--stop-token")


def test_a_token_has_one_bias(cli):
    result = cli("--prompt", "x", "--logit-bias", "5=1", "--logit-bias", "6=1", "--logit-bias", "5=2")
    assert_one_error(result, "--logit-bias has token 5 more than once")
