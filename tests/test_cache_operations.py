"""What a cache holds after any sequence of operations, told by the logits of the tokens that come next."""

from functools import partial

import pytest
import torch
from cache_helpers import (
    KINDS,
    LONGEST,
    MODEL,
    ONE_LAYER,
    VOCAB,
    Row,
    Session,
    assert_close,
    graph_count,
    held_attributes,
    random_ids,
)
from helpers import compiled_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_flex import Llama, Mask, masks
from llama_flex.cache import Cache
from llama_flex.tokens import Tokens

# --- Any sequence of operations ---

COUNTS = st.sampled_from([1, 1, 1, 2, 3, 17, 127, 128, 129])
NUMBERS = st.integers(0, 99)


class Operations(RuleBasedStateMachine):
    """Up to four caches, forked and expanded from each other, written in any order."""

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
    """The same with rolling caches, except what test_cache_rolling.py covers: truncating to the sinks, and evicting the
    newest tokens."""

    def new_cache(self, batch, blocks):
        return MODEL.new_rolling_cache(batch, 30, 3, largest_append=blocks * 40)

    def positions(self, session, kind, real):
        # The default position follows the highest one held, so after a restart it depends on what is forgotten when.
        return super().positions(session, kind if kind == "gap" else "default", real)

    def least(self, session):
        return session.cache.sinks + 1

    def evicted(self, how, some, session):
        shortest = min(row.length for row in session.rows)
        return torch.tensor([shortest - i for i in some if 1 < i <= shortest], dtype=torch.long)


class NarrowOperations(RollingOperations):
    """Windows of one and two tokens: going back by one token leaves nothing but sinks, which do not tell the length."""

    def new_cache(self, batch, blocks):
        return MODEL.new_rolling_cache(batch, 1 + blocks // 2, 3 + blocks // 2, largest_append=40)

    def positions(self, session, kind, real):
        return None  # when all but the sinks are gone, positions go on as if there had been no gap


def examples(count: int) -> settings:
    """Return the settings for `count` sequences of operations."""
    return settings(deadline=None, max_examples=count, stateful_step_count=14)


class TestOperations(Operations.TestCase):
    settings = examples(4)


class TestRollingOperations(RollingOperations.TestCase):
    settings = examples(3)


class TestNarrowOperations(NarrowOperations.TestCase):
    settings = examples(2)


@pytest.mark.exhaustive
class TestManyOperations(Operations.TestCase):
    settings = examples(30)


@pytest.mark.exhaustive
class TestManyRollingOperations(RollingOperations.TestCase):
    settings = examples(20)


@pytest.mark.exhaustive
class TestManyNarrowOperations(NarrowOperations.TestCase):
    settings = examples(20)


# --- Against a fresh run over the survivors ---


def fresh_logits(model: Llama, row: Row, mask: Mask | None = None) -> torch.Tensor:
    """Compute the logits after the last token held, as if only the tokens held had ever been there."""
    ids, (_, positions, segments) = row.ids[row.held], (x[row.held] for x in row.tokens)
    return model(ids[None], positions=positions[None], segments=segments[None], mask=mask, backend="dense")[0, -1]


@pytest.mark.exhaustive
@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "evict", "truncate", "fork"]), st.integers(0, 130)), min_size=3, max_size=9
    )
)
def test_one_layer_goes_on_as_from_the_survivors_alone(operations):
    """A key in the first layer depends on its own token alone, so evicted tokens leave no trace."""
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
    """Segments do not see each other: evicting a whole one leaves no trace, in any number of layers."""
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


@pytest.mark.exhaustive
def test_a_truncated_cache_goes_on_as_a_fresh_one():
    ids, cache = random_ids(2, 300), MODEL.new_cache(2, 300)
    MODEL(ids[:, :290], cache=cache)
    for length in (257, 256, 128, 127, 1, 0):
        cache.truncate(length)
        assert cache.room == 384 - length
        branch = cache.fork()
        assert_close(MODEL(ids[:, length : length + 3], cache=branch), MODEL(ids[:, : length + 3])[:, length:])


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


# --- Compiled ---


@pytest.mark.exhaustive
def test_compiled_steps_serve_every_operation():
    """Slots that are freed and used again, rows that move, forks and expanded rows need no graphs beyond those of a
    chunk and of a step."""
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


# --- What the comparisons would notice ---


def story() -> None:
    """Run a sequence of operations that shows a fault in any of them."""
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
