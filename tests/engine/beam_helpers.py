"""What the tests of beam search share: beam search by its definition, transformers' own, and how to compare them."""

import copy
import itertools
from collections.abc import Callable, Iterable

import torch

from llama_flex import Llama, Prompt
from llama_flex.engine.output import ScoredCompletion


def by_definition(
    model: Llama,
    prompts: list,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    repetition_penalty: float = 1.0,
    stop_token_ids: Iterable[int] = (),
    ends: Callable[[list[int]], bool] = lambda tokens: False,
    **options,
) -> list[list[tuple[float, list[int]]]]:
    """Search each prompt for itself, with a full forward in float64 of every hypothesis at every step, in the row that
    the prompt has; return its best texts with their scores. ends: whether some new tokens end a text."""
    model = copy.deepcopy(model).double()
    found = []
    for number, prompt in enumerate(prompts):
        prompt = prompt if isinstance(prompt, Prompt) else Prompt.plain(prompt)
        running, finished = [(0.0, [])], []
        for length in range(1, max_new_tokens + 1):
            each = []
            for score, tokens in running:
                after = next_logprobs(model, prompt, tokens, number, len(prompts), options)
                seen = list({*prompt.ids, *tokens})
                after[seen] *= repetition_penalty
                best, ids = after.topk(min(40, len(after)))
                each += [(score + lp, [*tokens, id]) for lp, id in zip(best.tolist(), ids.tolist(), strict=True)]
            each.sort(reverse=True)
            ending = [length == max_new_tokens or t[-1] in set(stop_token_ids) or ends(t) for _, t in each]
            running = [one for one, end in zip(each, ending, strict=True) if not end][:num_beams]
            finished += [
                (score / length**length_penalty, tokens)
                for (score, tokens), end in itertools.islice(zip(each, ending, strict=True), num_beams)
                if end
            ]
            finished = sorted(finished, reverse=True)[:num_beams]
            longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            full = len(finished) == num_beams
            if not running or (full and early_stopping is True):
                break
            if full and running[0][0] / longest**length_penalty <= finished[-1][0]:
                break
        found.append(finished[:num_return_sequences])
    return found


def next_logprobs(model: Llama, prompt: Prompt, new: list[int], row: int, rows: int, options: dict) -> torch.Tensor:
    """Return the log-probabilities of the token after a prompt and new tokens, `[V]`, from a forward of them all."""
    after = range(prompt.generated_position, prompt.generated_position + len(new))
    ids, positions, segments = (
        torch.tensor([each]).expand(rows, -1)
        for each in (
            [*prompt.ids, *new],
            [*prompt.positions, *after],
            [*prompt.segments, *[prompt.generated_segment] * len(new)],
        )
    )
    with torch.no_grad():
        logits = model(ids, positions=positions, segments=segments, backend="dense", logits_to_keep=1, **options)
    return logits[row, 0].log_softmax(-1)


def reference_beams(reference, prompts: list[list[int]], eos: list[int], **options) -> list[list]:
    """Return the scores and tokens that transformers finds, in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = reference.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    lengths = (found.beam_indices >= 0).sum(1).tolist()
    tokens = [row[width : width + length].tolist() for row, length in zip(found.sequences, lengths, strict=True)]
    each = list(zip(found.sequences_scores.tolist(), tokens, strict=True))
    count = len(each) // len(prompts)
    return [each[start : start + count] for start in range(0, len(each), count)]


def differ(found: list[list[ScoredCompletion]], expected: list[list]) -> bool:
    """Return whether the texts differ in number, order or tokens, or their scores by more than rounding."""
    ours = [[done.tokens for done in each] for each in found]
    if ours != [[tokens for _, tokens in each] for each in expected]:
        return True
    one, other = (torch.tensor(x) for x in ([d.score for e in found for d in e], [s for e in expected for s, _ in e]))
    return not torch.allclose(one, other, rtol=1e-5, atol=2e-5)
