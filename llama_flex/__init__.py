"""LLaMA on FlexAttention: Hugging Face checkpoints in, exact logits and fast text out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import masks as masks
    from .cache import Cache as Cache
    from .checkpoint.generation_config import GenerationConfig as GenerationConfig
    from .checkpoint.quantization import Quantization as Quantization
    from .config import LlamaConfig as LlamaConfig
    from .engine.engine import Engine as Engine
    from .engine.fusion import Ensemble as Ensemble
    from .engine.fusion import Prompt as Prompt
    from .engine.fusion import fuse as fuse
    from .engine.output import Completion as Completion
    from .eval.check_mask import check_mask as check_mask
    from .eval.scoring import Score as Score
    from .eval.scoring import choose as choose
    from .eval.scoring import score as score
    from .eval.scoring import score_text as score_text
    from .interp import edits as edits
    from .interp.capture import Capture as Capture
    from .interp.edits import Edit as Edit
    from .logits.grammar import Grammar as Grammar
    from .logits.parameters import Sampling as Sampling
    from .masks import scores as scores
    from .masks.mask import Mask as Mask
    from .masks.scores import ScoreMod as ScoreMod
    from .model import Llama as Llama
    from .tokenizer import Tokenizer as Tokenizer
    from .tokens import Tokens as Tokens

_HOME = {
    "Cache": "cache",
    "Capture": "interp.capture",
    "Completion": "engine.output",
    "Edit": "interp.edits",
    "Engine": "engine.engine",
    "Ensemble": "engine.fusion",
    "GenerationConfig": "checkpoint.generation_config",
    "Grammar": "logits.grammar",
    "Llama": "model",
    "LlamaConfig": "config",
    "Mask": "masks.mask",
    "Prompt": "engine.fusion",
    "Quantization": "checkpoint.quantization",
    "Sampling": "logits.parameters",
    "Score": "eval.scoring",
    "ScoreMod": "masks.scores",
    "Tokenizer": "tokenizer",
    "Tokens": "tokens",
    "check_mask": "eval.check_mask",
    "choose": "eval.scoring",
    "fuse": "engine.fusion",
    "score": "eval.scoring",
    "score_text": "eval.scoring",
}
_MODULES = {"edits": "interp.edits", "masks": "masks", "scores": "masks.scores"}  # `from llama_flex import masks`
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Looked up when first used: the command line refuses a wrong argument before it spends a second importing torch.
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
