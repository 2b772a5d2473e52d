"""Attention of the C++ kernels over packed parts and a window, against its definition in torch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parts import drawn, part_of, with_rows
from regauge.kernels.attention import Part, Window
from regauge.kernels.attention import attend as defined
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.store import Reading, Store, attend

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def off(q: Tensor, store: Store, reading: Reading, seen: int) -> float:
    """How far the kernels are from the definition, of the size of a value."""
    found = attend(q, store, reading, seen).double()
    rows = store.lengths_BK
    held = seen - store.origin
    keys, values = store.keys_BKCD, store.values_BKCD
    if rows is None:
        keys, values = keys[:, :, :held], values[:, :, :held]
    window = Window(keys.double(), values.double(), rows, store.firsts_BK, reading.look_back)
    wanted = defined(q.double(), store.parts, window, reading.scale, reading.softcap, reading.causal)
    return float((found - wanted).abs().max())


def stored(parts: tuple[Part, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Store:
    """A window of (B, K, rows, D) with two rows of room, full of NaN."""
    batch, heads, _, size = shape
    held = [torch.randn(shape, generator=seeded(seed + i)).to(dtype) for i in (0, 1)]
    room = torch.full((batch, heads, 2, size), torch.nan, dtype=dtype)
    return Store(*(torch.cat((one, room), 2) for one in held), parts=parts)


def layouts(bits: int, size: int, axes: tuple[str, str], groups: tuple[int, int], low: bool) -> list[BlockLayout]:
    offset = 0 if low else 1 << (bits - 1)
    pairs = zip(("keys", "values"), axes, groups, strict=True)
    return [BlockLayout(role, 32, size, bits, axis, group, low, offset) for role, axis, group in pairs]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("axes", list(itertools.product(("time", "channels"), repeat=2)), ids="-".join)
def test_every_number_of_bits_along_both_axes(bits: int, low: bool, axes: tuple[str, str]) -> None:
    """What rounding queries and probabilities adds is less than a thirtieth of a value at one and two bits, a
    hundredth at three and four; of codes of more bits, whose queries are rounded to 16 bits, less than a thousandth."""
    for size, group in ((64, 3), (24, 1)):
        groups = tuple(32 if axis == "time" else size for axis in axes)
        keys, values = layouts(bits, size, axes, (groups[0], groups[1]), low)
        part = part_of(keys, values, torch.tensor([[64, 320]]), seeded(bits))
        store = stored((part,), (1, 2, 9, size), torch.float32)
        q = torch.randn(1, 1, 2 * group, size, generator=seeded(9))
        assert off(q, store, Reading(size**-0.5), 9) < (3e-2 if bits <= 2 else 1e-2 if bits <= 4 else 1e-3)


@pytest.mark.parametrize("size", [8, 16, 32, 40, 96, 128, 256])
def test_head_sizes_and_queries_in_groups(size: int) -> None:
    for group, bits in ((1, 2), (2, 4), (5, 3), (7, 8)):
        keys, values = layouts(bits, size, ("time", "channels"), (32, size), True)
        part = part_of(keys, values, torch.tensor([[96]]), seeded(size))
        store = stored((part,), (1, 1, 5, size), torch.bfloat16)
        q = torch.randn(1, 1, group, size, generator=seeded(group))
        assert off(q, store, Reading(size**-0.5), 5) < 1e-2


GROUPS = [  # keys, values: (tokens, bits, axis, group)
    ((64, 2, "time", 16), (64, 2, "channels", 32)),
    ((128, 4, "time", 128), (128, 4, "channels", 16)),
    ((16, 4, "time", 16), (16, 3, "channels", 64)),
    ((32, 2, "channels", 16), (32, 4, "time", 8)),
    ((32, 8, "channels", 4), (32, 8, "time", 4)),
    ((32, 4, "time", 4), (32, 4, "channels", 4)),
    ((32, 3, "channels", 2), (32, 5, "time", 2)),
    ((512, 2, "time", 512), (512, 6, "time", 512)),
    ((48, 3, "time", 48), (48, 1, "time", 48)),
]


@pytest.mark.parametrize(("one", "other"), GROUPS)
def test_groups_of_any_size_that_divides(one: tuple[int, int, str, int], other: tuple[int, int, str, int]) -> None:
    """Also those that integers do not multiply."""
    built = [
        BlockLayout(role, tokens, 64, bits, axis, group, low=True, dtype=torch.bfloat16)
        for role, (tokens, bits, axis, group) in zip(("keys", "values"), (one, other), strict=True)
    ]
    part = part_of(built[0], built[1], torch.tensor([[one[0] * 3, 0]]), seeded(1))
    store = stored((part,), (1, 2, 3, 64), torch.float16)
    q = torch.randn(1, 1, 6, 64, generator=seeded(2))
    assert off(q, store, Reading(0.125), 3) < 1e-2


def test_floats_of_eight_bits_and_rows_of_sixteen() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        keys = BlockLayout("keys", 16, 40, 16, dtype=dtype)
        values = BlockLayout("values", 16, 40, 8, "channels", 40, grid="e4m3")
        part = part_of(keys, values, torch.tensor([[48, 16]]), seeded(0))
        swapped = part_of(
            replace(values, role="keys"), replace(keys, role="values"), torch.tensor([[0, 32]]), seeded(1)
        )
        store = stored((part, swapped), (1, 2, 4, 40), torch.float32)
        assert off(torch.randn(1, 1, 4, 40, generator=seeded(3)), store, Reading(0.2), 4) < 1e-5


@pytest.mark.parametrize("new", [1, 2, 5, 16])
def test_ragged_heads_padding_multipliers_and_several_new_tokens(new: int) -> None:
    keys, values = layouts(8, 32, ("time", "channels"), (32, 32), True)
    first = part_of(keys, values, torch.tensor([[640, 32], [0, 2080]]), seeded(1))
    first = replace(first, firsts_BK=torch.tensor([[300, 0], [0, 31]], dtype=torch.int32))
    second = with_rows(part_of(keys, values, torch.tensor([[0, 64], [96, 32]]), seeded(2)), seeded(3))
    store = stored((first, second), (2, 2, 40, 32), torch.bfloat16)
    store = replace(store, lengths_BK=torch.tensor([[40, 17], [30, 16]], dtype=torch.int32))
    store = replace(store, firsts_BK=torch.tensor([[0, 3], [11, 0]], dtype=torch.int32))
    q = torch.randn(2, new, 6, 32, generator=seeded(new))
    for softcap in (0.0, 3.0):
        assert off(q, store, Reading(0.3, softcap), 40) < 1e-3


def test_a_window_alone_of_any_length() -> None:
    for rows, new, size, dtype in (
        (1, 1, 64, torch.bfloat16),
        (700, 3, 48, torch.float16),
        (1500, 40, 20, torch.float32),
    ):
        store = stored((), (1, 2, rows, size), dtype)
        q = torch.randn(1, new, 4, size, generator=seeded(rows))
        for reading in (Reading(0.2), Reading(0.2, look_back=37), Reading(0.2, 5.0, causal=False)):
            assert off(q, store, reading, rows) < 1e-5
    exact = replace(store, firsts_BK=torch.tensor([[5, 1490]], dtype=torch.int32))
    assert off(torch.randn(1, 2, 2, 20, generator=seeded(0)), exact, Reading(0.2), 1500) < 1e-5


def test_threads_and_a_second_run_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = layouts(2, 64, ("time", "channels"), (32, 64), True)
    part = part_of(keys, values, torch.tensor([[4096, 1024, 2048]]), seeded(1))
    store = stored((part,), (1, 3, 50, 64), torch.bfloat16)
    q = torch.randn(1, 1, 9, 64, generator=seeded(5))
    found = []
    for threads in (1, 2, 3, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(attend(q, store, Reading(0.125), 50))
    assert all(one.equal(found[0]) for one in found)
    assert off(q, store, Reading(0.125), 50) < 1e-2


def test_one_large_score_among_many_small_ones_keeps_the_small_ones() -> None:
    """A thousand tokens of equal score beside one that has half of the probability: 8 bits of one scale would lose
    them, and with them half of the answer."""
    keys = BlockLayout("keys", 32, 16, 8, "channels", 16)
    values = BlockLayout("values", 32, 16, 4, "channels", 16)
    codes = torch.zeros(32, 32, 16, dtype=torch.uint8)
    codes[0, 0] = 1
    mixed = torch.full((32, 32, 16), 9, dtype=torch.uint8)
    mixed[0, 0] = 1
    ones = torch.ones(32, 32)
    lengths, offsets = torch.tensor([[1024]], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)
    blocks = keys.pack(codes, ones).flatten(), values.pack(mixed, ones).flatten()
    part = Part(keys, values, *blocks, offsets, offsets, lengths)
    store = stored((part,), (1, 1, 1, 16), torch.float32)
    store.keys_BKCD[..., 0, :] = -100.0  # of no account
    q = torch.full((1, 1, 1, 16), 6.93 / 16)  # e^6.93 is 1023
    assert off(q, store, Reading(1.0), 1) < 5e-2


def test_what_cannot_be_read_is_told() -> None:
    keys, values = layouts(4, 32, ("time", "channels"), (32, 32), True)
    part = part_of(keys, values, torch.tensor([[32]]), seeded(0))
    store = stored((part,), (1, 1, 4, 32), torch.float32)
    q = torch.zeros(1, 1, 2, 32)
    with pytest.raises(ValueError, match="looks back only so far, which the attention does not read"):
        attend(q, store, Reading(1.0, look_back=5), 4)
    with pytest.raises(ValueError, match="do not fit 1 KV heads, or 2 starts"):
        attend(q, store, Reading(1.0), 4, [0, 0])
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(q, store, Reading(1.0), 7)
    wider = part_of(keys, values, torch.tensor([[32, 32]]), seeded(0))
    with pytest.raises(ValueError, match="lengths of a part are int32 of shape"):
        replace(store, parts=(wider,))
    small = layouts(4, 16, ("time", "channels"), (32, 16), True)
    other = part_of(small[0], small[1], torch.tensor([[32]]), seeded(0))
    with pytest.raises(ValueError, match="heads of 16 and 16 channels stands before a window of heads of 32"):
        replace(store, parts=(other,))
    with pytest.raises(ValueError, match="24 channels has no Hadamard"):
        Store(torch.zeros(1, 1, 2, 24), torch.zeros(1, 1, 2, 24), hadamard=(True, False))
    assert drawn(keys, 0, seeded(0)).shape == (0, keys.bytes)


NEAR = st.one_of(st.integers(-40, 600), st.sampled_from([-(1 << 31), (1 << 31) - 1]))


@given(
    st.tuples(st.sampled_from([16, 32, 64]), st.integers(1, 40), st.integers(1, 9), st.integers(1, 33)),
    st.tuples(st.sampled_from(["time", "channels"]), st.booleans(), st.integers(0, 3)),
    st.tuples(NEAR, NEAR, NEAR, NEAR),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_any_numbers_are_read_or_refused(
    sizes: tuple[int, int, int, int], kind: tuple[str, bool, int], places: tuple[int, int, int, int], new: int
) -> None:
    """Never a crash: blocks of zeros, so that what is read is finite."""
    tokens, size, bits, group = sizes
    axis, low, offset = kind
    try:
        pair = [BlockLayout(role, tokens, size, bits, axis, group, low, offset) for role in ("keys", "values")]
        memory = [torch.zeros(40 * layout.bytes, dtype=torch.uint8) for layout in pair]
        offsets = [torch.tensor([[place]], dtype=torch.int64) for place in places[:2]]
        length, first = (torch.tensor([[place]], dtype=torch.int32) for place in places[2:])
        part = Part(pair[0], pair[1], *memory, *offsets, length // tokens * tokens, first)
        found = attend(torch.ones(1, new, 3, size), stored((part,), (1, 1, 5, size), torch.float32), Reading(0.1), 5)
    except ValueError:
        return
    assert found.isfinite().all()
