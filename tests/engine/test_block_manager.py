"""Pages: how many rows use each, which are known by their content, and which are taken first."""

from llama_flex.engine.block_manager import BlockManager


def test_a_pool_throws_out_what_was_unused_for_longest():
    manager = BlockManager(3)
    pages = [manager.take() for _ in range(3)]
    for page, content in zip(pages, "abc", strict=True):
        manager.name(page, content)
        manager.name(page, "other")  # a page holds one thing
    assert manager.find("other") is None
    assert manager.available == 0
    for page in (pages[1], pages[0], pages[2]):
        manager.give_back(page)
    assert manager.find("b") == pages[1]
    manager.give_back(pages[1])
    assert manager.available == 3
    assert manager.take() == pages[0]
    assert manager.find("a") is None
    assert (manager.find("c"), manager.find("c")) == (pages[2], pages[2])
    manager.give_back(pages[2])
    assert manager.available == 1
    manager.give_back(pages[2])
    assert manager.available == 2
