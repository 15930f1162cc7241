"""Streamed text joins to the decoded text; stop strings are found wherever the text is cut."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_helpers import (
    CORPUS,
    JSON_NAMES,
    LARGE,
    METASPACE,
    MODEL_NAMES,
    assert_comes_at_the_end,
    cases,
    reference,
    write_folder,
)

from llama_flex.engine.output import OutputProcessor
from llama_flex.text.detokenizer import StopStrings
from llama_flex.tokenizer import Tokenizer

# --- streaming ---


def assert_streams(tokenizer: Tokenizer, ids: list[int], skip: bool, cut: int) -> None:
    """Check that the stream of ids, and that of the ids after a prompt of `cut`, give the text of the whole."""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    stream = tokenizer.stream(skip_special_tokens=skip)
    assert "".join(map(stream.put, ids)) + stream.flush() == whole
    prompt = tokenizer.decode(ids[:cut], skip_special_tokens=skip)
    stream = tokenizer.stream(ids[:cut], skip_special_tokens=skip)
    rest = "".join(map(stream.put, ids[cut:])) + stream.flush()
    if whole.startswith(prompt):
        assert prompt + rest == whole


@cases(*JSON_NAMES, *MODEL_NAMES, exhaustive=LARGE)
def test_stream_gives_the_text_of_the_whole(tokenizer_folders, name):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
    pieces = {id: tokenizer.token(id) for id in range(tokenizer.vocab_size)}
    # Bytes, spaces, special tokens and U+FFFD are hard cases, and are drawn far more often than others.
    awkward = [id for id, piece in pieces.items() if len(piece) == 1 or piece.startswith(("<0x", "▁", "Ġ", "ï¿½"))]
    awkward = awkward[:700] + sorted(tokenizer.special_ids)[:20]
    id_lists = st.lists(st.one_of(st.sampled_from(awkward), st.sampled_from(sorted(pieces))), max_size=24)

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(ids=id_lists, skip=st.booleans(), cut=st.integers(0, 24))
    def check(ids, skip, cut):
        assert_streams(tokenizer, ids, skip, cut)

    check()
    for text in CORPUS:
        for skip in (True, False):
            assert_streams(tokenizer, tokenizer.encode(text), skip, 2)


@cases(*JSON_NAMES, *MODEL_NAMES, exhaustive=LARGE)
def test_stream_never_shows_half_a_character(tokenizer_folders, name):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
    for text in CORPUS:
        if "\ufffd" not in text:
            stream = tokenizer.stream()
            assert not any("\ufffd" in stream.put(id) for id in tokenizer.encode(text))


def test_stream_of_byte_pieces_waits_for_the_run_to_end(tokenizer_folders):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders["tiny_model"])
    first = 3  # <0x00>
    assert tokenizer.token(first) == "<0x00>"
    stream = tokenizer.stream()
    assert [stream.put(first + byte) for byte in "你".encode()] == ["", "", ""]
    assert stream.put(first + 0xFF) == ""
    assert stream.flush() == tokenizer.decode([first + byte for byte in ("你".encode() + b"\xff")]) == "\ufffd" * 4


def test_stream_continues_a_prompt(tokenizer_folders):
    for name in ("converted", "tiny_model"):
        tokenizer = Tokenizer.from_pretrained(tokenizer_folders[name])
        ids = tokenizer.encode("Hello world")
        cut = next(n for n, id in enumerate(ids) if n > 1 and tokenizer.token(id).startswith("▁"))
        stream = tokenizer.stream(ids[:cut])
        assert ("".join(map(stream.put, ids[cut:])) + stream.flush())[0] == " "
        stream = tokenizer.stream()
        assert ("".join(map(stream.put, ids[cut:])) + stream.flush())[0] != " "
        line = tokenizer.encode("a\n")
        newline = [id for id in line if tokenizer.token(id) == "<0x0A>"] or line[-1:]
        stream = tokenizer.stream([*ids, *newline])
        assert stream.put(ids[-1]) + stream.flush() == tokenizer.token(ids[-1]).replace("▁", " ")


def test_stream_takes_time_in_proportion(tokenizer_folders):
    def seconds(count: int) -> float:
        stream = Tokenizer.from_pretrained(tokenizer_folders["tiny_model"]).stream()
        start = time.perf_counter()
        for n in range(count):
            stream.put(3 + n % 256)
        stream.flush()
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(64_000) < 40 * seconds(4_000) + 0.05


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "Fuse"}]},
        METASPACE,
        {"type": "Sequence", "decoders": [METASPACE, {"type": "Fuse"}]},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, METASPACE]},
    ],
)
def test_text_of_a_decoder_that_does_not_stream_comes_at_the_end(tokenizer_folders, tmp_path, decoder):
    file = json.loads((tokenizer_folders["converted"] / "tokenizer.json").read_text())
    folder = write_folder(tmp_path, {}, tokenizer__json=json.dumps({**file, "decoder": decoder}))
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("Hello world, and you?", add_special_tokens=False)
    assert tokenizer.decode(ids) == reference(folder).decode(ids, skip_special_tokens=True)
    assert_comes_at_the_end(tokenizer, ids)
    stop = tokenizer.decode(ids)[-3:]
    processor = OutputProcessor(0, tokenizer, ids[:1], [stop], [], 99)
    steps = [processor.put(id, 0.0) for id in ids[1:]]
    stopped = [step.finish_reason for step in steps].index("stop")
    whole = tokenizer.decode(ids)
    assert stop in tokenizer.decode(ids[: stopped + 2])
    assert stop not in tokenizer.decode(ids[: stopped + 1])
    text = "".join(step.text for step in steps[: stopped + 1])
    assert whole[: whole.index(stop)].endswith(text)
    assert len(text) > 5


def test_without_a_decoder_pieces_are_words(tokenizer_folders, tmp_path):
    file = json.loads((tokenizer_folders["converted"] / "tokenizer.json").read_text())
    folder = write_folder(tmp_path, {}, tokenizer__json=json.dumps({**file, "decoder": None}))
    assert_streams(Tokenizer.from_pretrained(folder), [300, 301, 302], True, 1)


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 1}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]},
        STRIP,
        METASPACE,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        None,
    ],
)
def test_no_ids_are_no_text_whatever_the_decoder(tokenizer_folders, tmp_path, decoder, capfd):
    """Check decoders of which `tokenizers` 0.23 panics: a "Strip" with a `stop` that is given an empty text."""
    file = json.loads((tokenizer_folders["converted"] / "tokenizer.json").read_text())
    folder = write_folder(tmp_path, {"bos_token": "<s>"}, tokenizer__json=json.dumps({**file, "decoder": decoder}))
    tokenizer = Tokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token_id
    for ids in ([], [bos], [bos, bos], ()):
        assert tokenizer.decode(ids) == ""
        assert tokenizer.stream(ids).flush() == ""
    assert tokenizer.decode([], skip_special_tokens=False) == ""
    ids = [id for id in tokenizer.encode("Hello, you") if tokenizer.token(id) != "▁"]  # "Strip" panics on it, too
    assert tokenizer.decode(ids) == reference(folder).decode(ids, skip_special_tokens=True)
    stream = tokenizer.stream([bos])
    assert "".join(map(stream.put, ids[1:])) + stream.flush() == tokenizer.decode(ids)
    processor = OutputProcessor(0, tokenizer, [bos], ["###"], [], len(ids))
    steps = [processor.put(id, 0.0) for id in [bos, *ids[1:]]]
    assert "".join(step.text for step in steps) == tokenizer.decode(ids)
    assert capfd.readouterr().err == ""


# --- stop strings ---


def stopped(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    """Return the text that comes of chunks, and whether a stop string ended it."""
    finder, out = StopStrings(stops), ""
    for chunk in chunks:
        text, found = finder.put(chunk)
        out += text
        if found:
            assert finder.put("more") == ("", True)
            return out + finder.flush(), True
    return out + finder.flush(), False


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    chunks=st.lists(st.text("ab\n", max_size=5), max_size=8),
)
def test_stop_strings_wherever_the_text_is_cut(stops, chunks):
    text = "".join(chunks)
    expected = (text, False)
    for end in range(len(text) + 1):
        if matches := [stop for stop in stops if text[:end].endswith(stop)]:
            expected = (text[: end - max(map(len, matches))], True)
            break
    assert stopped(stops, chunks) == stopped(stops, list(text)) == expected


def test_stop_strings_hold_back_only_what_may_be_one():
    finder = StopStrings(["</tool>", "\n\nUser:"])
    assert finder.put("Hi there\n") == ("Hi there", False)
    assert finder.put("\nUse") == ("", False)
    assert finder.put("ful") == ("\n\nUseful", False)
    assert finder.put("</to") == ("", False)
    assert finder.flush() == "</to"
    for wrong in ("stop", [""], ["a", ""]):
        with pytest.raises(ValueError, match="stop string"):
            StopStrings(wrong)
