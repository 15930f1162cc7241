"""Pages: how many rows use each, which are known by their content, and which are taken first."""

from llama_flex.engine.block_manager import BlockManager


def test_a_pool_throws_out_what_was_unused_for_longest():
    manager = BlockManager(3)
    pages = [manager.allocate() for _ in range(3)]
    for page, content in zip(pages, "abc", strict=True):
        manager.register_full(page, content)
        manager.register_full(page, "other")  # a page holds one thing
    assert manager.acquire("other") is None
    assert manager.available == 0
    for page in (pages[1], pages[0], pages[2]):
        manager.free(page)
    assert manager.acquire("b") == pages[1]
    manager.free(pages[1])
    assert manager.available == 3
    assert manager.allocate() == pages[0]
    assert manager.acquire("a") is None
    assert (manager.acquire("c"), manager.acquire("c")) == (pages[2], pages[2])
    manager.free(pages[2])
    assert manager.available == 1
    manager.free(pages[2])
    assert manager.available == 2
