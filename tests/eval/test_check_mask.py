"""What `check_mask` finds in masks and score functions: each fault by its code and values, and nothing in good ones."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, few

from llama_flex import Mask, masks, scores
from llama_flex.cache import Cache
from llama_flex.eval import check_mask as check
from llama_flex.eval.check_mask import Finding, check_mask

short = functools.partial(check_mask, lengths=(1, 9), compile=False)
table = torch.ones(200, dtype=torch.bool)  # a global tensor
limit = torch.tensor([4])
segment = torch.zeros(3)


def causal(q, kv):
    return kv.index <= q.index


def codes(findings: list[Finding]) -> set[str]:
    """Return the level and the code of each finding."""
    return {f"{finding.level} {finding.what}" for finding in findings}


def message(findings: list[Finding], expected: str) -> str:
    """Return the message of the only finding, which must have the expected level and code."""
    assert codes(findings) == {expected}
    return findings[0].message


# ---- good masks and score functions

GOOD = {
    "causal": masks.causal(),
    "a predicate": causal,
    "sliding_window": masks.sliding_window(5),
    "sink and window": masks.sink(2) | masks.sliding_window(8),
    "chunked": masks.chunked(4),
    "dilated": masks.dilated(2),
    "document": masks.causal() & masks.document(),
    "global_tokens": masks.global_tokens([0, 3]) & masks.causal() | masks.causal(),
    "shared_prefix": masks.shared_prefix(3),
    "fused": masks.fused(),
    "tree": masks.tree([-1, 0, 0, 1, 1]),
    "a Python bool": Mask(lambda q, kv: True) & masks.causal(),
    "a closure": (lambda limit: lambda q, kv: causal(q, kv) & (q.index - kv.index < limit[0]))(limit),
    "a partial": functools.partial(lambda width, q, kv: causal(q, kv) & (q.index - kv.index < width[0]), limit),
    "a default": lambda q, kv, width=limit: causal(q, kv) & (q.index - kv.index < width[0]),
    "alibi": scores.alibi(4),
    "softcap and bias": scores.softcap(2.0) >> scores.relative_bias(torch.randn(4, 9)),
    "temperature": scores.temperature(torch.linspace(1, 2, 20)),
    "segment_weights": scores.segment_weights(torch.zeros(3)),
    "a row of a table, then a number of it": (
        lambda of: lambda q, kv: causal(q, kv) & ((kv.index >= of[q.index % 2][0]) | (kv.index == q.index))
    )(torch.tensor([[3, 9], [2, 7]])),
    "a product of two rows": (lambda rows: lambda score, q, kv: score + torch.dot(rows[q.index], rows[kv.index]))(
        torch.randn(9, 4)
    ),
    "a score function": lambda score, q, kv: score - 0.1 * (q.index - kv.index),
    "a mask_mod": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
    "finite where it matters": lambda score, q, kv: score + torch.log(q.index - kv.index + 1.0),
    "a score_mod": lambda score, b, h, q_idx, kv_idx: score - (q_idx - kv_idx),
    "no key without itself": Mask(lambda q, kv: q.index != 4) & masks.causal()
    | Mask(lambda q, kv: kv.index == q.index),
    "one width for all rows": masks.sliding_window(torch.tensor([5, 5])),
    "a table": (lambda table: lambda q, kv: table[q.index, kv.index])(torch.ones(9, 9, dtype=torch.bool).tril()),
    "torch.where": lambda q, kv: torch.where(q.index > 3, kv.index <= q.index, kv.index == 0),
    "a Python condition": (lambda width: lambda q, kv: causal(q, kv) if width > 2 else kv.index == 0)(3),
    "a global tensor of an attribute's name": lambda q, kv: causal(q, kv) & (q.segment == kv.segment),
}


FAST = ["causal", "sliding_window"]


@pytest.mark.parametrize("name", few(FAST, [name for name in GOOD if name not in FAST]))
def test_a_good_one_has_no_findings(name):
    lines = []
    assert short(GOOD[name], segments=torch.arange(9) // 4, passed=lines.append) == []
    assert len(lines) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("mask", [masks.bidirectional(), masks.prefix_lm(5)])
def test_named_masks_that_are_not_causal_have_that_note_only(mask):
    assert codes(short(mask)) == {"note not-causal"}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("options", "lengths"), [({"compile": False}, "1, 127, 128, 129, 300"), ({"lengths": (5,)}, "5")]
)
def test_a_good_mask_passes_at_every_length_and_compiled(options, lengths):
    lines = []
    assert check_mask(masks.sink(2) | masks.sliding_window(8), passed=lines.append, **options) == []
    assert lines[0].endswith(f"at lengths [{lengths}]")
    assert ("compiled" in lines[1]) == ("compile" not in options)


# ---- what a mask shows to whom


def test_a_key_that_arrives_later_is_named():
    findings = short(lambda q, kv: (kv.index <= q.index) | (q.index > 2) & (kv.index == q.index + 2))
    assert "query 3 sees key 5" in message(findings, "note not-causal")
    assert "& masks.causal()" in findings[0].message


@pytest.mark.exhaustive
def test_an_offset_of_ones_own_in_a_mask_mod_shows_as_not_causal():
    offset = 3
    text = message(short(lambda b, h, q, kv: q + offset >= kv), "note not-causal")
    assert "query 0 sees key 1," in text
    assert "without an offset" in text


@pytest.mark.exhaustive
def test_the_first_query_without_a_key_is_named():
    text = message(short(Mask(lambda q, kv: q.index != 4) & masks.causal()), "error no-key")
    assert "query 4 sees no key (row 0, head 0, length 9)" in text
    assert "query 0 sees no key" in message(short(lambda q, kv: kv.index < q.index), "error no-key")


def test_looking_at_rows_and_heads_is_noted():
    per_row, per_head = torch.tensor([2, 5]), torch.tensor([2, 3, 5, 9])
    text = message(short(masks.sliding_window(per_row)), "note depends-on-batch")
    assert "row 0 differs for query 2 and key 0 (row 1" in text
    text = message(short(lambda q, kv: causal(q, kv) & (q.index - kv.index < per_head[q.head])), "note depends-on-head")
    assert "depends on the head" in text


# ---- Python control flow on tensors


@pytest.mark.parametrize(
    "predicate",
    [
        lambda q, kv: kv.index <= q.index if q.index > 3 else kv.index == 0,
        lambda q, kv: kv.index <= q.index and kv.index > 3,
        lambda q, kv: kv.index <= q.index or kv.index > 3,
        lambda q, kv: not kv.index > q.index,
        lambda q, kv: 0 <= q.index - kv.index < 5,
        lambda q, kv: kv.index <= int(q.index),
        lambda q, kv: kv.index <= q.index.item(),
        lambda q, kv: kv.index <= max(q.index, kv.index),
    ],
    ids=["if", "and", "or", "not", "chained", "int", "item", "max"],
)
def test_python_that_decides_by_a_tensor_is_found_with_its_line(predicate):
    text, line = message(short(predicate), "error data-dependent"), predicate.__code__.co_firstlineno
    assert f"in line {line} of {Path(__file__).name}, `lambda q, kv:" in text
    assert "torch.where, `&`, `|`, `~`" in text


@pytest.mark.exhaustive
def test_reading_a_captured_tensor_fails_only_when_compiled():
    def predicate(q, kv, width=limit):
        return (kv.index <= q.index) & (q.index - kv.index < int(width))

    assert short(predicate) == []
    assert codes(check_mask(predicate, lengths=(3,))) == {"error data-dependent"}


# ---- answers of the wrong kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda q, kv: (kv.index <= q.index).int(), "torch.int32"),
        (lambda q, kv: torch.where(kv.index <= q.index, 0.0, -torch.inf), "torch.float32"),
        (lambda q, kv: 1, "int"),
        (lambda q, kv: None, "NoneType; a predicate returns booleans, such as kv.index <= q.index; is a `return` miss"),
    ],
)
def test_answers_that_are_no_booleans_are_named(answer, kind):
    for mask in (answer, Mask(answer) & masks.causal()):
        assert f"returned {kind}" in message(short(mask), "error wrong-type")


def test_answers_of_the_wrong_shape_are_named():
    square = torch.ones(9, 9, dtype=torch.bool).tril()
    text = message(short(lambda q, kv: square, lengths=(9,)), "error wrong-shape")
    assert "[9, 9] for one query and one key" in text
    text = message(short(lambda q, kv: square[:3, :3]), "error wrong-shape")
    assert "[3, 3] for one query and one key" in text


def test_an_index_beyond_a_captured_tensor_is_named():
    captured = table[:]
    findings = check_mask(lambda q, kv: captured[kv.index] & (kv.index <= q.index), compile=False)
    assert "index 200 into a tensor of 200 in line" in message(findings, "error index-out-of-range")


def test_an_exception_of_the_function_is_reported_with_its_line():
    def predicate(q, kv):
        raise KeyError("no such document")

    text = message(short(predicate), "error raises")
    assert "KeyError: 'no such document' in line" in text
    assert '`raise KeyError("no such document")`' in text


def test_a_global_tensor_is_noted_and_a_captured_one_is_not():
    text = message(short(Mask(lambda q, kv: table[kv.index]) & masks.causal()), "note global-tensor")
    assert "reads the global tensor table" in text
    captured = table
    assert short(Mask(lambda q, kv: captured[kv.index]) & masks.causal()) == []


# ---- answers that differ between ways to ask


@pytest.mark.parametrize(
    "predicate",
    few(
        [lambda q, kv: causal(q, kv) & ((kv.index < kv.index.max()) | (kv.index == q.index))],
        [lambda q, kv: causal(q, kv) & (q.index - kv.index < kv.index.numel())],
    ),
)
def test_looking_at_more_than_one_cell_is_noted(predicate):
    text = message(short(predicate), "note not-elementwise")
    assert "`.max()`, `.any()` and sizes see only that cell" in text


def test_chance_is_an_error():
    findings = short(lambda q, kv: causal(q, kv) & (torch.rand(kv.index.shape) < 0.5), lengths=(9,))
    assert codes(findings) == {"error not-deterministic"}


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (lambda q, kv: causal(q, kv) & (kv._at < 6), "False, but True in the full forward for query 0 and key 0"),
        # A mask written for plain FlexAttention does this in decoding, where the only row is row 0.
        (lambda q, kv: kv.index <= q._at, "False, but True in the full forward for query 1 and key 1"),
        (lambda score, q, kv: score + 0.1 * kv._at, "in the full forward"),
    ],
)
def test_looking_at_slots_or_rows_of_the_call_differs_in_the_cache(rule, values):
    text = message(short(rule), "error cache-differs")
    assert values in text
    assert "offset" in text


def test_a_function_that_knows_where_it_runs_differs():
    findings = short(lambda q, kv: (kv.index <= q.index) & (kv.index >= torch.compiler.is_compiling()))
    assert "row 0 at query 0" in message(findings, "error eager-differs")


@pytest.mark.parametrize(("query", "expected"), [(None, set()), (4, {"error compiled-differs"})])
def test_compiled_logits_are_compared(query, expected, monkeypatch):
    """A stand-in for a compiler that is wrong in one row; it costs no time."""

    class Graphs:
        def of(self, _):
            def run(name, function, *arguments):
                result = function(*arguments)
                if query is not None and "block" in name and result.shape[1] > query:
                    result[1, query] *= 1 + 1e-2  # the norm that follows would hide one factor alone
                    result[1, query, 0] *= 1 + 1e-2
                return result

            return run

    monkeypatch.setattr(check, "Graphs", Graphs)
    findings = short(masks.causal(), compile=True)
    assert codes(findings) == expected
    assert not findings or "first in row 1 at query 4 (length 9)" in findings[0].message


@pytest.mark.parametrize("wrong", [False, True])
def test_cached_logits_are_compared(wrong, monkeypatch):
    store = Cache.append
    if wrong:  # a cache that overwrites the slot of the token before
        monkeypatch.setattr(Cache, "append", lambda self, tokens: (store(self, tokens) - 1).clamp(min=0))
    assert codes(short(masks.causal())) == ({"error cache-differs"} if wrong else set())


def test_a_compiler_failure_is_reported_with_its_line():
    def predicate(q, kv):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        return kv.index <= q.index

    line = predicate.__code__.co_firstlineno + 2
    assert f"in line {line} of {Path(__file__).name}" in message(short(predicate), "error does-not-compile")


# ---- score functions


@pytest.mark.parametrize(
    ("function", "expected", "words"),
    [
        (lambda s, q, kv: s.abs() / (q.index - kv.index), "error not-finite", "inf for query 0 and key 0"),
        (lambda s, q, kv: s * torch.log(q.index - 3.0), "error not-finite", "becomes nan for query 0 and key"),
        pytest.param(
            lambda s, q, kv: torch.where(q.index - kv.index < 4, s, -torch.inf),
            "note not-finite",
            "a mask hides",
            marks=pytest.mark.exhaustive,
        ),
        (lambda s, q, kv: s.masked_fill(q.index == 5, -torch.inf), "error not-finite", "every score of query 5"),
        (lambda s, q, kv: s > 0, "error wrong-type", "returned torch.bool; a score function must return the score"),
        (lambda s, q, kv: None, "error wrong-type", "returned NoneType"),
        pytest.param(
            lambda s, q, kv: s - s.max(),
            "note not-elementwise",
            "in one call for all cells",
            marks=pytest.mark.exhaustive,
        ),
        (lambda s, q, kv: s if q.index > 3 else s * 2, "error data-dependent", "torch.where"),
        (lambda s, q, kv: s + torch.randn(()), "error not-deterministic", "draws random numbers"),
        (lambda s, q, kv: s + torch.zeros(3), "error wrong-shape", "[3] for one query and one key"),
        pytest.param(
            lambda s, q, kv: s * (1 + torch.compiler.is_compiling()),
            "error eager-differs",
            "eager and dense",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_score_functions(function, expected, words):
    assert words in message(short(function), expected)


# ---- arguments


def test_findings_are_values():
    finding = Finding("note", "not-causal", "query 0 sees key 1")
    assert str(finding) == "note: not-causal: query 0 sees key 1"
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.level = "error"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (3, {}, "int takes none of the known argument lists"),
        (lambda q: True, {}, "takes none of the known argument lists"),
        (causal, {"lengths": ()}, "lengths of at least 1"),
        (causal, {"lengths": (0,)}, "lengths of at least 1"),
        (causal, {"num_heads": 0}, "from 1 to"),
        (causal, {"segments": torch.zeros(9)}, "segments must be 9 integers"),
        (causal, {"segments": torch.arange(8)}, "segments must be 9 integers"),
    ],
)
def test_arguments_that_do_not_fit_are_named(function, options, words):
    with pytest.raises(ValueError, match=words):
        short(function, **options)


def test_torchs_random_state_is_left_alone():
    before = torch.get_rng_state()
    assert short(masks.causal()) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_no_module_of_the_package_imports_the_check():
    package = ROOT / "llama_flex"
    imported = re.compile(r"import check_mask\b|eval\.check_mask|check_mask\(")
    importing = [path for path in package.rglob("*.py") if imported.search(path.read_text())]
    assert {str(path.relative_to(package)) for path in importing} == {"__init__.py", "eval/check_mask.py"}


@pytest.mark.parametrize("length", [1, 7, 9, 10, 127, 300])
def test_pieces_are_whole_and_of_two_sizes(length):
    pieces = check._pieces(length)
    assert [a for a, _ in pieces] + [length] == [0] + [b for _, b in pieces]
    assert len({b - a for a, b in pieces} | {1}) <= 2
