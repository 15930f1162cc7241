"""Caches: shared and owned memory, room, copies, and what a failed step or a wrong argument leaves behind."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from cache_helpers import (
    MODEL,
    ONE_LAYER,
    Broken,
    Session,
    assert_close,
    broken,
    failing_layer,
    filled,
    held_attributes,
    random_ids,
    storage,
)

from llama_flex import Engine, Mask, ScoreMod
from llama_flex.cache import Cache
from llama_flex.engine.paged_cache import PagedCache
from llama_flex.kernels.kv_cache import KVFormat
from llama_flex.usercode.errors import FunctionError

# --- Memory ---


@pytest.mark.parametrize("writer", ["source", "fork"])
@pytest.mark.parametrize("n", [1, 3])
def test_forks_share_keys_and_values_until_one_is_written(n, writer):
    source = Session(filled(), None)
    source.cache.truncate(0)
    source.append(20)
    fork = source.fork() if n == 1 else source.expand(n)
    before = storage(source.cache)
    assert storage(fork.cache) == before
    first, second = (source, fork) if writer == "source" else (fork, source)
    first.append(2)
    assert storage(second.cache) == before
    assert not set(storage(first.cache)) & set(before)
    second.append(3)
    first.append(1)
    assert not set(storage(first.cache)) & set(storage(second.cache))
    assert storage(source.cache) == before or writer == "source"  # alone again, it writes in place


@pytest.mark.parametrize("survivor", ["source", "fork"])
def test_a_cache_whose_sharers_are_gone_is_written_without_a_copy(survivor):
    source = filled()
    fork = source.fork()
    cache = source if survivor == "source" else fork
    before = storage(cache)
    del source, fork
    gc.collect()
    MODEL(random_ids(2, 1), cache=cache)
    assert storage(cache) == before


def test_a_cache_copies_once_and_then_writes_in_place():
    source = filled()
    branch = source.fork()
    MODEL(random_ids(2, 1), cache=source)
    after = storage(source)
    MODEL(random_ids(2, 1), cache=source)
    assert storage(source) == after
    assert branch.length.tolist() == [20, 20]


def test_reading_operations_copy_no_keys():
    """Only a write copies keys and values: dropping tokens and moving rows change attributes."""
    cache = filled()
    branch, before = cache.fork(), storage(cache)
    branch.truncate(9)
    branch.evict([1, 2])
    branch.reorder([1, 1])
    assert storage(branch) == storage(cache) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: MODEL.new_cache(1, 128),
        lambda: PagedCache(MODEL.dims, 2, KVFormat.of(MODEL, None)),
        lambda: PagedCache(MODEL.dims, 2, KVFormat.of(MODEL, "fp8")),
    ],
)
def test_slots_that_hold_nothing_are_zeros(make):
    """Memory that nobody wrote may hold NaN, and a weight of 0 times NaN is NaN. torch's deterministic mode fills
    uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        layers = make().layers
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(held.any() for kv in layers for held in (kv.k, kv.v))


def test_room_is_what_the_fullest_row_leaves():
    cache = filled()
    cache.evict(torch.tensor([[0, 1, 2], [5, 5, 99]]))
    assert cache.room == 128 - 19
    cache.evict(lambda t: t.index >= 10)
    assert cache.room == 128 - 9


def test_128_slots_go_on_for_thousands_of_tokens_when_old_ones_are_evicted():
    ids, cache, before = random_ids(1, 2100), MODEL.new_cache(1, 128), None
    found = []
    for part in ids.split(60, dim=1):
        cache.evict(lambda t: t.index < cache.length[:, None] - 60)
        found.append(MODEL(part, cache=cache))
        before = before or storage(cache)
        assert storage(cache) == before
    assert cache.length.tolist() == [2100]
    of_chunk = Mask(lambda q, kv: (kv.index <= q.index) & (q.index // 60 - kv.index // 60 <= 1))
    assert_close(torch.cat(found, dim=1)[0, -600:], MODEL(ids, mask=of_chunk, backend="dense")[0, -600:])


def test_drafts_taken_back_leave_no_slots_behind():
    """After an eviction indices are far above the number of slots in use; append and truncate lose no slots."""
    session = Session(MODEL.new_cache(1, 128))
    for _ in range(6):
        session.append(50)
        session.evict(torch.arange(session.rows[0].length - 40))
    for _ in range(30):
        session.append(5)
        session.truncate(session.rows[0].length - 4)
    assert session.cache.room == 128 - int(session.rows[0].held.sum())


def test_generation_goes_on_from_forks():
    engine, prefix = Engine(MODEL), random_ids(1, 140)[0].tolist()
    root = MODEL.new_cache(1, 384)
    MODEL(torch.tensor([prefix]), cache=root)
    expanded = root.expand(3)
    branches = [root.fork(), root.fork(), root]
    ends = [[5, 6], [7], [8, 9, 10]]
    options = {"max_new_tokens": 6, "stop_token_ids": []}
    found = [engine.generate([end], cache=branch, **options)[0] for branch, end in zip(branches, ends, strict=True)]
    found += engine.generate(ends, cache=expanded, **options)
    alone = [engine.generate([prefix + end], **options)[0] for end in ends]
    assert [c.tokens for c in found] == [c.tokens for c in alone] * 2


# --- Copies ---


@pytest.mark.parametrize("shared", [False, True])
def test_a_deep_copy_is_a_cache_of_its_own(shared):
    session = Session(MODEL.new_cache(2, 128))
    session.append(9)
    fork = session.fork() if shared else None
    twin = session.beside(copy.deepcopy(session.cache), [row.copy() for row in session.rows])
    assert not set(storage(twin.cache)) & set(storage(session.cache))
    for each in (twin, session, twin.fork(), twin, twin.expand(2), fork or twin, session):
        each.append(2)
        each.check()


def test_a_row_that_has_lost_all_of_its_tokens_begins_anew():
    for cache in (MODEL.new_cache(1, 128), MODEL.new_rolling_cache(1, 1, 4)):
        MODEL(random_ids(1, 9), cache=cache)
        cache.evict(lambda t: t.index >= 0)
        assert (cache.length.tolist(), cache.next_position.tolist()) == ([0], [0])
        assert_close(MODEL(random_ids(1, 1), cache=cache), MODEL(random_ids(1, 1)))


# --- Failures ---


def probe(cache: Cache) -> torch.Tensor:
    return MODEL(random_ids(cache.batch_size, 2, seed=99), cache=cache.fork())


@pytest.mark.parametrize("backend", ["flex", "dense"])
@pytest.mark.parametrize(
    ("rules", "fails"),
    [({"mask": Mask(broken)}, nullcontext), ({"score_mod": ScoreMod(broken)}, nullcontext), ({}, failing_layer)],
    ids=["mask", "score", "layer"],
)
def test_a_step_that_fails_leaves_the_cache_as_it_was(rules, fails, backend):
    cache = filled(count=100)
    cache.evict([3, 99])
    fork = cache.fork()
    before = probe(cache), held_attributes(cache, 1), cache.reserved
    # Eager FlexAttention traces score functions, and does not tell their own exceptions apart.
    with fails(), pytest.raises((Broken, FunctionError)):
        MODEL(random_ids(2, 20), cache=cache, backend=backend, **rules)
    for each in (cache, fork):
        assert torch.equal(probe(each), before[0])
        assert (held_attributes(each, 1), each.reserved) == before[1:]


def test_a_full_cache_names_the_sizes():
    cache = filled(count=120)
    before = probe(cache)
    with pytest.raises(ValueError, match=r"128 tokens per sequence; 120 are taken and 9 more do not fit.*max_length"):
        MODEL(random_ids(2, 9), cache=cache)
    assert torch.equal(probe(cache), before)
    MODEL(random_ids(2, 8), cache=cache)
    assert cache.room == 0
    with pytest.raises(ValueError, match="128 are taken and 1 more"):
        MODEL(random_ids(2, 1), cache=cache)
    cache.evict([0])
    MODEL(random_ids(2, 1), cache=cache)
    assert cache.length.tolist() == [129, 129]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda c: c.truncate(-1), "cannot keep -1"),
        (lambda c: c.truncate(1.5), "length must be a whole number, not 1.5"),
        (lambda c: c.truncate(True), "length must be a whole number, not True"),
        (lambda c: c.expand(1.5), "n must be a whole number, not 1.5"),
        (lambda c: c.expand("2"), "n must be a whole number, not '2'"),
        (lambda c: c.expand(0), "n must be at least 1, not 0"),
        (lambda c: c.expand(-2), "n must be at least 1, not -2"),
        (lambda c: c.reorder([0]), "2 row numbers"),
        (lambda c: c.reorder([0, 1, 0]), "2 row numbers"),
        (lambda c: c.reorder([0.0, 1.0]), "2 row numbers"),
        (lambda c: c.reorder(torch.tensor([True, False])), "2 row numbers"),
        (lambda c: c.reorder([True, 0]), "2 row numbers"),
        (lambda c: c.reorder(["a", None]), "2 row numbers"),
        (lambda c: c.reorder(1), "2 row numbers, not 1"),
        (lambda c: c.reorder([[0, 1]]), "2 row numbers"),
        (lambda c: c.reorder([0, 2]), "from 0 to 1"),
        (lambda c: c.reorder([-1, 0]), "from 0 to 1"),
        (lambda c: c.evict(3), "tokens must be selected by"),
        (lambda c: c.evict(torch.tensor(3)), "tokens must be selected by"),
        (lambda c: c.evict([1.5]), "tokens must be selected by"),
        (lambda c: c.evict([True, False]), "tokens must be selected by"),
        (lambda c: c.evict(torch.zeros(3, 1, dtype=torch.long)), "tokens must be selected by"),
        (lambda c: c.evict(torch.zeros(2, 1, 1, dtype=torch.long)), "tokens must be selected by"),
        (lambda c: c.evict(lambda t: t.index), "must return booleans"),
        (lambda c: c.evict(lambda t: t.index[:1] > 0), "must return booleans"),
        (lambda c: c.evict(lambda t: True), "must return booleans"),
        (lambda c: MODEL(random_ids(3, 1), cache=c), "2 rows but the input has 3"),
        (lambda c: ONE_LAYER(random_ids(2, 1), cache=c), "another model"),
        (lambda c: MODEL(random_ids(2, 2), cache=c, lengths=torch.tensor([1, 3])), "lengths must be"),
        (lambda c: MODEL(random_ids(2, 2), cache=c, positions=torch.arange(2)), "positions must be"),
        (lambda c: MODEL(random_ids(2, 2), cache=c, segments=torch.zeros(2, 1).int()), "segments must be"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(operation, message):
    cache = filled()
    before = probe(cache), held_attributes(cache, 0), held_attributes(cache, 1), cache.reserved
    with pytest.raises(ValueError, match=message):
        operation(cache)
    assert torch.equal(probe(cache), before[0])
    assert (held_attributes(cache, 0), held_attributes(cache, 1), cache.reserved) == before[1:]


@pytest.mark.parametrize("none", [[], torch.empty(0).long(), torch.empty(2, 0).long()], ids=repr)
def test_evicting_no_tokens_changes_nothing(none):
    cache = filled()
    cache.evict(none)
    assert cache.length.tolist() == [20, 20]
    assert cache.room == 108


@pytest.mark.parametrize(("rows", "slots"), [(0, 5), (1, 0), (-1, 5)])
def test_a_cache_needs_rows_and_slots(rows, slots):
    with pytest.raises(ValueError, match=f"not {rows} x {slots}"):
        MODEL.new_cache(rows, slots)


@pytest.mark.parametrize(
    ("rows", "slots", "message"),
    [
        (True, 5, "batch_size must be a whole number, not True"),
        (1, 1.5, "max_length must be a whole number, not 1.5"),
        (1, None, "max_length must be a whole number, not None"),
    ],
)
def test_sizes_of_a_cache_are_whole_numbers(rows, slots, message):
    with pytest.raises(ValueError, match=message):
        MODEL.new_cache(rows, slots)


def test_keeping_more_tokens_than_there_can_be_keeps_all():
    cache = filled()
    cache.truncate(10**30)
    assert cache.length.tolist() == [20, 20]
