"""Masks and score functions: the named ones, plans that assign them to layers, and FlexAttention's block lists."""

from .block_mask import BlockLists as BlockLists
from .cells import Sparsity as Sparsity
from .layout import BLOCK as BLOCK
from .library import GENERATED as GENERATED
from .library import SHARED as SHARED
from .library import bidirectional as bidirectional
from .library import bidirectional_window as bidirectional_window
from .library import causal as causal
from .library import chunked as chunked
from .library import dilated as dilated
from .library import document as document
from .library import fused as fused
from .library import global_tokens as global_tokens
from .library import prefix_lm as prefix_lm
from .library import segments_from_positions as segments_from_positions
from .library import shared_prefix as shared_prefix
from .library import sink as sink
from .library import sliding_window as sliding_window
from .library import tree as tree
from .mask import Mask as Mask
