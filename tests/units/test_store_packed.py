"""Packed stores: which tokens lie in blocks, and that tokens make the same codes in whatever pieces they come."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regauge.cache.scheme import Scheme
from regauge.errors import RecipeError
from regauge.formats.grains import Group, Time, Token
from regauge.kernels.attention import Window, attend
from regauge.runtime.store.growing import Growing
from regauge.runtime.store.packed import Packed
from tests.stores import HEADS, SCHEMES, SIZE, asymmetric, kivi, tokens


def filled(scheme: Scheme, keys: Tensor, values: Tensor, cuts: Sequence[int] = ()) -> Packed:
    store, ends = Packed(scheme), [*cuts, keys.shape[2]]
    for start, end in zip([0, *cuts], ends, strict=True):
        store.take(keys[:, :, start:end], values[:, :, start:end])
    return store


def bytes_of(store: Packed) -> list[Tensor]:
    """Every block and multiplier, and the window."""
    assert store.keys_BHTD is not None
    assert store.values_BHTD is not None
    found = [memory[:, :, : store.rows] for memory in (store.keys_BHTD, store.values_BHTD)]
    for part in store.parts():
        for memory, offsets, layout in (
            (part.key_blocks, part.key_offsets_BK, part.keys),
            (part.value_blocks, part.value_offsets_BK, part.values),
        ):
            for at, length in zip(offsets.flatten().tolist(), part.lengths_BK.flatten().tolist(), strict=True):
                found.append(memory[at : at + length // layout.tokens * layout.bytes])
        for rows in (part.key_rows, part.value_rows):
            if rows is not None and part.row_offsets_BK is not None:
                for at, length in zip(
                    part.row_offsets_BK.flatten().tolist(), part.lengths_BK.flatten().tolist(), strict=True
                ):
                    found.append(rows[at : at + length])
    return found


def same(one: Packed, other: Packed) -> None:
    assert (one.length, one.origin) == (other.length, other.origin)
    for a, b in zip(bytes_of(one), bytes_of(other), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("count", [1, 7, 32, 72, 73, 200])
def test_what_is_sealed_is_a_function_of_what_was_seen(name: str, count: int) -> None:
    scheme = SCHEMES[name]
    store = filled(scheme, *tokens(count))
    block = scheme.tokens
    assert store.origin == scheme.sealed(count) == max(0, count - scheme.window) // block * block
    assert store.rows == count - store.origin
    assert store.rows < max(scheme.window, 1) + block
    lengths = [int(part.lengths_BK.max()) for part in store.parts()]
    assert lengths == ([store.origin] if store.origin else [])


@given(data=st.data())
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("name", SCHEMES)
def test_pieces_make_the_same_codes_as_the_whole(name: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 210))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=6)))
    keys, values = tokens(count, batch=1)
    same(filled(SCHEMES[name], keys, values, cuts), filled(SCHEMES[name], keys, values))


@pytest.mark.parametrize("name", SCHEMES)
def test_token_by_token_makes_the_same_codes_as_the_whole(name: str) -> None:
    keys, values = tokens(150)
    same(filled(SCHEMES[name], keys, values, range(1, 150)), filled(SCHEMES[name], keys, values))


def test_codes_by_hand() -> None:
    """Two bits by channel over 16 tokens: least and greatest of a channel are kept, what lies between in thirds."""
    store = Packed(Scheme(asymmetric(2, Time(16)), asymmetric(2, Group(4))))
    keys = torch.zeros(1, 1, 16, 4)
    keys[0, 0, :, 0] = torch.arange(16.0) / 5 + 100
    keys[0, 0, :, 1] = -7.0
    keys[0, 0, 0, 2], keys[0, 0, 1, 2] = 3.0, 1.9
    store.take(keys, keys.roll(1, 3))
    found, _ = store.read()
    step, low = float(torch.tensor(1.0).half()), 100.0
    expected = [low + step * code for code in (0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3)]
    assert found[0, 0, :, 0].tolist() == pytest.approx(expected, abs=1e-3)
    assert found[0, 0, :, 1].eq(-7).all(), "a channel of one value is that value"
    assert found[0, 0, :3, 2].tolist() == [3.0, 2.0, 0.0]


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_read_is_near_what_came_and_the_window_is_it(name: str) -> None:
    """Within the format's half step of every number: a quarter of a channel's range over 2^bits - 1, and rounding."""
    scheme, (keys, values) = SCHEMES[name], tokens(200)
    store = filled(scheme, keys, values)
    for fmt, found, given_BHTD in zip(scheme.formats, store.read(), (keys, values), strict=True):
        window = found[:, :, store.origin :], given_BHTD[:, :, store.origin :]
        torch.testing.assert_close(*window, atol=2e-5 if scheme.hadamard else 0.0, rtol=0.0)
        if fmt is None:
            assert found.equal(given_BHTD)
            continue
        error = (found - given_BHTD).square().mean().sqrt() / given_BHTD.std(2).mean()
        assert error < {1: 1.0, 2: 0.6, 3: 0.35, 4: 0.16, 8: 0.08}[fmt.grid.bits], (name, float(error))


def test_keys_by_channel_bear_a_bias_that_keys_by_token_do_not() -> None:
    keys, values = tokens(256, batch=1)
    by_channel = filled(Scheme(asymmetric(2, Time(32)), None), keys, values).read()[0]
    by_token = filled(Scheme(asymmetric(2, Token()), None), keys, values).read()[0]
    assert (by_channel - keys).square().mean() < 0.2 * (by_token - keys).square().mean()


def test_balancing_beats_plain_steps_where_one_token_is_heavy() -> None:
    keys, values = tokens(128, batch=1)
    keys[:, :, 17] *= 30
    plain = Scheme(asymmetric(4, Time(64)), asymmetric(4, Time(64)))
    even = Scheme(plain.keys, plain.values, balance=8)
    errors = [
        ((filled(scheme, keys, values).read()[0] - keys) / keys.std(3, keepdim=True)).square().mean()
        for scheme in (plain, even)
    ]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("name", ["kivi-4", "rotated-4", "balanced", "values alone"])
def test_attention_over_its_parts_is_attention_over_what_it_reads(name: str) -> None:
    """Padding on the left, two queries a head; coordinates are the store's."""
    scheme, (keys, values) = SCHEMES[name], tokens(150)
    store = filled(scheme, keys, values)
    plain = Packed(Scheme())
    plain.take(*store.read())
    q = torch.randn(2, 1, 2 * HEADS, SIZE, generator=torch.Generator().manual_seed(3))
    starts, found = [0, 130 if name == "kivi-4" else 20], []
    for one in (store, plain):
        turn = one._turned if one is store else (lambda *pair: pair)
        assert one.keys_BHTD is not None
        assert one.values_BHTD is not None
        first = torch.tensor(starts).clamp(min=one.origin).sub(one.origin).int().unsqueeze(1).expand(2, HEADS)
        window = Window(one.keys_BHTD[:, :, : one.rows], one.values_BHTD[:, :, : one.rows], None, first.contiguous())
        out = attend(turn(q, q)[0], one.parts(starts), window, 0.3)
        found.append(turn(out, out)[1])
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["kivi-2", "kv8", "rotated-4"])
def test_tokens_are_taken_back_within_the_window_and_beyond(name: str) -> None:
    scheme, (keys, values) = SCHEMES[name], tokens(200)
    store = filled(scheme, keys, values)
    whole = store.read()
    store.keep(store.origin + 1)
    assert store.rows == 1, "what is sealed stays so"
    for length in (store.origin - 1, scheme.tokens - 1, 1):
        store.keep(length)
        assert (store.length, store.origin) == (length, length // scheme.tokens * scheme.tokens)
        for found, before in zip(store.read(), whole, strict=True):
            torch.testing.assert_close(found, before[:, :, :length], atol=1e-5, rtol=0.0)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="a store of 1 tokens cannot go back to"):
            store.keep(wrong)
    store.keep(0)
    store.take(keys, values)
    same(store, filled(scheme, keys, values))


def test_nothing_is_sealed_while_a_rollback_is_recorded() -> None:
    scheme, (keys, values) = kivi(2), tokens(260)
    store = filled(scheme, keys[:, :, :100], values[:, :, :100])
    store.record()
    before = store.origin
    store.take(keys[:, :, 100:200], values[:, :, 100:200])
    assert store.origin == before
    store.keep(150)
    assert store.origin == scheme.sealed(150), "what is settled is sealed"
    store.take(keys[:, :, 150:160], values[:, :, 150:160])
    store.keep(160)
    store.take(keys[:, :, 160:], values[:, :, 160:])
    store.keep(260)
    same(store, filled(scheme, keys, values))


def test_a_store_that_is_held_seals_when_it_is_released() -> None:
    keys, values = tokens(200)
    store = Packed(kivi(4))
    store.hold()
    store.take(keys[:, :, :150], values[:, :, :150])
    store.take(keys[:, :, 150:], values[:, :, 150:])
    assert store.origin == 0
    store.release()
    same(store, filled(kivi(4), keys, values))


@pytest.mark.parametrize("name", ["kivi-2", "rotated-4", "balanced"])
def test_sequences_go_where_they_are_sent(name: str) -> None:
    keys, values = tokens(170, batch=3)
    store = filled(SCHEMES[name], keys, values)
    store.beside["mass"] = torch.arange(3.0)
    for index in ([2, 0, 0, 1], [1, 1], [0]):
        stamp = store.stamp
        store.reorder(torch.tensor(index))
        keys, values = keys[index], values[index]
        same(store, filled(SCHEMES[name], keys, values))
        assert store.stamp != stamp
    assert store.beside["mass"].tolist() == [0.0]


def test_copies_go_their_own_way() -> None:
    keys, values = tokens(170)
    store = filled(kivi(2), keys, values)
    copied = copy.deepcopy(store)
    assert copied.stamp != store.stamp
    copied.take(*tokens(70, seed=2))
    same(store, filled(kivi(2), keys, values))
    store.reset()
    assert (store.length, store.origin, store.bytes, store.parts()) == (0, 0, 0, ())


@pytest.mark.parametrize("name", ["kivi-2", "kivi-4", "kv8", "balanced"])
def test_bytes_are_those_of_the_formula(name: str) -> None:
    scheme = SCHEMES[name]
    for count, cuts in ((9000, ()), (9000, range(170, 9000, 170))):
        keys, values = (one.bfloat16() for one in tokens(count, batch=1, size=64))
        store = filled(scheme, keys, values, cuts)
        formula = scheme.bytes(count, HEADS, (64, 64))
        assert formula <= store.bytes <= 1.05 * formula
    two = Scheme(asymmetric(2, Time(32)), asymmetric(2, Group(32)), 128)
    assert two.bytes(16384, HEADS, (64, 64)) <= 0.2 * 16384 * HEADS * 128 * 2


def ragged(store: Packed, lengths: Sequence[int]) -> list[list[Tensor]]:
    draw, held = torch.Generator().manual_seed(9), store.origin
    rows = iter(lengths)
    return [[torch.randperm(held, generator=draw)[: next(rows)].sort().values for _ in range(HEADS)] for _ in range(2)]


@pytest.mark.parametrize("name", ["kivi-4", "kv8", "rotated-4", "keys alone", "balanced"])
def test_what_is_evicted_is_gone_and_what_stays_is_read(name: str) -> None:
    scheme, (keys, values) = SCHEMES[name], tokens(330)
    store = filled(scheme, keys, values)
    before, old = store.bytes, store.read()[0]
    block = scheme.tokens
    kept = ragged(store, [0, block, 3 * block, 2 * block, block, block])
    freed = store.evict(kept)
    assert freed == before - store.bytes > 0.2 * before
    assert store.length == 330
    (part,), held = store.parts(), store.held
    assert part.lengths_BK.flatten().tolist() == [0, block, 3 * block, 2 * block, block, block]
    assert held is not None
    found = store.read()[0]
    assert held.sum(2).sub(store.rows).tolist() == part.lengths_BK.tolist()
    spread = old.std(2, keepdim=True)
    for b, h in ((0, 1), (0, 2), (1, 0)):
        wanted = torch.cat((old[b, h, kept[b][h]], keys[b, h, store.origin :]))
        assert ((found[b, h, held[b, h]] - wanted) / spread[b, h]).square().mean() < 0.03
    store.take(*tokens(block, seed=4))
    assert store.parts()[0].lengths_BK.flatten().tolist() == [
        block,
        2 * block,
        4 * block,
        3 * block,
        2 * block,
        2 * block,
    ]
    store.reorder(torch.tensor([1, 1]))
    assert store.parts()[0].lengths_BK.tolist() == [[3 * block, 2 * block, 2 * block]] * 2
    store.keep(331)
    with pytest.raises(RuntimeError, match="a policy has let go of tokens among the first"):
        store.keep(scheme.sealed(330) - 1)


def test_rows_stay_as_they_came_where_nothing_is_rounded() -> None:
    keys, values = tokens(200)
    store = Packed(Scheme(window=8))
    store.take(keys, values)
    assert store.parts() == ()
    older = [[(keys[b, h, 32 * h : 96], values[b, h, 32 * h : 96]) for h in range(HEADS)] for b in range(2)]
    store.replace(older, window=8)
    found, held = store.read()[0], store.held
    assert held is not None
    for h in range(HEADS):
        assert found[1, h, held[1, h]].equal(torch.cat((keys[1, h, 32 * h : 96], keys[1, h, 192:])))
    store.take(*tokens(40, seed=1))
    assert store.rows == 8 + 8 + 40 - 32 - 8 or store.rows == 8 + 8
    with pytest.raises(ValueError, match="whole blocks of 32"):
        store.replace([[(keys[b, h, :9], values[b, h, :9]) for h in range(HEADS)] for b in range(2)])


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (kivi(2, group=16), "groups of 16 do not divide a width of 24"),
        (Scheme(asymmetric(2, Token()), None, balance=2), "time:32 or another group in time"),
    ],
)
def test_what_a_head_cannot_hold_is_refused(scheme: Scheme, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        filled(scheme, *tokens(200))


def test_a_head_without_a_hadamard_is_refused() -> None:
    with pytest.raises(RecipeError, match="heads of 12 channels have no Hadamard of 8"):
        Packed(Scheme(asymmetric(2, Token()), None, hadamard=True)).take(*tokens(3, size=12))


def test_a_turned_head_is_spread_over_all_its_runs() -> None:
    """24 channels are three runs of 8: a one becomes 1/sqrt(8) in each of its own."""
    from regauge.runtime.store.sealing import turned

    one = torch.zeros(24)
    one[9] = 1.0
    spread = turned(24)(one)
    assert spread.abs().tolist() == pytest.approx([0.0] * 8 + [1 / math.sqrt(8)] * 8 + [0.0] * 8)
    assert turned(24)(spread).tolist() == pytest.approx(one.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["kivi-2", "balanced"])
def test_stores_that_are_settled_together_hold_what_each_would(name: str) -> None:
    """Of two schemes and two lengths; the native step writes rows and leaves the rest to this."""
    from regauge.runtime.store.settling import settle

    schemes = [SCHEMES[name], SCHEMES["kv8"], SCHEMES[name], SCHEMES[name]]
    stores, alone = [], []
    for number, scheme in enumerate(schemes):
        keys, values = tokens(150 + (number == 3), seed=number)
        stores.append(filled(scheme, keys[:, :, :60], values[:, :, :60]))
        stores[-1].hold()
        stores[-1].take(keys[:, :, 60:], values[:, :, 60:])
        stores[-1].holding = False
        alone.append(filled(scheme, keys, values))
    settle([Growing(), *stores])
    for one, other in zip(stores, alone, strict=True):
        same(one, other)


def test_a_part_that_was_read_tells_of_blocks_that_come_later() -> None:
    """Where the memory is the same; so the native step need not be told where it lies again."""
    keys, values = tokens(200)
    store = filled(kivi(4), keys[:, :, :104], values[:, :, :104])
    (part,) = store.parts()
    copied = copy.deepcopy(store)
    store.take(keys[:, :, 104:136], values[:, :, 104:136])
    assert store.parts()[0] is part
    assert part.lengths_BK.eq(96).all()
    assert copied.parts()[0].lengths_BK.eq(64).all()
    store.keep(70)
    assert part.lengths_BK.eq(64).all()
    assert store.parts((3, 0))[0].firsts_BK.tolist() == [[3] * HEADS, [0] * HEADS]
    store.reorder(torch.tensor([1]))
    assert store.parts()[0] is not part
