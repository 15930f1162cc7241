"""What the tests of choosing tokens share: requests of every kind, and what they choose by transformers' processors."""

import re
from pathlib import Path

import tokenizers
import torch
from request_helpers import random_ids
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from llama_flex import Engine, Ensemble, Grammar, Llama, Sampling, Tokenizer, fuse, masks
from llama_flex.engine.fusion import AnyPrompt

STOP = 2
VOCAB = 160
LETTERS = [chr(n) for n in range(33, 127)]
NUMBERS = Grammar.regex(r"[0-9]{2,4}(-[0-9]{2,4})*\.")


def letters_tokenizer(folder: Path) -> Tokenizer:
    """Make a tokenizer for the vocabulary of `random_model`: three special tokens, the letters of ASCII, and pairs."""
    pairs = [f"{a}{b}" for a in "0123456789" for b in "01234567"][: VOCAB - 3 - len(LETTERS)]
    pieces = {piece: n for n, piece in enumerate(["<unk>", "<s>", "</s>", *LETTERS, *pairs])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [(p[0], p[1]) for p in pairs]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


def shifted(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Return logits that depend on the last token and on the number of tokens."""
    return logits.roll(ids[-1] + len(ids))


def no_even(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[::2] = -torch.inf
    return logits


LIKED = dict.fromkeys((20, 30, 40, 50), 5.0)  # so that tokens come again
# Every way to choose, each different from the plain one.
SAMPLINGS = {
    "plain": Sampling(),
    "bias": Sampling(logit_bias={7: 6.0, 8: 12.0, 9: -3.0}, banned_tokens=[8, 64, 78]),
    "penalties": Sampling(logit_bias=LIKED, presence_penalty=1.5, frequency_penalty=2.0, repetition_penalty=1.1),
    "rewards": Sampling(presence_penalty=-2.0, frequency_penalty=-1.0, temperature=0.7, seed=4),
    "typical": Sampling(temperature=1.2, typical_p=0.6, seed=3, top_logprobs=2),
    "late": Sampling(min_new_tokens=9, logit_bias={STOP: 50.0}, top_logprobs=5),
    "ngrams": Sampling(no_repeat_ngram_size=1, logit_bias={5: 8.0, 6: 7.0}),
    "function": Sampling(processors=[shifted]),
    "functions": Sampling(processors=[shifted, no_even], temperature=0.8, top_p=0.9, seed=2, repetition_penalty=1.3),
    "grammar": Sampling(grammar=NUMBERS, temperature=1.0, seed=8, top_logprobs=1),
    "grammar and more": Sampling(grammar=NUMBERS, no_repeat_ngram_size=2, frequency_penalty=1.0, banned_tokens=[20]),
}


def requests() -> list[tuple[AnyPrompt, dict]]:
    """Return prompts of several lengths and kinds with options, at least one for each of SAMPLINGS."""
    prompts: list[AnyPrompt] = [random_ids(n, n % 3) for n in (3, 140, 20, 33, 128, 1, 9, 257, 17, 61, 5)]
    found = [
        (prompt, {"sampling": sampling, "max_new_tokens": 14, "stop_token_ids": [STOP]})
        for prompt, sampling in zip(prompts, SAMPLINGS.values(), strict=True)
    ]
    ensemble, fused = Ensemble([prompts[2], prompts[3]], "max"), fuse([prompts[2], prompts[3]], positions="parallel")
    window = {"mask": masks.sliding_window(30)}
    found += [
        (ensemble, found[-4][1] | {"sampling": SAMPLINGS["functions"]}),
        (ensemble, found[-4][1] | {"sampling": SAMPLINGS["penalties"]}),
        (fused, found[-4][1] | {"sampling": SAMPLINGS["grammar"]}),
        (prompts[1], found[-4][1] | window | {"sampling": SAMPLINGS["functions"]}),
        (prompts[3], found[-4][1] | window | {"sampling": SAMPLINGS["bias"]}),
    ]
    return found


def by_transformers(model: Llama, prompt: list[int], new: int, s: Sampling) -> list[int]:
    """Choose tokens greedily by transformers' processors in its order, from logits without a cache."""
    chain = LogitsProcessorList()
    if s.logit_bias:
        chain.append(SequenceBiasLogitsProcessor([[[id], float(value)] for id, value in s.logit_bias.items()]))
    if s.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.no_repeat_ngram_size:
        chain.append(NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size))
    if s.min_new_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), s.min_new_tokens, STOP))
    if s.banned_tokens:
        chain.append(SuppressTokensLogitsProcessor(list(s.banned_tokens)))
    ids = list(prompt)
    while len(ids) < len(prompt) + new:
        logits = chain(torch.tensor([ids]), model(torch.tensor([ids]), backend="dense")[:, -1].double())
        for function in s.processors:
            logits = function(ids, logits[0])[None]
        counts = torch.bincount(torch.tensor(ids[len(prompt) :], dtype=torch.int64), minlength=VOCAB)
        logits = logits - s.frequency_penalty * counts - s.presence_penalty * (counts > 0)
        ids.append(int(logits.argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


def conforms(engine: Engine, prompt: list[int], tokens: list[int]) -> bool:
    """Return whether a text is made of NUMBERS, or the beginning of one that was cut."""

    text = engine.tokenizer.decode([*prompt[:1], *tokens], skip_special_tokens=False)[1:].removesuffix("</s>")
    whole = re.fullmatch(r"[0-9]{2,4}(-[0-9]{2,4})*\.", text)
    return whole is not None if tokens[-1] == STOP else re.fullmatch(r"[0-9.-]*", text) is not None


def in_turn(a: int, b: int, c: int) -> list:
    """Return the events of three steps that run ahead: each forward is enqueued before the token before is delivered,
    and each draw comes after that."""
    return [
        "forward",
        ("draw", []),
        "forward",
        ("token", a),
        ("draw", [a]),
        "forward",
        ("token", b),
        ("draw", [a, b]),
        ("token", c),
    ]
