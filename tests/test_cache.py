"""What a cache holds after any sequence of operations, told by the logits of the tokens that come next.

The reference keeps each row as a plain list of all tokens that it ever held, with which of them were held when each one
came, and computes the logits by one dense forward without a cache. What a token's keys and values took from tokens that
were evicted later is in it by construction; slots are not.

The budget of a comparison is twice what the reference itself differs by between float32 and float64.
"""

import copy
import functools
import gc
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from helpers import compiled_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_flex import Engine, Llama, LlamaConfig, Mask, ScoreMod, masks
from llama_flex.cache import Cache
from llama_flex.engine.paged_cache import PagedCache
from llama_flex.tokens import Token, Tokens
from llama_flex.usercode.errors import FunctionError

VOCAB = 64
CONTEXT = 192
LONGEST = 600  # tokens of one row's history, at which the budget is measured


def tiny(layers: int) -> Llama:
    """A random model whose weights are large enough for every visible token to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
    )
    model = Llama(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval().requires_grad_(False)


def random_ids(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


MODEL, ONE_LAYER = tiny(2), tiny(1)
_exact = copy.deepcopy(MODEL).double()(random_ids(2, LONGEST), backend="dense")
BUDGET = 2 * (MODEL(random_ids(2, LONGEST), backend="dense") - _exact).abs().max().item()
assert_close = partial(torch.testing.assert_close, rtol=0, atol=BUDGET)


# --- The reference ---


class Row:
    """All tokens that one row ever held, in their order of arrival, as far as what it holds now depends on them."""

    def __init__(self) -> None:
        self.ids = torch.empty(0, dtype=torch.long)
        self.tokens = Tokens(*(torch.empty(0, dtype=torch.long) for _ in range(3)))
        self.held = torch.empty(0, dtype=torch.bool)
        self.seen = torch.empty(0, 0, dtype=torch.bool)  # [q, kv]: was kv held, or came along, when q came?
        self.rolled_out = 0  # a rolling window has passed the tokens before this index
        self.may_have_rolled_out = 0  # the same, with steps that failed

    def copy(self) -> "Row":
        return copy.copy(self)  # no tensor is ever changed in place

    @property
    def length(self) -> int:
        return max(self.tokens.index[self.held].tolist(), default=-1) + 1

    @property
    def next_position(self) -> int:
        return max(self.tokens.position[self.held].tolist(), default=-1) + 1

    def append(self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> None:
        count = len(ids)
        came = Tokens(self.length + torch.arange(count), positions, segments)
        self.ids = torch.cat([self.ids, ids])
        self.tokens = Tokens(*map(torch.cat, zip(self.tokens, came, strict=True)))
        self.held = torch.cat([self.held, torch.ones(count, dtype=torch.bool)])
        earlier = torch.cat([self.seen, torch.zeros(len(self.seen), count, dtype=torch.bool)], dim=1)
        self.seen = torch.cat([earlier, self.held.expand(count, -1)])

    def forget(self, chosen: torch.Tensor) -> None:
        self.held = self.held & ~chosen
        needed = self.held
        while not torch.equal(more := needed | self.seen[needed].any(0), needed):
            needed = more
        self.ids, self.held = self.ids[needed], self.held[needed]
        self.tokens = Tokens(*(x[needed] for x in self.tokens))
        self.seen = self.seen[needed][:, needed]

    def attributes(self) -> list[tuple[int, ...]]:
        return sorted(zip(*(x[self.held].tolist() for x in self.tokens), strict=True))


def held_attributes(cache: Cache, row: int) -> list[tuple[int, ...]]:
    return sorted(token for token in zip(*(x[row].tolist() for x in cache.tokens), strict=True) if token[0] >= 0)


def table_mask(tables: list[torch.Tensor], size: int) -> Mask:
    """The mask that a table for each row says, over the order of arrival."""
    table = torch.zeros(len(tables), size, size, dtype=torch.bool)
    for padded, given_table in zip(table, tables, strict=True):
        padded[: len(given_table), : len(given_table)] = given_table
    return Mask(lambda q, kv: table[q.batch, q.index, kv.index])


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def expected_logits(model: Llama, rows: list[Row], rules) -> torch.Tensor:
    """The logits of every row's whole history, `[B, N, V]`; rules: who sees whom, one a layer."""
    size = max(len(row.ids) for row in rows)
    layers = []
    for rule_of_layer in rules:
        tables = []
        for row in rows:
            q, kv = Tokens(*(x[:, None] for x in row.tokens)), Tokens(*(x[None] for x in row.tokens))
            tables.append(row.seen & rule_of_layer(q, kv))
        layers.append(table_mask(tables, size))
    return model(
        padded([row.ids for row in rows]),
        lengths=torch.tensor([len(row.ids) for row in rows]),
        positions=padded([row.tokens.position for row in rows]),
        segments=padded([row.tokens.segment for row in rows]),
        mask=layers,
        backend="dense",
    )


def causal(q, kv):
    return kv.index <= q.index


def recent(width, sinks):
    return lambda q, kv: causal(q, kv) & ((q.index - kv.index < width) | (kv.index < sinks))


# A mask, and for each layer the same over plain tensors.
KINDS = {
    "causal": (None, [causal] * 2),
    "window and sink": (masks.sliding_window(40) | masks.sink(3), [recent(40, 3)] * 2),
    "documents": (masks.causal() & masks.document(), [lambda q, kv: causal(q, kv) & (q.segment == kv.segment)] * 2),
    "bidirectional": (masks.bidirectional(), [lambda q, kv: torch.tensor(True)] * 2),
    "positions": (
        Mask(lambda q, kv: (kv.index <= q.index) & (kv.position <= q.position)),
        [lambda q, kv: causal(q, kv) & (kv.position <= q.position)] * 2,
    ),
    "a mask a layer": (
        [masks.dilated(3), None],
        [lambda q, kv: causal(q, kv) & ((q.index - kv.index) % 3 == 0), causal],
    ),
}


class Broken(Exception):
    """What fails in the middle of a step."""


def broken(*given):
    """Fails as a mask, a score function or a hook; but not where a rule is tried on one token, before any work."""
    if not isinstance(given[-1], Token) or given[-1]._tokens.index.numel() > 1:
        raise Broken
    return given[0] if len(given) == 3 else given[-1].index >= 0


@contextmanager
def failing_layer():
    """A step of MODEL fails in its last layer, when all attributes and most keys are written."""
    hook = MODEL.layers[-1].mlp.register_forward_pre_hook(broken)
    try:
        yield
    finally:
        hook.remove()


class Session:
    """A cache and the reference side by side: every operation is done to both, every append compares the logits."""

    def __init__(self, cache: Cache, rows: list[Row] | None = None, kind="causal", forward=None, draws=None) -> None:
        self.cache = cache
        self.rows = [Row() for _ in range(cache.batch_size)] if rows is None else rows
        self.kind = kind
        self.mask, self.rules = KINDS[kind]
        if cache.window is not None:
            rolling = recent(cache.window, cache.sinks)
            self.rules = [lambda q, kv, r=r: r(q, kv) & rolling(q, kv) for r in self.rules]
        self.forward = forward or MODEL
        self.draws = draws or torch.Generator().manual_seed(0)

    def beside(self, cache: Cache, rows: list[Row]) -> "Session":
        return Session(cache, rows, self.kind, self.forward, self.draws)

    def append(self, count, lengths=None, positions=None, segments=None) -> None:
        """positions, segments: for each row, of its real tokens; None: the defaults."""
        ids = torch.randint(VOCAB, (len(self.rows), count), generator=self.draws)
        given_lengths = [count] * len(self.rows) if lengths is None else lengths
        given = {
            name: None if value is None else padded([torch.zeros(count).long(), *map(torch.tensor, value)])[1:]
            for name, value in (("positions", positions), ("segments", segments))
        }
        logits = self.forward(
            ids,
            cache=self.cache,
            mask=self.mask,
            lengths=None if lengths is None else torch.tensor(lengths),
            **given,
        )
        self.roll()
        for number, (row, n) in enumerate(zip(self.rows, given_lengths, strict=True)):
            default = row.next_position + torch.arange(n)
            row.append(
                ids[number, :n],
                default if positions is None else given["positions"][number, :n],
                torch.zeros(n, dtype=torch.long) if segments is None else given["segments"][number, :n],
            )
        if not any(given_lengths):
            return
        expected = expected_logits(MODEL, self.rows, self.rules)
        for found, row, all_logits, n in zip(logits, self.rows, expected, given_lengths, strict=True):
            assert_close(found[:n], all_logits[len(row.ids) - n : len(row.ids)])

    def roll(self) -> None:
        if self.cache.window is not None:
            for row in self.rows:
                row.rolled_out = max(row.rolled_out, row.length + 1 - self.cache.window)
                row.may_have_rolled_out = max(row.rolled_out, row.may_have_rolled_out)

    def fail(self, count: int) -> None:
        reserved = self.cache.reserved
        with failing_layer(), pytest.raises(Broken):
            self.forward(random_ids(len(self.rows), count), cache=self.cache, mask=self.mask)
        assert self.cache.reserved == reserved
        for row in self.rows:
            row.may_have_rolled_out = max(row.may_have_rolled_out, row.length + 1 - (self.cache.window or 0))

    def truncate(self, length: int) -> None:
        if any(self.is_lost(row, length, row.rolled_out) for row in self.rows):
            with pytest.raises(ValueError, match="rolling window"):
                self.cache.truncate(length)
            return
        try:
            self.cache.truncate(length)
        except ValueError:
            assert any(self.is_lost(row, length, row.may_have_rolled_out) for row in self.rows)
            return
        for row in self.rows:
            row.forget(row.tokens.index >= length)

    def is_lost(self, row: Row, length: int, rolled_out: int) -> bool:
        """Would the token at index `length` see tokens that are no longer there?"""
        end = min(row.length, length)
        if self.cache.window is None:
            return False
        return max(self.cache.sinks, end + 1 - self.cache.window) < min(rolled_out, end)

    def evict(self, tokens) -> None:
        self.cache.evict(tokens)
        for number, row in enumerate(self.rows):
            if callable(tokens):
                row.forget(tokens(row.tokens))
            else:
                indices = torch.as_tensor(tokens)
                row.forget(torch.isin(row.tokens.index, indices if indices.dim() == 1 else indices[number]))

    def fork(self) -> "Session":
        return self.beside(self.cache.fork(), [row.copy() for row in self.rows])

    def expand(self, n: int) -> "Session":
        return self.beside(self.cache.expand(n), [row.copy() for row in self.rows for _ in range(n)])

    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(order)
        self.rows = [self.rows[i].copy() for i in order]

    def check(self) -> None:
        """The attributes of all that is held, and the counts that follow from them."""
        cache, rows = self.cache, self.rows
        assert cache.length.tolist() == [row.length for row in rows]
        assert cache.next_position.tolist() == [row.next_position for row in rows]
        for number, row in enumerate(rows):
            held, expected = held_attributes(cache, number), row.attributes()
            if cache.window is None:
                assert held == expected
            else:  # when exactly a token that no later one sees is forgotten is not promised
                seen_next = recent(cache.window, cache.sinks)
                q = Tokens(*torch.tensor([row.length, 0, 0]))
                visible = {t for t in expected if seen_next(q, Tokens(*torch.tensor(t))).item()}
                assert visible <= set(held) <= set(expected)
        if cache.window is None:
            assert max(int(row.held.sum()) for row in rows) <= cache.reserved <= cache.max_length
            assert cache.room == cache.largest_append == cache.max_length - cache.reserved


# --- Any sequence of operations ---

COUNTS = st.sampled_from([1, 1, 1, 2, 3, 17, 127, 128, 129])
NUMBERS = st.integers(0, 99)


class Operations(RuleBasedStateMachine):
    """Up to four caches that descend from each other, written in any order."""

    @initialize(
        batch=st.integers(1, 3),
        blocks=st.sampled_from([1, 3]),
        kind=st.sampled_from(list(KINDS)),
        backend=st.sampled_from(["flex", "dense"]),
        count=st.integers(1, 90),
    )
    def start(self, batch, blocks, kind, backend, count):
        self.sessions = [Session(self.new_cache(batch, blocks), None, kind, partial(MODEL, backend=backend))]
        self.sessions[0].append(count)

    def go_on(self, session, count):
        if 0 < count <= session.cache.largest_append and max(len(row.ids) for row in session.rows) < LONGEST:
            session.append(count)

    def new_cache(self, batch, blocks):
        return MODEL.new_cache(batch, blocks * 128)

    def one(self, number) -> Session:
        return self.sessions[number % len(self.sessions)]

    @rule(
        number=NUMBERS,
        count=COUNTS,
        ragged=st.booleans(),
        position_kind=st.sampled_from(["default", "default", "gap", "restart", "same"]),
        segment_kind=st.sampled_from(["default", "one", "many"]),
        data=st.data(),
    )
    def append(self, number, count, ragged, position_kind, segment_kind, data):
        session = self.one(number)
        if max(len(row.ids) for row in session.rows) + count > LONGEST:
            count = 1
        lengths = None
        if ragged:
            some = st.integers(0, count)
            lengths = data.draw(st.lists(some, min_size=len(session.rows), max_size=len(session.rows)), "lengths")
        real = [count] * len(session.rows) if lengths is None else lengths
        positions = self.positions(session, position_kind, real)
        segments = None
        if segment_kind != "default":
            first = data.draw(st.integers(0, 3), "segment")
            segments = [[(first + (i // 2 if segment_kind == "many" else 0)) % 4 for i in range(n)] for n in real]
        if count > session.cache.largest_append:
            with pytest.raises(ValueError, match=f"{count} more do not fit"):
                MODEL(random_ids(len(session.rows), count), cache=session.cache)
        else:
            session.append(count, lengths, positions, segments)

    def positions(self, session, kind, real):
        starts = {"gap": [row.next_position + 5 for row in session.rows], "restart": [2] * len(real)}
        if kind == "same":
            return [[7] * n for n in real]
        return [list(range(s, s + n)) for s, n in zip(starts[kind], real, strict=True)] if kind in starts else None

    @rule(count=st.integers(1, 3), backwards=st.booleans())
    def append_to_each(self, count, backwards):
        for session in self.sessions[:: -1 if backwards else 1]:
            self.go_on(session, count)

    @rule(number=NUMBERS, back=st.integers(0, 140), whole=st.booleans(), count=st.integers(0, 40))
    def truncate(self, number, back, whole, count):
        session = self.one(number)
        longest = max(row.length for row in session.rows)
        session.truncate(max(back if whole else longest - back, self.least(session)))
        self.go_on(session, count)

    def least(self, session):
        return 0

    @rule(
        number=NUMBERS,
        how=st.sampled_from(["oldest", "newest", "some", "by row", "segment", "position", "all"]),
        some=st.lists(st.integers(0, 200), min_size=1, max_size=6),
        count=st.integers(0, 40),
    )
    def evict(self, number, how, some, count):
        session = self.one(number)
        session.evict(self.evicted(how, some, session))
        self.go_on(session, count)

    def evicted(self, how, some, session):
        longest = max(row.length for row in session.rows)
        return {
            "oldest": torch.arange(longest * 2 // 3),
            "newest": torch.arange(longest // 2, longest + 1),
            "some": some,
            "by row": torch.tensor([[i + row for i in some] for row in range(len(session.rows))]),
            "segment": lambda t: t.segment == some[0] % 4,
            "position": lambda t: (t.position > some[0]) & (t.segment != 1),
            "all": lambda t: t.index >= 0,
        }[how]

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(number=NUMBERS)
    def fork(self, number):
        self.sessions.append(self.one(number).fork())

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(number=NUMBERS, n=st.integers(1, 3))
    def expand(self, number, n):
        if len(self.one(number).rows) * n <= 4:
            self.sessions.append(self.one(number).expand(n))

    @rule(number=NUMBERS, data=st.data())
    def reorder(self, number, data):
        session = self.one(number)
        row = st.integers(0, len(session.rows) - 1)
        session.reorder(data.draw(st.lists(row, min_size=len(session.rows), max_size=len(session.rows)), "rows"))

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(number=NUMBERS)
    def drop(self, number):
        self.sessions.pop(number % len(self.sessions))

    @rule(number=NUMBERS, count=st.integers(1, 5))
    def fail(self, number, count):
        session = self.one(number)
        if count <= session.cache.largest_append:
            session.fail(count)

    @invariant()
    def attributes(self):
        for session in getattr(self, "sessions", []):
            session.check()

    def teardown(self):
        for session in getattr(self, "sessions", []):
            self.go_on(session, 1)


class RollingOperations(Operations):
    """The same with rolling caches, but for what has tests of its own: back to the sinks, and newest tokens evicted."""

    def new_cache(self, batch, blocks):
        return MODEL.new_rolling_cache(batch, 30, 3, largest_append=blocks * 40)

    def positions(self, session, kind, real):
        # The default position goes on from the highest that is held, so from which one depends on what is forgotten.
        return super().positions(session, kind if kind == "gap" else "default", real)

    def least(self, session):
        return session.cache.sinks + 1

    def evicted(self, how, some, session):
        shortest = min(row.length for row in session.rows)
        return torch.tensor([shortest - i for i in some if 1 < i <= shortest], dtype=torch.long)


class NarrowOperations(RollingOperations):
    """Windows of one and two tokens: going back by one leaves nothing but sinks, from which nothing can be counted."""

    def new_cache(self, batch, blocks):
        return MODEL.new_rolling_cache(batch, 1 + blocks // 2, 3 + blocks // 2, largest_append=40)

    def positions(self, session, kind, real):
        return None  # where all but the sinks are gone, positions go on as if there had been no gap


TestOperations = Operations.TestCase
TestOperations.settings = settings(deadline=None, max_examples=30, stateful_step_count=14)
TestRollingOperations = RollingOperations.TestCase
TestRollingOperations.settings = settings(deadline=None, max_examples=20, stateful_step_count=14)
TestNarrowOperations = NarrowOperations.TestCase
TestNarrowOperations.settings = settings(deadline=None, max_examples=20, stateful_step_count=14)


# --- A really fresh run over the survivors ---


def fresh_logits(model: Llama, row: Row, mask: Mask | None = None) -> torch.Tensor:
    """The logits after the last of the tokens that are held, as if no others had ever been."""
    ids, (_, positions, segments) = row.ids[row.held], (x[row.held] for x in row.tokens)
    return model(ids[None], positions=positions[None], segments=segments[None], mask=mask, backend="dense")[0, -1]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "evict", "truncate", "fork"]), st.integers(0, 130)), min_size=3, max_size=9
    )
)
def test_one_layer_goes_on_as_from_the_survivors_alone(operations):
    """A key in the first layer depends on nothing but its own token, so nothing is left of what was evicted."""
    cache, row, draws = ONE_LAYER.new_cache(1, 384), Row(), torch.Generator().manual_seed(0)

    def append(count):
        ids = torch.randint(VOCAB, (1, count), generator=draws)
        row.append(ids[0], row.next_position + torch.arange(count), torch.zeros(count, dtype=torch.long))
        assert_close(ONE_LAYER(ids, cache=cache)[0, -1], fresh_logits(ONE_LAYER, row))

    for name, number in operations:
        if name == "append":
            if cache.room:
                append(max(1, min(number, cache.room)))
        elif name == "evict":
            chosen = [i for i in range(row.length) if i % 5 != number % 5]
            cache.evict(torch.tensor(chosen, dtype=torch.int64))
            row.forget(torch.isin(row.tokens.index, torch.tensor(chosen)))
        elif name == "truncate":
            cache.truncate(number)
            row.forget(row.tokens.index >= number)
        else:
            cache = cache.fork()
        assert held_attributes(cache, 0) == row.attributes()
    cache.truncate(100)
    row.forget(row.tokens.index >= 100)
    append(1)


def test_isolated_segments_go_on_as_if_the_evicted_had_never_been():
    """Segments that saw nothing of each other: evicting a whole one leaves no trace, in any number of layers."""
    mask = masks.causal() & masks.document()
    cache, row = MODEL.new_cache(1, 384), Row()
    for number, segment in enumerate([1, 2, 3, 1, 2, 3]):
        ids, positions = random_ids(1, 50, seed=number), torch.arange(7 * number, 7 * number + 50)
        segments = torch.full((1, 50), segment)
        MODEL(ids, cache=cache, positions=positions[None], segments=segments, mask=mask)
        row.append(ids[0], positions, segments[0])
    cache.evict(lambda t: (t.segment == 1) | (t.segment == 3))
    row.forget((row.tokens.segment == 1) | (row.tokens.segment == 3))
    for number, segment in enumerate([2, 1, 2, 1]):
        ids, positions = random_ids(1, 60, seed=9 + number), row.next_position + torch.arange(60)
        segments = torch.full((1, 60), segment)
        logits = MODEL(ids, cache=cache, segments=segments, mask=mask)
        row.append(ids[0], positions, segments[0])
        assert_close(logits[0, -1], fresh_logits(MODEL, row, mask))
    assert cache.room == 384 - int(row.held.sum())


def test_a_truncated_cache_goes_on_as_a_fresh_one():
    ids, cache = random_ids(2, 300), MODEL.new_cache(2, 300)
    MODEL(ids[:, :290], cache=cache)
    for length in (257, 256, 128, 127, 1, 0):
        cache.truncate(length)
        assert cache.room == 384 - length
        branch = cache.fork()
        assert_close(MODEL(ids[:, length : length + 3], cache=branch), MODEL(ids[:, : length + 3])[:, length:])


# --- Memory ---


def storage(cache: Cache) -> list[int]:
    return [x.data_ptr() for layer in cache.layers for x in layer]


def filled(batch=2, count=20, slots=128) -> Cache:
    cache = MODEL.new_cache(batch, slots)
    MODEL(random_ids(batch, count), cache=cache)
    return cache


def rolled(count: int, window=30, sinks=3, chunk=40, batch=1) -> Session:
    session = Session(MODEL.new_rolling_cache(batch, window, sinks, largest_append=chunk))
    while count:
        session.append(min(chunk, count))
        count -= min(chunk, count)
    return session


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
    """Only a write makes room of one's own: dropping tokens and moving rows change attributes."""
    cache = filled()
    branch, before = cache.fork(), storage(cache)
    branch.truncate(9)
    branch.evict([1, 2])
    branch.reorder([1, 1])
    assert storage(branch) == storage(cache) == before


@pytest.mark.parametrize(
    "make",
    [lambda: MODEL.new_cache(1, 128), lambda: PagedCache(MODEL.config, 2, dtype=MODEL.dtype, device=MODEL.device)],
)
def test_slots_that_hold_nothing_are_zeros(make):
    """Memory that nobody wrote may hold NaN, and a weight of 0 times NaN is NaN; this mode of torch fills it so."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        layers = make().layers
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(held.any() for layer in layers for held in layer)


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
    """After an eviction indices are far above the number of slots in use; appending and truncating loses none."""
    session = Session(MODEL.new_cache(1, 128))
    for _ in range(6):
        session.append(50)
        session.evict(torch.arange(session.rows[0].length - 40))
    for _ in range(30):
        session.append(5)
        session.truncate(session.rows[0].length - 4)
    assert session.cache.room == 128 - int(session.rows[0].held.sum())


# --- Rolling caches ---


@pytest.mark.parametrize("top", [None, masks.chunked(150), masks.dilated(2)], ids=str)
@pytest.mark.parametrize("chunks", [[64], [33], [1, 64, 2, 63]], ids=str)
def test_3000_tokens_through_a_rolling_cache_are_a_forward_with_its_mask(chunks, top):
    ids, cache = random_ids(1, 3000), MODEL.new_rolling_cache(1, window=100, sinks=3, largest_append=64)
    before, found, start = storage(cache), [], 0
    while start < 3000:
        size = chunks[len(found) % len(chunks)]
        found.append(MODEL(ids[:, start : start + size], cache=cache, mask=top, backend="dense"))
        start += size
    assert storage(cache) == before
    assert cache.layers[0][0].shape[2] == 256 + 128  # 3 + 99 + 64 in whole blocks, and the spare one
    assert cache.room is None
    assert cache.length.tolist() == [3000]
    assert_close(torch.cat(found, dim=1)[:, -300:], tail_of_dense(top))


@functools.cache
def tail_of_dense(top: Mask | None) -> torch.Tensor:
    """The logits of the last 300 of 3,000 tokens, without a cache."""
    rolling = masks.sliding_window(100) | masks.sink(3)
    mask = rolling if top is None else rolling & top
    return MODEL(random_ids(1, 3000), mask=mask, backend="dense", logits_to_keep=300)


def test_token_by_token_through_a_rolling_cache():
    session = rolled(90, chunk=40)
    for _ in range(150):
        session.append(1)
    session.check()


def test_ragged_rows_roll_each_at_its_own_pace():
    session = Session(MODEL.new_rolling_cache(3, 30, 3, largest_append=40))
    for lengths in ([40, 0, 1], [40, 3, 40], [0, 40, 40], [7, 1, 0], [40, 0, 40], [1, 1, 1], [0, 40, 33], [1, 1, 1]):
        session.append(40, lengths)
        session.check()


def test_a_rolling_cache_goes_back_as_far_as_it_holds():
    session = rolled(200)
    session.truncate(195)  # the last 40 came at once, so nothing that token 195 sees is gone
    session.append(9)
    session.truncate(190)
    session.append(40)
    session.truncate(190 - 30)
    session.append(1)
    lost = session.rows[0].rolled_out + 28
    before = held_attributes(session.cache, 0)
    for length in (lost, 100, 4):
        with pytest.raises(ValueError, match=f"cannot go back to {length} tokens"):
            session.cache.truncate(length)
    assert held_attributes(session.cache, 0) == before
    session.truncate(lost + 1)
    session.append(3)


@pytest.mark.parametrize("length", [0, 2, 3])
def test_a_rolling_cache_goes_back_to_its_sinks(length):
    """Nothing that comes before is lost."""
    session = rolled(200)
    session.truncate(length)
    for _ in range(5):
        session.append(10)
        session.check()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("backend", ["flex", "dense"])
def test_a_rolling_cache_of_one_token_goes_back_by_one(window, sinks, backend):
    cache, ids = MODEL.new_rolling_cache(1, window, sinks), random_ids(1, 12)
    mask = masks.sliding_window(window) | masks.sink(sinks)
    for n in range(9):
        MODEL(ids[:, n : n + 1], cache=cache, backend=backend)
    cache.truncate(8)
    assert (cache.length.tolist(), cache.next_position.tolist()) == ([8], [8])
    logits = [MODEL(ids[:, n : n + 1], cache=cache, backend=backend) for n in range(8, 12)]
    assert_close(torch.cat(logits, 1), MODEL(ids, mask=mask, backend="dense")[:, 8:])


def test_a_row_without_new_tokens_keeps_its_length_though_its_window_has_passed_all():
    cache = MODEL.new_rolling_cache(2, 1, 4)
    MODEL(random_ids(2, 9), cache=cache)
    MODEL(random_ids(2, 1), cache=cache, lengths=torch.tensor([0, 1]))
    assert (cache.length.tolist(), cache.next_position.tolist()) == ([9, 10], [9, 10])
    cache.evict([0])  # a sink: the newest token was not evicted, so nothing is given again
    assert cache.length.tolist() == [9, 10]


def test_a_row_that_has_lost_all_of_its_tokens_begins_anew():
    for cache in (MODEL.new_cache(1, 128), MODEL.new_rolling_cache(1, 1, 4)):
        MODEL(random_ids(1, 9), cache=cache)
        cache.evict(lambda t: t.index >= 0)
        assert (cache.length.tolist(), cache.next_position.tolist()) == ([0], [0])
        assert_close(MODEL(random_ids(1, 1), cache=cache), MODEL(random_ids(1, 1)))


@pytest.mark.parametrize("kept", [0, 3, 85])
def test_a_rolling_cache_goes_on_from_evicted_newest_tokens(kept):
    """Their indices are given again, and the tokens that get them roll out in their turn, not at once."""
    session = Session(MODEL.new_rolling_cache(1, 30, 3, largest_append=40), forward=partial(MODEL, backend="dense"))
    for _ in range(100):
        session.append(1)
    (row,) = session.rows
    row.forget((row.tokens.index >= 3) & (row.tokens.index < row.rolled_out))  # evicting brings nothing back
    session.evict(lambda t: t.index >= kept)
    for _ in range(8):
        session.append(1)
        session.check()


def test_a_failed_step_takes_nothing_from_a_rolling_cache_but_what_the_window_has_passed():
    session = rolled(120)
    before = held_attributes(session.cache, 0)
    with pytest.raises(Broken):
        MODEL(random_ids(1, 1), cache=session.cache, mask=Mask(broken))
    assert held_attributes(session.cache, 0) == [
        token for token in before if token[0] < session.cache.sinks or token[0] > 120 - session.cache.window
    ]
    session.append(1)
    session.check()


def test_a_rolling_cache_is_cheap_to_describe():
    cache = MODEL.new_rolling_cache(2, 100, 3, largest_append=64)
    assert (cache.window, cache.sinks, str(cache.mask)) == (100, 3, "(sliding_window(100) | sink(3))")
    assert cache.largest_append >= 64
    with pytest.raises(ValueError, match=r"holds 256 tokens per sequence.*append fewer at a time"):
        MODEL(random_ids(2, cache.largest_append + 1), cache=cache)
    MODEL(random_ids(2, cache.largest_append), cache=cache)
    MODEL(random_ids(2, cache.largest_append), cache=cache)


# --- Generation ---


def greedy(cache: Cache, prompt: list[int], count: int) -> list[int]:
    tokens, ids = [], torch.tensor([prompt])
    for _ in range(count):
        ids = MODEL(ids, cache=cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return tokens


def test_generation_in_a_rolling_cache_passes_the_context():
    prompt, engine = random_ids(1, 100)[0].tolist(), Engine(MODEL)
    make = partial(MODEL.new_rolling_cache, 1, 30, 3, largest_append=128)
    cache = make()
    (one,) = engine.generate([prompt], max_new_tokens=CONTEXT, stop_token_ids=[], cache=cache)
    assert one.tokens == greedy(make(), prompt, CONTEXT)
    assert int(cache.length) == 100 + CONTEXT - 1
    (more,) = engine.generate([one.tokens[-1:]], max_new_tokens=5, stop_token_ids=[], cache=cache)
    assert len(more.tokens) == 5


def test_a_prompt_longer_than_a_rolling_cache_takes_at_once_is_cut_up():
    """One that has whole blocks of slots: 64 + 64 of 128."""
    prompt = random_ids(1, 150)[0].tolist()
    cache = MODEL.new_rolling_cache(1, 65, largest_append=64)
    (found,) = Engine(MODEL).generate([prompt], max_new_tokens=3, stop_token_ids=[], cache=cache)
    other = MODEL.new_rolling_cache(1, 65, largest_append=300)
    assert found.tokens == greedy(other, prompt, 3)


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


def test_beams():
    """Expanded, written, reordered with repeats, written: every beam goes on from its own past."""
    session = Session(MODEL.new_cache(1, 128))
    session.append(10)
    beams = session.expand(3)
    for order in ([2, 2, 0], [0, 1, 2], [1, 0, 1], [2, 1, 0]):
        beams.append(1)
        beams.reorder(order)
        beams.reorder([1, 2, 0])
        beams.check()
    beams.append(2)
    session.append(1)


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
        (lambda c: c.expand(0), "cannot make 0"),
        (lambda c: c.expand(-2), "cannot make -2"),
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
        (lambda c: c.evict(3), "tokens are chosen by"),
        (lambda c: c.evict(torch.tensor(3)), "tokens are chosen by"),
        (lambda c: c.evict([1.5]), "tokens are chosen by"),
        (lambda c: c.evict([True, False]), "tokens are chosen by"),
        (lambda c: c.evict(torch.zeros(3, 1, dtype=torch.long)), "tokens are chosen by"),
        (lambda c: c.evict(torch.zeros(2, 1, 1, dtype=torch.long)), "tokens are chosen by"),
        (lambda c: c.evict(lambda t: t.index), "not booleans"),
        (lambda c: c.evict(lambda t: t.index[:1] > 0), "not booleans"),
        (lambda c: c.evict(lambda t: True), "not booleans"),
        (lambda c: MODEL(random_ids(3, 1), cache=c), "2 rows, the input 3"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"window": 2.5}, "window must be a whole number, not 2.5"),
        ({"window": 5, "sinks": -1}, "sinks must be at least 0, not -1"),
        ({"window": 5, "sinks": True}, "sinks must be a whole number, not True"),
        ({"window": 5, "largest_append": 2.5}, "largest_append must be a whole number, not 2.5"),
        ({"window": 129, "largest_append": 0}, "largest_append|at least one"),
        ({"window": 200, "largest_append": -1}, "largest_append|at least one"),
    ],
)
def test_wrong_sizes_of_rolling_caches_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MODEL.new_rolling_cache(1, **arguments)


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


# --- Compiled ---


def graph_count() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_steps_serve_every_operation():
    """Slots that are freed and used again, rows that move, forks and expanded rows add no graph to those of a chunk and
    of a step."""
    forward = compiled_forward(MODEL)
    session = Session(MODEL.new_cache(2, 256), forward=forward)
    for count in (40, 1, 40, 1):
        session.append(count)
    compiled = graph_count()
    session.evict(list(range(5, 60)))
    for count in (40, 1, 40, 40, 40):
        session.append(count)
    session.evict(lambda t: t.index < 150)
    fork = session.fork()
    for each in (fork, session, fork):
        each.append(1)
    session.reorder([1, 1])
    session.append(40)
    session.truncate(190)
    session.append(1)
    fork.evict(torch.tensor([[160, 161], [162, 163]]))
    fork.append(1)
    root = Session(MODEL.new_cache(1, 256), forward=partial(MODEL, backend="dense"))
    root.append(129)
    beams = root.expand(2)
    beams.forward = forward
    for order in ([1, 0], [0, 0], [1, 1]):
        beams.append(1)
        beams.reorder(order)
        beams.append(40)
        beams.check()
        beams.evict(torch.arange(beams.rows[0].length - 60))
    root.append(1)
    assert len(forward.steps) == 2
    assert graph_count() == compiled


def test_a_compiled_step_serves_a_rolling_cache():
    forward = compiled_forward(MODEL)
    session = Session(MODEL.new_rolling_cache(2, 30, 3, largest_append=40), forward=forward)
    session.append(7)
    compiled = graph_count()
    for _ in range(40):
        session.append(7)
    session.truncate(283)
    session.append(7)
    session.reorder([1, 0])
    fork = session.fork()
    for each in (fork, session, fork):
        each.append(7)
        each.check()
    assert graph_count() == compiled


# --- What the comparisons would notice ---


def story() -> None:
    """A sequence that needs every operation to be right."""
    session = Session(MODEL.new_cache(2, 128))
    session.append(30)
    session.evict(list(range(3, 20)))
    session.append(5)
    session.reorder([1, 0])
    session.append(3)
    fork = session.fork()
    session.append(2)
    fork.append(4)
    session.append(1)


def evict_nothing(cache, tokens):
    pass


def move_attributes_only(cache, rows):
    cache.tokens = Tokens(*(x[rows] for x in cache.tokens))
    cache.rolled_out = cache.rolled_out[rows]


def write_what_is_shared(cache):
    pass


def test_the_story_holds():
    story()


@pytest.mark.parametrize(
    ("method", "wrong"),
    [("evict", evict_nothing), ("_select", move_attributes_only), ("_own_layers", write_what_is_shared)],
)
def test_a_wrong_operation_would_be_noticed(monkeypatch, method, wrong):
    monkeypatch.setattr(Cache, method, wrong)
    with pytest.raises(AssertionError, match="not close"):
        story()


def test_a_row_that_takes_another_ones_tokens_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Cache, "reorder", lambda cache, rows: None)
    with pytest.raises(AssertionError, match="not close"):
        story()


def widen_the_mask(cache):
    cache.mask = masks.sliding_window(cache.window + 1) | masks.sink(cache.sinks)


def narrow_the_mask(cache):
    cache.mask = masks.sliding_window(cache.window - 1) | masks.sink(cache.sinks)


def forget_too_early(cache):
    cache.window -= 1


@pytest.mark.parametrize("change", [widen_the_mask, narrow_the_mask, forget_too_early])
def test_a_rolling_window_of_another_width_would_be_noticed(change):
    session = rolled(80)
    change(session.cache)
    with pytest.raises(AssertionError, match="not close"):
        session.append(40)
