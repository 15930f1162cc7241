"""Processors that fail, grammars that allow nothing, interrupts, and requests that cannot be."""

import sys

import pytest
import torch
from choosing_helpers import NUMBERS, SAMPLINGS, STOP, letters_tokenizer, requests, shifted
from helpers import few
from request_helpers import check_empty, random_ids, random_model

from llama_flex import Engine, Grammar, Sampling
from llama_flex.engine import batch, processing, scheduler
from llama_flex.engine.output import NonFiniteLogitsError
from llama_flex.engine.request import Request
from llama_flex.logits import grammar, processors
from llama_flex.masks.layout import BLOCK

OPTIONS = {"max_new_tokens": 8, "stop_token_ids": [STOP]}


class Refused(Exception):
    """What a processor raises."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine(random_model(), letters_tokenizer(tmp_path_factory.mktemp("letters")), backend="dense")


def at_third(change):
    """Return a processor that fails at the third token after a prompt of 9."""

    def processor(ids, logits):
        return change(logits) if len(ids) == 11 else logits

    return processor


def raising(logits):
    raise Refused("no more")


FAILING = {
    "raises": (Sampling(processors=[at_third(raising)]), Refused, "no more"),
    "NaN": (
        Sampling(processors=[at_third(lambda x: x * torch.nan)]),
        ValueError,
        "a logits processor returned NaN or positive infinity for new token 3",
    ),
    "one NaN": (
        Sampling(
            processors=[at_third(lambda x: x.index_fill(0, torch.tensor([5]), torch.nan))], temperature=1.0, seed=0
        ),
        ValueError,
        "returned NaN",
    ),
    "infinity": (Sampling(processors=[at_third(lambda x: x + torch.inf)]), ValueError, "positive infinity"),
    "nothing": (
        Sampling(processors=[at_third(lambda x: x - torch.inf)], temperature=1.0, top_p=0.5, seed=0),
        ValueError,
        "no token is left to sample as new token 3: all are ruled out by its logits processors",
    ),
    "shape": (Sampling(processors=[at_third(lambda x: x[1:])]), ValueError, r"must return logits.*\[159\]"),
    "grammar": (
        Sampling(grammar=Grammar.regex("1é"), min_new_tokens=3, banned_tokens=[0]),
        ValueError,
        "the grammar allows no token after",
    ),
    "finished": (
        Sampling(grammar=Grammar.regex("1!"), min_new_tokens=3),
        ValueError,
        "as new token 3: all are ruled out by grammar with min_new_tokens",
    ),
    "all banned": (
        Sampling(banned_tokens=range(160), temperature=0.5),
        ValueError,
        "token 1: all are ruled out by banned_tokens",
    ),
}


def collect(stream, found):
    for step in stream:
        found[step.row].append(step.token)


@pytest.mark.parametrize("name", FAILING)
def test_a_request_that_fails_ends_alone(engine, name):
    failing, kind, said = FAILING[name]
    other = SAMPLINGS["functions"]
    (expected,) = engine.generate([random_ids(20)], sampling=other, **OPTIONS)
    request, beside = (
        engine.submit(ids, sampling=s, **OPTIONS) for ids, s in ((random_ids(9), failing), (random_ids(20), other))
    )
    engine.run()
    assert request.finish_reason == "error"
    assert beside.completion.tokens == expected.tokens
    with pytest.raises(kind, match=said):
        raise request.error
    check_empty(engine)
    found = {0: [], 1: []}
    stream = engine.stream([random_ids(9), random_ids(20)], sampling=[failing, other], **OPTIONS)
    with pytest.raises(kind, match=said):
        collect(stream, found)
    assert found[1] == expected.tokens
    assert found[0] == [step.token for step in request.steps]


def test_logits_of_the_model_that_are_nan_are_found_before_any_processor():
    model = random_model()
    with torch.no_grad():
        model.embed.weight[random_ids(9)[0]] = torch.nan
    engine = Engine(model, backend="dense")
    repair = Sampling(processors=[lambda ids, logits: torch.zeros_like(logits)])
    request = engine.submit(random_ids(9), sampling=repair, **OPTIONS)
    engine.run()
    assert isinstance(request.error, NonFiniteLogitsError)
    with pytest.raises(NonFiniteLogitsError):
        engine.generate([random_ids(9)], sampling=repair, **OPTIONS)


@pytest.mark.parametrize("around", [(), (batch, scheduler)])
@pytest.mark.parametrize("every", few([41], [7, 13, 331]))
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.usefixtures("read_later")
def test_ctrl_c_at_any_line_of_the_processing_changes_no_token(engine, every, around, ahead):
    """Interrupt every so many lines, of the code around it, too."""
    files = {part.__file__ for part in (processing, processors, grammar, *around)} | {__file__}
    asked = [(p, o) for p, o in requests() if o["sampling"].needs_host]
    expected = [engine.generate([prompt], **options)[0].tokens for prompt, options in asked]
    engine = Engine(engine.model, engine.tokenizer, backend="dense", max_batch_size=8, max_slots=60 * BLOCK)
    engine.scheduler._ahead = ahead
    submitted = [engine.submit(prompt, **options) for prompt, options in asked]
    lines = interrupts = 0

    def trace(frame, event, arg):
        nonlocal lines, interrupts
        # In `step`, a trace would raise it where a `with` block is left, too, which Python does not.
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "step":
            return None
        if event == "line" and frame.f_code.co_filename != __file__:
            lines += 1
            if lines % every == 0 and interrupts < 40:
                interrupts += 1
                raise KeyboardInterrupt
        return trace

    while not engine.scheduler.idle:
        sys.settrace(trace)
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
    assert interrupts > 10
    assert [[step.token for step in request.steps] for request in submitted] == expected
    check_empty(engine)


@pytest.mark.parametrize(
    ("sampling", "options", "said"),
    [
        (Sampling(logit_bias={160: 1.0}), {}, "logit_bias has token id 160, which is outside the vocabulary of 160"),
        (Sampling(banned_tokens=[-1]), {}, "banned_tokens has token id -1"),
        (Sampling(top_logprobs=161), {}, "top_logprobs 161 exceeds the vocabulary of 160"),
        (Sampling(min_new_tokens=9), {}, "min_new_tokens 9 exceeds the 8 new tokens"),
        (Sampling(grammar=NUMBERS), {"stop_token_ids": ()}, "a grammar needs stop tokens"),
    ],
)
def test_what_a_request_cannot_have_is_refused_before_any_work(engine, sampling, options, said):
    for run in (lambda **o: engine.generate([[5]], **o), lambda **o: engine.submit([5], **o)):
        with pytest.raises(ValueError, match=said):
            run(sampling=sampling, **OPTIONS | options)
    assert engine.scheduler.idle


def test_a_grammar_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"a grammar needs a tokenizer: Engine\(model, tokenizer\)"):
        Engine(random_model()).submit([5], sampling=Sampling(grammar=NUMBERS), **OPTIONS)


def test_grammar_texts_end_by_a_stop_token_where_they_may(engine):
    found = engine.generate(
        [random_ids(n) for n in (3, 9, 20)],
        sampling=[Sampling(grammar=Grammar.regex(r"[0-9]{3}!"), temperature=1.0, seed=n) for n in range(3)],
        **OPTIONS,
    )
    for done in found:
        assert done.finish_reason == "stop"
        assert done.text[:3].isdigit()
        assert done.text[3:] == "!"
        assert done.tokens[-1] == STOP


def test_functions_are_called_once_a_token_with_what_came_before(engine):
    seen = []

    def note(ids, logits):
        seen.append(list(ids))
        ids.clear()  # theirs to keep
        return shifted(seen[-1], logits)

    request: Request = engine.submit(random_ids(9), sampling=Sampling(processors=[note]), **OPTIONS)
    engine.run()
    new = [step.token for step in request.steps]
    assert seen == [[*random_ids(9), *new[:n]] for n in range(len(new))]
