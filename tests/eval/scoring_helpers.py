"""What the tests of scores share: the log-probabilities of transformers."""

import torch


@torch.no_grad()
def reference_logprobs(reference, ids: list[int], kind: str = "eager") -> torch.Tensor:
    """Return transformers' log-probability of each token but the first, `[N - 1]`, in float64 from float32 logits."""
    reference.set_attn_implementation(kind)
    logits = reference(torch.tensor([ids])).logits[0, :-1].double()
    reference.set_attn_implementation("eager")
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
