"""LLaMA on FlexAttention: Hugging Face checkpoints in, exact logits and fast text out."""

from .cache import Cache
from .config import GenerationConfig, LlamaConfig
from .masks import Mask
from .model import Llama
