"""Captured tensors follow the device, and functions that compute different things are told apart by what they hold."""

import functools
from collections import OrderedDict

import pytest
import torch

from llama_flex import Mask, masks
from llama_flex.tokens import Tokens


class Window:
    """A predicate that is an object."""

    def __init__(self, width: torch.Tensor) -> None:
        self.width = width

    def __call__(self, q, kv):
        return q.index - kv.index < self.width[q.batch]


def test_captured_tensors_follow_the_device():
    """Wherever a predicate holds them: in a closure, nested function, partial, object or other mask. One left behind
    fails with 'Expected all tensors to be on the same device'."""
    width, allowed = torch.tensor([4]), torch.ones(9, dtype=torch.bool)

    def nested(q, kv):
        def inner():
            return width

        return q.index - kv.index < inner()[0]

    def bound(limit, q, kv, *, table):
        return table[kv.index] & (kv.index < limit[0])

    for predicate in (
        lambda q, kv: allowed[kv.index],
        nested,
        functools.partial(bound, width, table=allowed),
        Window(width),
    ):
        mask = Mask(predicate) & masks.causal() | ~Mask(predicate)
        moved = mask.to("meta")
        q = Tokens(*(torch.zeros(1, 9, dtype=torch.int32, device="meta") for _ in range(3)))
        assert moved.dense(q, q, 1).device.type == "meta"
        assert repr(moved) == repr(mask)
        assert mask.to("cpu") is mask  # nothing to move: the same object, so nothing compiles anew
        here = Tokens.arriving(9)
        assert mask.dense(here, here, 1).device.type == "cpu"


def test_predicates_that_refer_to_themselves_or_keep_tensors_elsewhere_move_too():
    limit = torch.tensor([4])

    def recursive(q, kv, depth=1, *, bound=limit):
        return recursive(q, kv, depth - 1, bound=bound) if depth else q.index - kv.index < bound[0]

    class Holder:
        def __init__(self):
            self.limits = [limit]

        def predicate(self, q, kv):
            return q.index - kv.index < self.limits[0]

    def before_it_is_set(q, kv):
        return unset if q is None else kv.index < limit

    meta = Tokens(*(torch.zeros(1, 9, dtype=torch.int32, device="meta") for _ in range(3)))
    for predicate in (recursive, Holder().predicate, before_it_is_set):
        assert Mask(predicate).to("meta").dense(meta, meta, 1).device.type == "meta"
    unset = True


class Number(int):
    pass


class Slotted(list):
    __slots__ = ("more",)


@pytest.mark.parametrize(
    "kind", [int, Number, lambda n: OrderedDict(w=n), lambda n: {"w": n}, lambda n: [n], lambda n: Slotted([n])]
)
def test_rules_that_compute_different_things_are_told_apart(kind):
    """Layers with equal masks share one list of blocks, so whatever a predicate holds must count."""

    def window(width):
        return Mask(lambda q, kv: q.index - kv.index < (width["w"] if hasattr(width, "keys") else width))

    few, many = window(kind(2)), window(kind(9))
    assert few.identity() != many.identity()
    assert few.identity() == few.identity()


def test_functions_are_told_apart_by_their_attributes_and_keep_them():
    def make(width):
        def predicate(q, kv):
            return q.index - kv.index < predicate.width

        predicate.width = width
        return Mask(predicate)

    assert make(2).identity() != make(9).identity()
    moved = make(torch.tensor(3)).to("meta")
    assert moved.function.width.device.type == "meta"


def test_captured_tensors_that_share_memory_become_tensors_of_their_own():
    """Compiled code should not depend on which of them share memory."""
    table = torch.rand(8)
    views = [table, table.view(2, 4), table[:3]]
    moved = Mask(lambda q, kv: kv.index < views[0][0] + views[1][0, 0] + views[2][0]).to("cpu")
    memory = {t.untyped_storage().data_ptr() for t in moved.function.__closure__[0].cell_contents}
    assert len(memory) == 3


def test_functions_of_this_package_are_told_from_those_of_users():
    names: dict[str, object] = {}
    exec("def of_no_module(q, kv): return kv.index <= q.index", names)
    for mask in (Mask(names["of_no_module"]), masks.causal() & Mask(names["of_no_module"]), Mask(lambda q, kv: True)):
        assert not mask.is_own()
    own = (masks.sliding_window(3) | masks.sink(1)) & ~masks.document()
    assert own.is_own()
    assert own.captured() == []
    table = torch.tensor([True, False])
    [captured] = masks.global_tokens(table).captured()
    assert captured is table
