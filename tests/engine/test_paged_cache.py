"""The pool of pages that all sequences have their keys and values in."""

from llama_flex.engine.paged_cache import PagedCache
from llama_flex.masks.layout import BLOCK


def test_offsets_into_the_keys_of_the_largest_pool_are_numbers_of_32_bits(dense):
    """FlexAttention's kernels on CUDA compute with 32 bits; beyond, they would read other keys."""
    dims = dense.model.dims
    most = PagedCache.most_pages(dims)
    of_page = BLOCK * dims.num_kv_heads * dims.head_dim
    assert (most + 1) * of_page < 2**31 <= (most + 2) * of_page  # with the page that takes padding
