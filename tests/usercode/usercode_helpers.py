"""What the tests of usercode share besides fixtures: a tiny configuration and the ids of a text for it."""

import torch

from llama_flex import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=300,
)
IDS = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
