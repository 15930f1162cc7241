"""What the tests of generation share: the tokens of transformers, completions compared, and a model whose text is
known."""

from pathlib import Path

import tokenizers
import torch

from llama_flex import Completion, GenerationConfig, Llama, LlamaConfig, Tokenizer


def reference_tokens(reference, prompt: list[int], new: int, **options) -> list[int]:
    """Return the tokens that transformers generates greedily."""
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


def assert_same(one: Completion, other: Completion) -> None:
    """Check that two completions are the same, log-probabilities up to rounding."""
    assert one.tokens == other.tokens
    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-5, rtol=2e-5)


# A model whose text is known: each token is followed by the next piece of this list, the last piece by the first.

PIECES = ["<unk>", "<s>", "</s>", "One", "Ġtwo", "Ġthree", "Ġc", "af", "Ã", "©", "!", "Ġstop", "Ġhere", "<end>"]
ONE, TWO, THREE, CAFE_C, CAFE_AF, E1, E2, BANG, STOP, HERE, END = range(3, len(PIECES))


def save_pieces_tokenizer(folder: Path) -> Tokenizer:
    """Write the tokenizer of PIECES to a folder, and load it from there."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(PIECES)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<end>"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


def successor_model(
    eos: int | tuple[int, ...] | None = 2, generation: GenerationConfig | None = None, context: int = 200
) -> Llama:
    """Make a LLaMA that predicts token n + 1 after token n (after the last: <unk>), by its weights alone."""
    size = len(PIECES)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        eos_token_id=eos,
    )
    model = Llama(config, generation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        model.embed.weight[:, :size] = torch.eye(size)
        model.lm_head.weight[:, :size] = torch.eye(size).roll(1, 0)
    return model


def poisoned_model(token: int) -> Llama:
    """Make a successor model whose logits are NaN after one token."""
    model = successor_model()
    with torch.no_grad():
        model.embed.weight[token] = torch.nan
    return model
