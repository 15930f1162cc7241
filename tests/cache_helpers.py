"""What the cache tests share: a reference without slots, and a session that does everything to a cache and to it.

The reference keeps each row as a plain list of all tokens that it ever held, with which of them were held when each one
arrived, and computes the logits by one dense forward without a cache. So what a token's keys and values took from
tokens that were evicted later is in them by construction, and where the tokens lie in memory is not.

Comparisons allow twice what the reference itself differs by between float32 and float64.
"""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from llama_flex import Llama, LlamaConfig, Mask, masks
from llama_flex.cache import Cache
from llama_flex.tokens import Token, Tokens

VOCAB = 64
CONTEXT = 192
LONGEST = 600  # tokens of the longest history of a row; the budget is measured at this length


def tiny(layers: int) -> Llama:
    """Return a random model with weights large enough for every visible token to matter."""
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
    """Return token ids `[batch, count]`, the same ones for the same seed."""
    return torch.randint(VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


MODEL, ONE_LAYER = tiny(2), tiny(1)
_exact = copy.deepcopy(MODEL).double()(random_ids(2, LONGEST), backend="dense")
BUDGET = 2 * (MODEL(random_ids(2, LONGEST), backend="dense") - _exact).abs().max().item()
assert_close = partial(torch.testing.assert_close, rtol=0, atol=BUDGET)


# --- The reference ---


class Row:
    """The tokens that a row ever held, in their order of arrival, as far as what it holds now depends on them."""

    def __init__(self) -> None:
        self.ids = torch.empty(0, dtype=torch.long)
        self.tokens = Tokens(*(torch.empty(0, dtype=torch.long) for _ in range(3)))
        self.held = torch.empty(0, dtype=torch.bool)
        self.seen = torch.empty(0, 0, dtype=torch.bool)  # [q, kv]: was kv held when q arrived, or did it arrive with q?
        self.rolled_out = 0  # a rolling window has passed the tokens before this index
        self.may_have_rolled_out = 0  # the same, with steps that failed

    def copy(self) -> "Row":
        """Return a row with the same history."""
        return copy.copy(self)  # no tensor is ever changed in place

    @property
    def length(self) -> int:
        """The index of the next token."""
        return max(self.tokens.index[self.held].tolist(), default=-1) + 1

    @property
    def next_position(self) -> int:
        """The default position of the next token."""
        return max(self.tokens.position[self.held].tolist(), default=-1) + 1

    def append(self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> None:
        """Let tokens arrive."""
        count = len(ids)
        arriving = Tokens(self.length + torch.arange(count), positions, segments)
        self.ids = torch.cat([self.ids, ids])
        self.tokens = Tokens(*map(torch.cat, zip(self.tokens, arriving, strict=True)))
        self.held = torch.cat([self.held, torch.ones(count, dtype=torch.bool)])
        earlier = torch.cat([self.seen, torch.zeros(len(self.seen), count, dtype=torch.bool)], dim=1)
        self.seen = torch.cat([earlier, self.held.expand(count, -1)])

    def forget(self, chosen: torch.Tensor) -> None:
        """Drop tokens, and with them all history that nothing held depends on."""
        self.held = self.held & ~chosen
        needed = self.held
        while not torch.equal(more := needed | self.seen[needed].any(0), needed):
            needed = more
        self.ids, self.held = self.ids[needed], self.held[needed]
        self.tokens = Tokens(*(x[needed] for x in self.tokens))
        self.seen = self.seen[needed][:, needed]

    def attributes(self) -> list[tuple[int, ...]]:
        """Return (index, position, segment) of every token held, sorted."""
        return sorted(zip(*(x[self.held].tolist() for x in self.tokens), strict=True))


def held_attributes(cache: Cache, row: int) -> list[tuple[int, ...]]:
    """Return (index, position, segment) of every token that a row of a cache holds, sorted."""
    return sorted(token for token in zip(*(x[row].tolist() for x in cache.tokens), strict=True) if token[0] >= 0)


def table_mask(tables: list[torch.Tensor], size: int) -> Mask:
    """Return the mask of one table of booleans for each row, over the order of arrival."""
    table = torch.zeros(len(tables), size, size, dtype=torch.bool)
    for padded, given_table in zip(table, tables, strict=True):
        padded[: len(given_table), : len(given_table)] = given_table
    return Mask(lambda q, kv: table[q.batch, q.index, kv.index])


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """Stack rows of different lengths, zeros after the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def expected_logits(model: Llama, rows: list[Row], rules) -> torch.Tensor:
    """Compute the logits of every row's whole history, `[B, N, V]`; rules: who sees whom, one for each layer."""
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


# A mask, and the same for each layer as a function of plain tensors.
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
    """Raised in the middle of a step."""


def broken(*given):
    """Fail as a mask, a score function or a hook, but not where a function is tried on one token before any work."""
    if not isinstance(given[-1], Token) or given[-1]._tokens.index.numel() > 1:
        raise Broken
    return given[0] if len(given) == 3 else given[-1].index >= 0


@contextmanager
def failing_layer():
    """Make steps of MODEL fail in the last layer, when all attributes and most keys are written."""
    hook = MODEL.layers[-1].mlp.register_forward_pre_hook(broken)
    try:
        yield
    finally:
        hook.remove()


class Session:
    """A cache and the reference side by side: both undergo every operation, and every append compares the logits."""

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
        """Return a session of another cache with the same mask and the same source of token ids."""
        return Session(cache, rows, self.kind, self.forward, self.draws)

    def append(self, count, lengths=None, positions=None, segments=None) -> None:
        """Append tokens and compare their logits. positions, segments: of each row's real tokens, or the defaults."""
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
        """Note which tokens a rolling window has passed."""
        if self.cache.window is not None:
            for row in self.rows:
                row.rolled_out = max(row.rolled_out, row.length + 1 - self.cache.window)
                row.may_have_rolled_out = max(row.rolled_out, row.may_have_rolled_out)

    def fail(self, count: int) -> None:
        """Run a step that fails in its last layer."""
        reserved = self.cache.reserved
        with failing_layer(), pytest.raises(Broken):
            self.forward(random_ids(len(self.rows), count), cache=self.cache, mask=self.mask)
        assert self.cache.reserved == reserved
        for row in self.rows:
            row.may_have_rolled_out = max(row.may_have_rolled_out, row.length + 1 - (self.cache.window or 0))

    def truncate(self, length: int) -> None:
        """Truncate both; a rolling cache must refuse if what the next token would see is gone."""
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
        """Tell whether the token at index `length` would see tokens that are gone."""
        end = min(row.length, length)
        if self.cache.window is None:
            return False
        return max(self.cache.sinks, end + 1 - self.cache.window) < min(rolled_out, end)

    def evict(self, tokens) -> None:
        """Evict from both; tokens: see `Cache.evict`."""
        self.cache.evict(tokens)
        for number, row in enumerate(self.rows):
            if callable(tokens):
                row.forget(tokens(row.tokens))
            else:
                indices = torch.as_tensor(tokens)
                row.forget(torch.isin(row.tokens.index, indices if indices.dim() == 1 else indices[number]))

    def fork(self) -> "Session":
        """Fork both."""
        return self.beside(self.cache.fork(), [row.copy() for row in self.rows])

    def expand(self, n: int) -> "Session":
        """Expand both."""
        return self.beside(self.cache.expand(n), [row.copy() for row in self.rows for _ in range(n)])

    def reorder(self, order: list[int]) -> None:
        """Reorder both."""
        self.cache.reorder(order)
        self.rows = [self.rows[i].copy() for i in order]

    def check(self) -> None:
        """Compare the attributes of all tokens held, and check the counts that follow from them."""
        cache, rows = self.cache, self.rows
        assert cache.length.tolist() == [row.length for row in rows]
        assert cache.next_position.tolist() == [row.next_position for row in rows]
        for number, row in enumerate(rows):
            held, expected = held_attributes(cache, number), row.attributes()
            if cache.window is None:
                assert held == expected
            else:  # a cache may keep tokens that no later one sees
                seen_next = recent(cache.window, cache.sinks)
                q = Tokens(*torch.tensor([row.length, 0, 0]))
                visible = {t for t in expected if seen_next(q, Tokens(*torch.tensor(t))).item()}
                assert visible <= set(held) <= set(expected)
        if cache.window is None:
            assert max(int(row.held.sum()) for row in rows) <= cache.reserved <= cache.max_length
            assert cache.room == cache.largest_append == cache.max_length - cache.reserved


def storage(cache: Cache) -> list[int]:
    """Return the addresses of a cache's keys and values."""
    return [x.data_ptr() for kv in cache.layers for x in (kv.k, kv.v)]


def filled(batch=2, count=20, slots=128) -> Cache:
    """Return a cache that holds `count` tokens in every row."""
    cache = MODEL.new_cache(batch, slots)
    MODEL(random_ids(batch, count), cache=cache)
    return cache


def rolled(count: int, window=30, sinks=3, chunk=40, batch=1) -> Session:
    """Return a session of a rolling cache after `count` tokens."""
    session = Session(MODEL.new_rolling_cache(batch, window, sinks, largest_append=chunk))
    while count:
        session.append(min(chunk, count))
        count -= min(chunk, count)
    return session


def graph_count() -> int:
    """Return how many graphs torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
