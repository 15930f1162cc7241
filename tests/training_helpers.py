"""Gradients of our models and of transformers', by parameter, and how they are compared."""

import copy

import torch
from helpers import random_batch
from torch.nn.functional import cross_entropy

from llama_flex import Llama
from llama_flex.weights import named_weights


def loss_of(logits, ids) -> torch.Tensor:
    """Return the mean loss of the next tokens."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model: Llama, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters, by Hugging Face's names."""
    of = dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, [*model.parameters()]),
            strict=True,
        )
    )
    twin = copy.deepcopy(model).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        parameter.copy_(of[name])
    return {name: tensor.clone() for name, tensor in named_weights(twin, twin.config).items()}


def reference_gradients(reference, ids, kind: str) -> dict[str, torch.Tensor]:
    """Return the gradients of transformers' model with one kind of attention."""
    reference.set_attn_implementation(kind)
    reference.zero_grad()
    loss_of(reference(ids).logits, ids).backward()
    reference.set_attn_implementation("eager")
    return {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare_in_bfloat16(pair, device: str, backend: str) -> None:
    """Check that gradients are no further from those in float64 than the reference's, in the mean over parameters."""
    reference, model = (copy.deepcopy(x).to(device, torch.bfloat16) for x in pair)
    # `to` rounds the reference's RoPE frequencies, which its `from_pretrained` does not.
    reference.model.rotary_emb.inv_freq = pair[0].model.rotary_emb.inv_freq.to(device)
    model.requires_grad_()
    ids = random_batch(model, 300).to(device)
    exact = reference_gradients(copy.deepcopy(reference).double(), ids, "eager")

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(((found[key] - exact[key]).abs().mean() / exact[key].abs().mean()).item() for key in exact)

    budget = error(reference_gradients(reference, ids, "sdpa"))
    assert error(gradients(model, loss_of(model(ids, backend=backend), ids))) <= budget
    # The mutation: rounded frequencies.
    model.rotary.inv_freq.copy_(model.rotary.inv_freq.bfloat16())
    assert error(gradients(model, loss_of(model(ids, backend=backend), ids))) > budget
