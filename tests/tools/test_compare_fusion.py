"""The comparison of fused prompts with ensembles and single prompts: its questions, its scores, its page."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import ROOT, few

from llama_flex import Completion, Engine, Ensemble, Llama, LlamaConfig, Prompt, Sampling, Tokenizer, Tokens, masks
from tools import compare_fusion
from tools.compare_fusion import Question, is_right

WAYS = [
    "each wording alone",
    "all in one causal prompt",
    "ensemble, mean",
    "ensemble, max",
    "fused, continue",
    "fused, parallel",
    "fused, continue, first weighs 4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model of two layers, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    """An engine of that model."""
    return Engine(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder))


def some_questions(count: int) -> list[Question]:
    return [Question(str(i), [f"What is {i}?", f"{i}: what is it?", f"Name {i}!"], ["a"]) for i in range(count)]


# ---- the questions


def test_the_questions_are_well_formed():
    questions = compare_fusion.read(ROOT / "docs" / "questions.jsonl")
    assert len(questions) == len({question.id for question in questions}) == 40
    wordings = [" ".join(prompt.lower().split()) for question in questions for prompt in question.prompts]
    assert len(set(wordings)) == len(wordings) == 200
    for question in questions:
        assert len(question.prompts) == 5
        assert all(prompt[-1] in ".?" and prompt == prompt.strip() for prompt in question.prompts)
        assert question.answers == [answer.lower() for answer in question.answers]
        assert not any(is_right(prompt, question.answers) for prompt in question.prompts), "says its own answer"
        assert not is_right(" ".join(compare_fusion.PREFIX.split()), question.answers)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no questions"),
        ("{", "line 1: needs a JSON object"),
        ('["a"]', "line 1: needs a JSON object"),
        ('\n{"id": 1, "prompts": ["a"]}', "line 2: needs a JSON object"),
        ('{"id": 1, "prompts": "ab", "answers": ["a"]}', "lists of texts"),
        ('{"id": 1, "prompts": [], "answers": ["a"]}', "lists of texts"),
        ('{"id": 1, "prompts": ["a"], "answers": [""]}', "lists of texts"),
        (
            '{"id": 1, "prompts": ["a"], "answers": ["b"]}\n{"id": 2, "prompts": ["a", "c"], "answers": ["b"]}',
            "line 2: has not as many prompts",
        ),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, capsys, text, complaint):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    assert compare_fusion.main(["--questions", str(path), "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize(
    "arguments", [["--limit", "0"], ["--new", "x"], ["--questions", "none.jsonl"], ["--model", "none"], ["--new", "0"]]
)
def test_wrong_arguments_are_refused_in_one_line(monkeypatch, capsys, folder, arguments):
    monkeypatch.chdir(ROOT)
    assert compare_fusion.main(["--model", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


# ---- the score


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        (" Paris.", ["paris"], True),
        (" The capital is PARIS", ["paris"], True),
        (" Parisian", ["paris"], False),
        (" Lyon\nParis", ["paris"], False),
        ("\nParis", ["paris"], False),
        ("", ["paris"], False),
        (" 4", ["4", "four"], True),
        (" It has four-sided faces", ["4", "four"], True),
        (" 2 + 2 = 4.", ["4"], True),
        (" 40", ["4"], False),
        (" 4.5", ["4"], False),
        (" 0.4", ["4"], False),
        (" 1,4", ["4"], False),
        (" 4,000", ["4"], False),
        (" -4", ["4"], False),
        (" 3, 4, 5", ["4"], True),
        (" 0°C", ["0"], True),
        (" Carbon  dioxide (CO2)", ["carbon dioxide"], True),
        (" carbon\ndioxide", ["carbon dioxide"], False),
        (" monocarbon dioxide", ["carbon dioxide"], False),
        (" non-glass", ["glass"], False),
        (" a.c", ["abc", "a.c"], True),
        (" abc", ["a.c"], False),
        (" STRASSE", ["straße"], True),
    ],
)
def test_an_answer_counts_as_whole_words_of_the_first_line(text, answers, right):
    assert is_right(text, answers) is right


def test_the_numbers_of_one_way():
    questions = [Question("a", ["1", "2"], ["yes"]), Question("b", ["1", "2"], ["yes"])]
    texts = [" yes", " no", "yes ", " yes"]
    done = [Completion([1, 2], [-1.0, -0.5 * i], text, "stop") for i, text in enumerate(texts)]
    row = compare_fusion.summary(done, questions)
    assert row.pop("answers") == [
        {"id": "a", "texts": ["yes", "no"], "right": [True, False]},
        {"id": "b", "texts": ["yes", "yes"], "right": [True, True]},
    ]
    assert row == {
        "right": 1.5,
        "of": 2,
        "standard_error": pytest.approx((2 * 0.75 * 0.25) ** 0.5),
        "logprob": pytest.approx(-7 / 8),
        "right_by_wording": [2, 1],
        "differ_in_right": 1,
        "differ_in_text": 1,
    }
    assert "right_by_wording" not in compare_fusion.summary(done[:2], questions)


def test_the_table_counts_questions_won_and_lost():
    questions = [Question(str(i), ["1", "2"], ["yes"]) for i in range(4)]

    def row(way: str, *texts: str) -> dict:
        done = [Completion([1], [-0.5], text, "stop") for text in texts]
        return {"way": way} | compare_fusion.summary(done, questions) | {"seconds": 0.25}

    alone = row("each wording alone", "yes", "no", "yes", "yes", "no", "no", "yes", "no")
    rows = [alone, row("ensemble, mean", "yes", "no", "yes", "no"), row("fused, continue", "yes", "yes", "no", "yes")]
    assert compare_fusion.table(rows).split("\n")[2:] == [
        "| each wording alone (mean) | 2 of 4 ± 1.0 |  | -0.500 | 0.25 |",
        "| ensemble, mean | 2 of 4 ± 1.0 | 0, 0 | -0.500 | 0.25 |",
        "| fused, continue | 3 of 4 ± 0.9 | 2, 1 | -0.500 | 0.25 |",
        "",
        "Right by wording: 3, 1; best is 1, worst 2. "
        "Questions right in some wordings only: 2; with different texts: 2.",
    ]


# ---- what is asked


def test_all_ways_get_the_same_pieces(engine):
    tokenizer = engine.tokenizer
    ways = compare_fusion.requests(some_questions(1)[0], tokenizer)
    assert list(ways) == WAYS
    prompts = ["Question: What is 0?", "Question: 0: what is it?", "Question: Name 0!"]
    text = {name: [tokenizer.decode(r.ids) for r in ways[name] if isinstance(r, Prompt)] for name in ways}
    assert text["each wording alone"] == [compare_fusion.PREFIX + p + "\nAnswer:" for p in prompts]
    assert text["all in one causal prompt"] == [compare_fusion.PREFIX + "\n".join(prompts) + "\nAnswer:"]
    for name in WAYS[4:]:
        assert text[name] == [compare_fusion.PREFIX + "".join(prompts) + "\nAnswer:"]
    for name, combine in (("ensemble, mean", "mean"), ("ensemble, max", "max")):
        assert ways[name] == [Ensemble(ways["each wording alone"], combine)]
    assert [bool(ways[name][0].log_weights) for name in WAYS[4:]] == [False, False, True]
    continued, parallel = (ways[name][0] for name in WAYS[4:6])
    assert continued.generated_position == len(continued.ids)
    assert parallel.generated_position == max(len(prompt.ids) for prompt in ways["each wording alone"])


@pytest.mark.exhaustive
def test_batches_change_nothing(engine, monkeypatch):
    monkeypatch.setattr(compare_fusion, "PREFIX", "Q\n")
    questions = some_questions(4)  # the batches of three rows are not all full
    rows = compare_fusion.compare(engine, questions, 3)
    assert [row["way"] for row in rows] == WAYS
    again = compare_fusion.compare(engine, questions, 3)
    for row, repeated in zip(rows, again, strict=True):
        row.pop("seconds"), repeated.pop("seconds")
        assert row == repeated
        for question, answer in zip(questions, row["answers"], strict=True):
            one_by_one = [
                engine.generate([r], max_new_tokens=3, sampling=Sampling(), stop=["\n"])[0].text.strip()
                for r in compare_fusion.requests(question, engine.tokenizer)[row["way"]]
            ]
            assert answer["texts"] == one_by_one


@pytest.mark.parametrize("options", few([[]], [["--json"]]), ids=["table", "json"])
def test_the_command(monkeypatch, capsys, folder, options):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare_fusion, "PREFIX", "Q\n")
    monkeypatch.setattr(compare_fusion, "Engine", lambda model, tokenizer, compile: Engine(model, tokenizer))
    assert compare_fusion.main(["--model", str(folder), "--limit", "2", "--new", "2", *options]) == 0
    out, err = capsys.readouterr()
    if options:
        rows = json.loads(out)
        assert [row["way"] for row in rows] == WAYS
        assert [len(row["answers"]) for row in rows] == [2] * 7
    else:
        lines = out.split("\n")
        assert err == ""
        assert [line.count("|") for line in lines[:9]] == [6] * 9
        assert lines[10].startswith("Right by wording: ")


# ---- the page


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "fusion.md").read_text(), re.DOTALL)


@pytest.mark.weights
@pytest.mark.exhaustive
def test_the_python_of_the_page_runs(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, code = blocks("python")
    exec(code, {})
    assert capsys.readouterr().out.count("Paris") == 2


def test_the_mask_of_the_page_is_the_mask():
    definition, _ = blocks("python")
    names: dict = {}
    exec(definition, names)
    tokens = Tokens.arriving(9)._replace(segment=torch.tensor([[0, 0, 1, 1, 2, 2, 3, -1, -1]]))
    written = masks.Mask(names["may_attend"])
    assert written.dense(tokens, tokens, 1).equal(masks.fused().dense(tokens, tokens, 1))


def test_the_page_has_the_ways_and_shows_the_picture():
    page = (ROOT / "docs" / "fusion.md").read_text()
    assert [name for name in WAYS if f"| {name}" not in page] == []
    assert (ROOT / "docs" / "fused.png").is_file()
    assert "](fused.png)" in page
