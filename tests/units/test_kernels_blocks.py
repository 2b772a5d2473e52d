"""Blocks of a packed cache and the definition of attention over them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regauge.kernels.attention import Part, Window, attend
from regauge.kernels.blocks import BlockLayout


def drawn(layout: BlockLayout, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, steps and lows of so many blocks."""
    rng = torch.Generator().manual_seed(seed)
    most = 0x7E if layout.grid == "e4m3" else (1 << layout.bits) - 1
    codes = torch.randint(0, most + 1, (count, layout.tokens, layout.channels), generator=rng, dtype=torch.uint8)
    steps = torch.rand(count, layout.groups, generator=rng) + 0.5
    lows = torch.randn(count, layout.groups, generator=rng) if layout.low else None
    return codes, steps.to(layout.dtype).float(), None if lows is None else lows.to(layout.dtype).float()


def layouts() -> list[BlockLayout]:
    found = []
    for bits in range(1, 9):
        for role in ("keys", "values"):
            found.append(BlockLayout(role, 32, 24, bits, "time", 16, low=True))
            found.append(BlockLayout(role, 48, 20, bits, "channels", 5, offset=1 << (bits - 1), dtype=torch.bfloat16))
    return found


@pytest.mark.parametrize("layout", layouts(), ids=lambda one: f"{one.role}-{one.bits}-{one.axis}")
def test_what_is_packed_is_unpacked(layout: BlockLayout) -> None:
    codes, steps, lows = drawn(layout, 3)
    blocks = layout.pack(codes, steps, lows)
    assert blocks.shape == (3, layout.bytes)
    again, own_steps, own_lows = layout.unpack(blocks)
    assert again.equal(codes)
    assert own_steps.equal(steps)
    assert (own_lows is None) == (lows is None)
    assert own_lows is None or lows is None or own_lows.equal(lows)


def test_a_block_of_keys_written_out_by_hand() -> None:
    layout = BlockLayout("keys", 16, 8, 4, "channels", 8, low=True)
    codes = torch.zeros(1, 16, 8, dtype=torch.uint8)
    codes[0, 3, 1], codes[0, 3, 6] = 5, 9  # token 3: channel 1 is of the first piece, channel 6 of the second
    steps, lows = torch.full((1, 16), 2.0), torch.full((1, 16), -1.0)
    block = layout.pack(codes, steps, lows)[0]
    assert layout.bytes == 16 * 2 * 2 + 64
    assert block[:2].view(torch.float16).item() == 2.0
    assert block[32:34].view(torch.float16).item() == -1.0
    planes = block[64:].tolist()
    assert planes[4 * 3 + 1] == 5
    assert planes[4 * 3 + 2] == 9 << 4
    assert sum(planes) == 5 + (9 << 4)
    decoded = layout.decode(block[None])
    assert decoded[0, 3, 1].item() == 2 * 5 - 1
    assert decoded[0, 0, 0].item() == -1.0


def test_a_block_of_values_lies_across_tokens() -> None:
    layout = BlockLayout("values", 16, 16, 8, "time", 16, offset=128)
    codes = torch.full((1, 16, 16), 128, dtype=torch.uint8)
    codes[0, 6, 2] = 131  # token 6 is byte 2 of the second piece, channel 2 its lane
    steps = torch.ones(1, 16)
    steps[0, 2] = 0.5
    block = layout.pack(codes, steps)[0]
    assert block[32 + 64 + 4 * 2 + 2].item() == 131
    assert layout.decode(block[None])[0, 6, 2].item() == 1.5
    assert layout.decode(block[None]).abs().sum().item() == 1.5


def test_steps_along_time_and_along_channels_are_spread_over_their_groups() -> None:
    codes = torch.ones(1, 32, 4, dtype=torch.uint8)
    time = BlockLayout("keys", 32, 4, 4, "time", 16)
    steps = torch.arange(8.0)[None]  # (2 groups of time, 4 channels)
    decoded = time.decode(time.pack(codes, steps))[0]
    assert decoded[0].tolist() == [0, 1, 2, 3]
    assert decoded[31].tolist() == [4, 5, 6, 7]
    channels = BlockLayout("values", 32, 4, 4, "channels", 2)
    steps = torch.arange(64.0)[None]  # (32 tokens, 2 groups of channels)
    decoded = channels.decode(channels.pack(codes, steps))[0]
    assert decoded[5].tolist() == [10, 10, 11, 11]


def test_floats_and_rows() -> None:
    floats = BlockLayout("values", 16, 8, 8, "channels", 8, grid="e4m3")
    held = torch.linspace(-3, 3, 128).view(1, 16, 8).to(torch.float8_e4m3fn)
    decoded = floats.decode(floats.pack(held.view(torch.uint8), torch.full((1, 16), 0.5)))
    assert decoded.equal(held.float() * 0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rows = BlockLayout("keys", 16, 3, 16, dtype=dtype)
        x = torch.randn(2, 16, 3).to(dtype)
        assert rows.bytes == 48 * dtype.itemsize
        assert rows.decode(rows.rows(x)).equal(x.float())


def test_bytes_of_the_usual_blocks() -> None:
    assert BlockLayout("keys", 32, 64, 2, "time", 32, low=True).bytes == 32 * 64 // 4 + 64 * 2 * 2
    assert BlockLayout("values", 32, 64, 4, "channels", 64, low=True).bytes == 32 * 64 // 2 + 32 * 2 * 2
    assert (
        BlockLayout("keys", 32, 8, 3, "time", 32).bytes == 32 * 32 * 3 // 8 + 16 * 2
    )  # padded to 32 channels, and to 16 steps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"role": "key"}, "'key' is no role of a block.*keys"),
        ({"tokens": 24}, "a multiple of 16 tokens"),
        ({"bits": 9}, "1 to 8 bits"),
        ({"group": 24}, "groups of 24 do not divide the 32 tokens"),
        ({"offset": 2}, "stands beside lows"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"grid": "e4m3"}, "have 8 bits"),
    ],
)
def test_layouts_that_there_are_not(change: dict[str, object], said: str) -> None:
    layout = BlockLayout("keys", 32, 64, 4, "time", 32, low=True)
    with pytest.raises(ValueError, match=said):
        replace(layout, **change)  # type: ignore[arg-type]


def a_part(lengths: list[list[int]], seed: int = 0, rows: bool = True) -> Part:
    """Keys of 3 bits along time, values of 2 bits along channels, of heads of 8 channels."""
    keys = BlockLayout("keys", 16, 8, 3, "time", 16, low=True)
    values = BlockLayout("values", 16, 8, 2, "channels", 4, low=True)
    lengths_BK = torch.tensor(lengths, dtype=torch.int32)
    blocks = int(lengths_BK.sum()) // 16
    before = (lengths_BK.flatten().cumsum(0) - lengths_BK.flatten()).view_as(lengths_BK).long()
    multipliers = torch.rand(blocks * 16) + 0.5
    return Part(
        keys,
        values,
        keys.pack(*drawn(keys, blocks, seed)).flatten(),
        values.pack(*drawn(values, blocks, seed + 1)).flatten(),
        before // 16 * keys.bytes,
        before // 16 * values.bytes,
        lengths_BK,
        key_rows=multipliers if rows else None,
        value_rows=1 / multipliers if rows else None,
        row_offsets_BK=before if rows else None,
    )


def naive(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> list[float]:
    scores = [float(q @ key) * scale for key in keys]
    scores = [softcap * math.tanh(score / softcap) for score in scores] if softcap else scores
    chances = [math.exp(score) for score in scores]
    mixed = sum(chance * value for chance, value in zip(chances, values, strict=True))
    return (torch.as_tensor(mixed) / sum(chances)).tolist()


def test_attention_over_ragged_parts_and_a_window_is_that_over_all_their_tokens() -> None:
    torch.manual_seed(3)
    parts = [a_part([[32, 16], [0, 48]]), a_part([[16, 0], [16, 16]], seed=7, rows=False)]
    parts[1] = replace(parts[1], firsts_BK=torch.tensor([[5, 0], [0, 16]], dtype=torch.int32))
    keys, values = torch.randn(2, 2, 7, 8, dtype=torch.float64), torch.randn(2, 2, 7, 8, dtype=torch.float64)
    lengths, firsts = (
        torch.tensor([[7, 4], [6, 3]], dtype=torch.int32),
        torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
    )
    q = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for softcap in (0.0, 2.0):
        out = attend(q, parts, Window(keys, values, lengths, firsts), 0.3, softcap)
        for b, j, h in [(0, 0, 0), (0, 2, 2), (1, 0, 5), (1, 1, 3), (0, 1, 4), (1, 2, 1)]:
            k = h // 3
            last = int(lengths[b, k]) - 3 + j + 1
            read = [part.read(b, k) for part in parts]
            rows = slice(int(firsts[b, k]), last)
            all_keys = torch.cat([*(r[0] for r in read), keys[b, k, rows]])
            all_values = torch.cat([*(r[1] for r in read), values[b, k, rows]])
            assert out[b, j, h].tolist() == pytest.approx(
                naive(q[b, j, h], all_keys, all_values, 0.3, softcap), abs=1e-9
            )


def test_multipliers_of_tokens_and_blocks_that_do_not_lie_in_order() -> None:
    part = a_part([[32]])
    swapped = replace(
        part,
        key_blocks=part.key_blocks.view(2, -1).flip(0).flatten(),
        value_blocks=part.value_blocks.view(2, -1).flip(0).flatten(),
    )
    assert part.key_rows is not None
    keys, values = part.read(0, 0)
    decoded = part.keys.decode(part.key_blocks.view(2, -1)).view(32, 8)
    assert keys.equal(decoded * part.key_rows[:, None])
    assert not swapped.read(0, 0)[0].equal(keys)
    assert values.shape == (32, 8)


def test_a_window_alone_is_causal_and_looks_back_as_far_as_it_says() -> None:
    torch.manual_seed(0)
    keys, values, q = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 2, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, (), Window(keys, values), 0.5)
    assert out[0, 0, 0].allclose(expected(q[0, 0, 0][None], keys[0, 0, :5], values[0, 0, :5], scale=0.5)[0], atol=1e-6)
    out = attend(q, (), Window(keys, values, look_back=2), 0.5)
    assert out[0, 1, 0].allclose(expected(q[0, 1, 0][None], keys[0, 0, 4:], values[0, 0, 4:], scale=0.5)[0], atol=1e-6)
    out = attend(q, (), Window(keys, values), 0.5, causal=False)
    assert out[0, 0, 0].allclose(expected(q[0, 0, 0][None], keys[0, 0], values[0, 0], scale=0.5)[0], atol=1e-6)
    nothing = Window(keys, values, firsts_BK=torch.tensor([[6]], dtype=torch.int32))
    assert attend(q, (), nothing, 0.5).eq(0).all()


def test_parts_that_do_not_fit_are_told_in_a_sentence() -> None:
    part = a_part([[32, 16]])
    wrong = {
        "whole blocks of 16 tokens": {"lengths_BK": torch.tensor([[32, 8]], dtype=torch.int32)},
        "reach past": {"lengths_BK": torch.tensor([[32, 32]], dtype=torch.int32)},
        "lengths of a part are torch.int32": {"lengths_BK": torch.tensor([[32, 16]])},
        "key offsets of a part are torch.int64": {"key_offsets_BK": torch.zeros(1, 1, dtype=torch.int64)},
        "of as many tokens each": {"values": replace(part.values, tokens=32)},
        "bytes in one piece": {"key_blocks": part.key_blocks.float()},
        "with an offset for each head": {"row_offsets_BK": None},
        "lies within its part": {"firsts_BK": torch.tensor([[0, 17]], dtype=torch.int32)},
    }
    for said, change in wrong.items():
        with pytest.raises(ValueError, match=said):
            replace(part, **change)
    with pytest.raises(ValueError, match="reads a window alone"):
        attend(torch.zeros(1, 1, 2, 8), [part], Window(*(torch.zeros(1, 2, 1, 8),) * 2, look_back=3), 1.0)
