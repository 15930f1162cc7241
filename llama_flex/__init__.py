"""LLaMA on FlexAttention: Hugging Face checkpoints in, exact logits and fast text out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .cache import Cache as Cache
    from .capture import Capture as Capture
    from .check import check_mask as check_mask
    from .config import GenerationConfig as GenerationConfig
    from .config import LlamaConfig as LlamaConfig
    from .edits import Edit as Edit
    from .engine import Engine as Engine
    from .fusion import Ensemble as Ensemble
    from .fusion import Prompt as Prompt
    from .fusion import fuse as fuse
    from .masks import Mask as Mask
    from .model import Llama as Llama
    from .rules import Tokens as Tokens
    from .sampling import Sampling as Sampling
    from .scores import ScoreMod as ScoreMod
    from .scoring import Score as Score
    from .scoring import choose as choose
    from .scoring import score as score
    from .scoring import score_text as score_text
    from .streaming import Completion as Completion
    from .tokenizer import Tokenizer as Tokenizer

_HOME = {
    "Cache": "cache",
    "Capture": "capture",
    "Completion": "streaming",
    "Edit": "edits",
    "Engine": "engine",
    "Ensemble": "fusion",
    "GenerationConfig": "config",
    "Llama": "model",
    "LlamaConfig": "config",
    "Mask": "masks",
    "Prompt": "fusion",
    "Sampling": "sampling",
    "Score": "scoring",
    "ScoreMod": "scores",
    "Tokenizer": "tokenizer",
    "Tokens": "rules",
    "check_mask": "check",
    "choose": "scoring",
    "fuse": "fusion",
    "score": "scoring",
    "score_text": "scoring",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Looked up when first used: the command line refuses a wrong argument before it spends a second importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
