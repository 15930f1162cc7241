"""--fuse: several prompts for one answer, from the command line and from the rows of a file."""

import json
import shutil

import pytest
from cli_helpers import TEMPLATE, assert_one_error, copy_with_bos, parse_rows, prompt_arguments, write_jsonl
from helpers import few

from llama_flex import Engine, Ensemble, Sampling, fuse
from llama_flex.cli.output import Output
from llama_flex.engine.fusion import AnyPrompt

PROMPTS = ["The quick brown fox", "the weather is nice today", "señor, a stitch"]


def fused_text(engine: Engine, request: AnyPrompt, new: int, **options) -> str:
    """Return the text of `new` tokens that the engine generates for fused prompts or an ensemble."""
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
    code, out, err = cli(*prompt_arguments(PROMPTS), "--fuse", *arguments, "--max-new-tokens", 12)
    assert (code, out) == (0, fused_text(engine, request, 12) + "\n"), err
    assert f"prefill {len(request.ids)} tokens" in err
    assert out == cli(*prompt_arguments(PROMPTS), "--fuse", "attention", *arguments, "--max-new-tokens", 12)[1]
    plain = fuse([engine.tokenizer.encode(p) for p in PROMPTS])
    assert not arguments or out != fused_text(engine, plain, 12) + "\n"  # the arguments matter


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_fuse_mean_and_max_are_ensembles(cli, engine, combine):
    encode = engine.tokenizer.encode
    around = ("--fuse-prefix", "Numbers: ", "--fuse-suffix", " is")
    request = Ensemble([[*encode("Numbers: "), *encode(p), *encode(" is")] for p in PROMPTS], combine)
    sampled = ("--temperature", 1.0, "--seed", 11, "--max-new-tokens", 12)
    code, out, err = cli(*prompt_arguments(PROMPTS), "--fuse", combine, *around, *sampled)
    assert (code, out) == (0, fused_text(engine, request, 12, sampling=Sampling(temperature=1.0, seed=11)) + "\n")
    assert f"prefill {sum(len(p.ids) for p in request.prompts)} tokens" in err


@pytest.mark.parametrize("mode", few(["mean"], ["attention", "max"]))
def test_one_fused_prompt_is_the_prompt(cli, mode):
    for template in ([], ["--instruct"], ["--system", "fine"]):
        arguments = ("--prompt", "how are you today?", *template, "--max-new-tokens", 10, "--json")
        (plain,), (fused,) = (parse_rows(cli(*arguments, *extra)[1]) for extra in ([], ["--fuse", mode]))
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
    _, out, _ = cli(*prompt_arguments(PROMPTS), "--fuse", mode, *around, "--max-new-tokens", 8)
    assert out == fused_text(engine, request, 8) + "\n"


def test_special_tokens_of_the_tokenizer_begin_each_prompt_or_the_prefix(cli, folder, tmp_path):
    tokenizer = copy_with_bos(folder, copy := tmp_path / "model")
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in ("Numbers: ", *PROMPTS)]
    for arguments, extra in (
        (["--fuse", "--fuse-prefix", "Numbers: "], 1 + lengths[0]),
        (["--fuse"], 3),
        (["--fuse", "mean", "--fuse-prefix", "Numbers: "], 3 * (1 + lengths[0])),
        (["--fuse", "max"], 3),
        (["--fuse", "--instruct"], len(tokenizer.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")) - 1),
    ):
        _, _, err = cli(*prompt_arguments(PROMPTS), *arguments, "--max-new-tokens", 1, model=copy)
        assert f"prefill {sum(lengths[1:]) + extra} tokens" in err


def test_a_template_that_does_not_hold_a_message_once_is_refused(cli, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    for template in (TEMPLATE + "{{ messages[0].content }}", "{{ messages[0].role }}"):
        (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert_one_error(cli(*prompt_arguments(PROMPTS), "--fuse", "--instruct", model=copy), "template", "once")
    (copy / "tokenizer_config.json").write_text("{}")
    assert_one_error(cli(*prompt_arguments(PROMPTS), "--fuse", "--instruct", model=copy), "chat template")


def test_fused_rows_of_a_file_are_each_what_they_are_alone(cli, engine, tmp_path):
    rows = [
        {"id": "three", "prompts": PROMPTS},
        {"id": 7, "prompts": PROMPTS[:2], "suffix": " is", "weights": [0.1, 10]},
        {"id": None, "prompt": PROMPTS[1]},
        PROMPTS[::-1],
        {"id": ["x", 1], "prompts": PROMPTS * 6, "prefix": ""},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    code, out, err = cli("--prompts-file", path, "--fuse", "--fuse-prefix", "hello ", "--max-new-tokens", 7, "--json")
    assert code == 0, err
    done = parse_rows(out)
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["attention", "mean", "max"])
def test_the_batch_size_changes_no_fused_answer(cli, tmp_path, mode):
    path = write_jsonl(tmp_path / "p.jsonl", [PROMPTS, PROMPTS[:1], PROMPTS[1:], PROMPTS * 2, "alone"])
    arguments = ("--prompts-file", path, "--fuse", mode, "--max-new-tokens", 4, "--temperature", 1.0, "--seed", 5)
    outputs = [sorted(cli(*arguments, "--batch-size", size)[1].split("### ")[1:]) for size in (1, 2, 8)]
    assert outputs == [outputs[0]] * 3
    assert len(outputs[0]) == 5


def test_prompts_of_the_command_line_are_one_question_before_those_of_the_file(cli, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [PROMPTS[:2], "alone"])
    sampled = ("--temperature", 1.0, "--max-new-tokens", 5, "--json")
    _, out, _ = cli(*prompt_arguments(PROMPTS), "--prompts-file", path, "--fuse", *sampled, "--seed", 4)
    rows = parse_rows(out)
    assert [(row["id"], row["prompts"]) for row in rows] == [(0, PROMPTS), (1, PROMPTS[:2]), (2, ["alone"])]
    _, alone, _ = cli(*prompt_arguments(PROMPTS[:2]), "--fuse", *sampled, "--seed", 5)
    assert parse_rows(alone)[0]["tokens"] == rows[1]["tokens"]


def test_each_line_of_a_text_file_is_its_own_question(cli, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("The quick\n\nthe weather\n")
    code, fused, _ = cli("--prompts-file", path, "--fuse", "--max-new-tokens", 4, "--json")
    _, plain, _ = cli("--prompts-file", path, "--max-new-tokens", 4, "--json")
    assert code == 0
    assert [row["prompts"] for row in parse_rows(fused)] == [["The quick"], ["the weather"]]
    assert [(row["id"], row["tokens"]) for row in parse_rows(fused)] == [
        (row["id"], row["tokens"]) for row in parse_rows(plain)
    ]


def test_fused_rows_can_be_given_back_as_prompts(cli, tmp_path):
    rows = [{"id": "a", "prompts": ["one\u2028two", "three\nfour"]}, {"id": [1], "prompts": ["x"]}]
    first, second = write_jsonl(tmp_path / "first.jsonl", rows), tmp_path / "second.jsonl"
    arguments = ("--fuse", "--max-new-tokens", 2, "--json", "--quiet")
    assert cli("--prompts-file", first, "--output", second, *arguments) == (0, "", "")
    assert cli("--prompts-file", second, *arguments) == (0, second.read_text(encoding="utf-8"), "")


def test_a_single_question_streams(cli, engine, monkeypatch):
    pieces, write = [], Output.write
    monkeypatch.setattr(Output, "write", lambda self, text: (pieces.append(text), write(self, text)))
    code, out, _ = cli(*prompt_arguments(PROMPTS), "--fuse", "mean", "--max-new-tokens", 6)
    assert (code, out) == (0, "".join(pieces))
    assert len(pieces) > 3


def test_stop_strings_end_a_fused_text(cli):
    whole = cli(*prompt_arguments(PROMPTS), "--fuse", "--max-new-tokens", 10, "--quiet")[1]
    stop = whole[4:7]
    row = json.loads(cli(*prompt_arguments(PROMPTS), "--fuse", "--max-new-tokens", 10, "--stop", stop, "--json")[1])
    assert (row["text"], row["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("row", "arguments", "fragments"),
    [
        ({"prompts": ["a", "b"]}, [], ["line 2", "--fuse"]),
        (["a", "b"], [], ["line 2", "--fuse"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["--fuse"], ["line 2", "'prompts'"]),
        ({"prompts": ["a", ""]}, ["--fuse"], ["line 2", "non-empty"]),
        ({"prompts": ["a", "b"], "weights": [1]}, ["--fuse"], ["line 2", "weights"]),
        ({"prompts": ["a", "b", "c"]}, ["--fuse", "--fuse-weights", "1,2"], ["line 2", "3 prompts", "weights"]),
        ({"prompts": ["a", "b"], "weights": [1, 2]}, ["--fuse", "mean"], ["--fuse mean", "weights"]),
        ({"prompts": ["a"], "prefix": 5}, ["--fuse"], ["line 2", "'prefix'"]),
    ],
)
def test_a_row_that_cannot_be_fused_is_refused(cli, tmp_path, row, arguments, fragments):
    fine = {"prompts": ["x", "y"]} if arguments else "x"
    path = write_jsonl(tmp_path / "p.jsonl", [fine, row])
    assert_one_error(cli("--prompts-file", path, "--strict", *arguments), *fragments)
