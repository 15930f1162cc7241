"""What the tests of submitted requests share: a tiny model, and prompts with the tokens that each gives alone."""

import random
from dataclasses import dataclass

import torch

from llama_flex import Engine, Llama, LlamaConfig
from llama_flex.engine.fusion import AnyPrompt, as_ensemble
from llama_flex.engine.request import Request
from llama_flex.masks.layout import BLOCK

NEW = {"max_new_tokens": 6, "stop_token_ids": ()}


class Refused(Exception):
    """What callbacks raise."""


@dataclass
class Case:
    """A prompt, the options of its request, and the tokens that it gives alone."""

    prompt: AnyPrompt
    options: dict
    expected: list[int]

    @property
    def rows(self) -> int:
        """How many batch slots it needs."""
        return len(as_ensemble(self.prompt).prompts)

    @property
    def pages(self) -> int:
        """How many pages it needs in the end."""
        new = self.options["max_new_tokens"]
        return sum(-(-(len(p.ids) + new) // BLOCK) for p in as_ensemble(self.prompt).prompts)


def make_case(engine: Engine, prompt: AnyPrompt, **options) -> Case:
    """Generate from a prompt in an engine that has nothing else to do."""
    return Case(prompt, options, tokens_alone(engine, prompt, **options))


def tokens_alone(engine: Engine, prompt: AnyPrompt, **options) -> list[int]:
    """Return what a prompt gives in an engine that has nothing else to do."""
    (completion,) = engine.generate([prompt], **options)
    return completion.tokens


def tokens_of(request: Request) -> list[int]:
    """Return the tokens that a request has given so far."""
    return [step.token for step in request.steps]


def submit_and_run(engine: Engine, prompt: AnyPrompt, **options) -> list[int]:
    """Submit a prompt, run the engine until it is idle, and return the prompt's new tokens."""
    request = engine.submit(prompt, stop_token_ids=(), **options)
    engine.run()
    return tokens_of(request)


def random_ids(length: int, seed: int = 0) -> list[int]:
    """Return ids of the vocabulary of `random_model`, others for every length and seed."""
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, 160) for _ in range(length)]


def random_model() -> Llama:
    """Make a two-layer random model with grouped queries; every call gives the same weights."""
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = Llama(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def new_engine(like: Engine, *arguments, **options) -> Engine:
    """Make an engine of the same model and backend of attention, which nothing was submitted to yet."""
    return Engine(like.model, *arguments, backend=like.runner.backend, **options)


def check_empty(engine: Engine) -> None:
    """Check that an idle engine has all of its pages and batch slots back."""
    scheduler = engine.scheduler
    assert scheduler.idle
    assert scheduler.block_manager.available == scheduler.block_manager.num_pages
    assert not any(scheduler.block_manager.ref_counts)
    assert sorted(scheduler._free_batch_slots) == list(range(scheduler.max_batch_size))
