"""The text of an answer ends before a stop string, whatever the tokenizer and the prompt."""

import json
import random

import pytest
from tokenizer_helpers import METASPACE, write_folder

from llama_flex.engine.output import OutputProcessor
from llama_flex.tokenizer import Tokenizer


def test_a_stop_string_of_byte_pieces_is_found_at_once(tokenizer_folders):
    """Check a run of byte pieces: its text waits for the end of the run, a stop string in it does not."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_folders["tiny_model"])
    newline, letter = 3 + 0x0A, 3 + ord("a")
    processor = OutputProcessor(0, tokenizer, tokenizer.encode("x"), ["\n\n"], [], 99)
    steps = [processor.put(id, 0.0) for id in (letter, newline, newline)]
    assert [step.finish_reason for step in steps] == [None, None, "stop"]
    assert "".join(step.text for step in steps) == "a"


def until_stopped(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stops: list[str]) -> tuple[int, str]:
    """Return the number of tokens up to a stop string and the visible text before it, decoding everything again for
    each token."""
    start = len(tokenizer.decode(prompt, skip_special_tokens=False))
    ends = [start]
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode([*prompt, *ids[:n]], skip_special_tokens=False)
        ends.append(len(text))
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
        if found or n == len(ids):
            visible = tokenizer.decode([*prompt, *ids[:n]])[len(tokenizer.decode(prompt)) :]
            cut = min(found)[1] if found else len(text)
            spans = zip(ids, ends, ends[1:], strict=False)
            after = sum(max(0, b - max(a, cut)) for id, a, b in spans if id not in tokenizer.special_ids)
            return n, visible[: max(0, len(visible) - after)]
    raise AssertionError


@pytest.mark.parametrize("prompt", ["", "Hello"])
@pytest.mark.parametrize("kind", ["byte_level", "converted", "tiny_model", "no decoder", "comes at the end"])
def test_the_text_ends_before_a_stop_string_whatever_the_prompt_shows(tokenizer_folders, tmp_path, kind, prompt):
    """Check random ids and stop strings. The text that is searched has the special tokens in it, so it may begin with
    other white space than the visible text, and come in other pieces."""
    folder = tokenizer_folders.get(kind)
    if folder is None:
        file = json.loads((tokenizer_folders["converted"] / "tokenizer.json").read_text())
        metaspace = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, METASPACE]}
        decoder = None if kind == "no decoder" else metaspace
        folder = write_folder(tmp_path, {}, tokenizer__json=json.dumps({**file, "decoder": decoder}))
    tokenizer = Tokenizer.from_pretrained(folder)
    before = tokenizer.encode(prompt) or [*tokenizer.special_ids][:1]
    words = tokenizer.encode("Hello world, you and you", add_special_tokens=False)
    alphabet = [*words, *sorted(tokenizer.special_ids)]
    parts = [tokenizer.decode([id], skip_special_tokens=False) or "x" for id in alphabet] + list("Helo w,\n<>")
    rng = random.Random(0)
    for _ in range(400):
        ids = rng.choices(alphabet, k=rng.randint(1, 9))
        stops = ["".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
        processor, steps = OutputProcessor(0, tokenizer, before, stops, [], len(ids)), []
        while not steps or steps[-1].finish_reason is None:
            steps.append(processor.put(ids[len(steps)], 0.0))
        text = "".join(step.text for step in steps)
        assert (len(steps), text) == until_stopped(tokenizer, before, ids, stops), (ids, stops)
