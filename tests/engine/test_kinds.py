"""Kinds of sampling: those of several requests together, and how many graphs they ask for."""

import itertools

import pytest

from llama_flex import Sampling
from llama_flex.engine.kinds import Kinds, compiled_for, union


def keep(ids, logits):
    return logits


def of(**parameters) -> Kinds:
    return Kinds.of(Sampling(**parameters), several=False)


PLAIN, RANDOM = of(), of(temperature=1.0, top_p=0.9)
RARE = [
    of(logit_bias={1: 2.0}),
    of(presence_penalty=1.0, repetition_penalty=1.1),
    of(min_new_tokens=3, top_logprobs=5),
    of(temperature=1.0, typical_p=0.5),
]


def test_kinds_of_several_requests_are_what_any_of_them_needs():
    together = union([PLAIN, of(top_logprobs=5), of(top_logprobs=2, banned_tokens=[1]), of(temperature=0.0, top_p=0.5)])
    assert together == PLAIN._replace(top=8, bias=True)
    assert union([RANDOM, RANDOM]) == RANDOM
    assert of(processors=[keep]).split
    assert of(no_repeat_ngram_size=2).split


@pytest.mark.parametrize("limit", [len(RARE) + 1])
def test_rare_kinds_share_graphs_and_common_ones_never_pay_for_them(limit):
    known, everything = set(), union(RARE)
    for n in range(1, len(RARE) + 1):
        assert compiled_for(union(RARE[:n]), known) == union(RARE[:n])
    for chosen in itertools.chain.from_iterable(itertools.combinations(RARE, n) for n in range(1, len(RARE) + 1)):
        found = compiled_for(union(chosen), known)
        assert found.covers(union(chosen))
        assert everything.covers(found)
    assert len(known) < limit
    for kinds in (PLAIN, RANDOM, of(repetition_penalty=1.2)):
        assert compiled_for(kinds, known) == kinds


def test_a_step_that_needs_no_host_never_runs_as_one_that_does():
    known = {of(logit_bias={1: 2.0}, presence_penalty=1.0, processors=[keep])}
    assert compiled_for(RARE[0], known) == RARE[0]
    assert compiled_for(of(logit_bias={1: 2.0}, processors=[keep]), known) in known - {RARE[0]}
