"""Decode attention over packed states against its definition, and the definition against torch's own attention."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from gpu.operands import encoded, far, guarded, random
from regauge.kernels import attention, triton
from regauge.kernels.attention import PackedStates

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def moved(states: PackedStates, device: torch.device, dtype: torch.dtype = torch.float32) -> PackedStates:
    zero = None if states.zero_SKCN is None else guarded(states.zero_SKCN.to(dtype), device)
    packed, scale = guarded(states.packed_SKCB, device), guarded(states.scale_SKCN.to(dtype), device)
    return dataclasses.replace(states, packed_SKCB=packed, scale_SKCN=scale, zero_SKCN=zero)


def poisoned(states: PackedStates, lengths: list[int]) -> PackedStates:
    """The same cache with NaN steps in the room that no token has taken yet."""
    scale = states.scale_SKCN.clone()
    for sequence, length in enumerate(lengths):
        scale[sequence, :, length:] = math.nan
    return dataclasses.replace(states, scale_SKCN=scale)


def cut(states: PackedStates, sequences: int, room: int) -> PackedStates:
    """The first of its sequences and of its room, without zero points."""
    packed, scale = (t[:sequences, :, :room] for t in (states.packed_SKCB, states.scale_SKCN))
    return dataclasses.replace(states, packed_SKCB=packed, scale_SKCN=scale, zero_SKCN=None)


def cache(
    bits: tuple[int, int],
    groups: tuple[int, int],
    shape: tuple[int, int, int, int],
    value_channels: int,
    symmetric: bool,
) -> tuple[PackedStates, PackedStates]:
    keys = encoded(random(*shape, seed=1), bits[0], groups[0], symmetric)
    return keys, encoded(random(*shape[:3], value_channels, seed=2) + 1, bits[1], groups[1], symmetric)


@pytest.mark.parametrize(
    ("bits", "groups", "symmetric"),
    [
        ((4, 4), (1, 1), False),
        ((4, 4), (4, 2), True),
        ((8, 4), (1, 8), False),
        ((8, 8), (2, 1), False),
        ((8, 8), (1, 1), True),
        ((2, 1), (4, 4), False),
    ],
)
def test_packed_states(bits: tuple[int, int], groups: tuple[int, int], symmetric: bool, device: torch.device) -> None:
    lengths = [65, 1, 0, 131]
    keys, values = cache(bits, groups, (4, 2, 131, 32), 32, symmetric)
    keys, values = poisoned(keys, lengths), poisoned(values, lengths)
    q = random(4, 6, 32)
    held = torch.tensor(lengths)
    wanted = attention.decode_attention(q.double().float(), keys, values, held)
    for parts in (1, 3):
        y = triton.decode_attention(
            *(guarded(q, device), moved(keys, device), moved(values, device), held.to(device)), parts=parts
        )
        assert far(y, wanted) < ROUNDING[torch.float32]
        assert torch.equal(y[2].cpu(), torch.zeros(6, 32))


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "value_channels"), [(5, 5, 17, 23), (34, 2, 80, 80), (3, 1, 64, 16)]
)
def test_odd_heads_and_channels(
    heads: int, kv_heads: int, channels: int, value_channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    keys, values = cache((4, 8), (1, 1), (2, kv_heads, 71, channels), value_channels, False)
    q, held = random(2, heads, channels).to(dtype), torch.tensor([13, 71], dtype=torch.int32)
    wanted = attention.decode_attention(q.float(), keys, values, held, scaling=0.3)
    y = triton.decode_attention(
        *(guarded(q, device), moved(keys, device), moved(values, device), held.to(device)), scaling=0.3, parts=2
    )
    assert y.dtype == dtype
    assert y.shape == (2, heads, value_channels)
    assert far(y, wanted) < ROUNDING[dtype]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_scores_far_from_zero(parts: int, device: torch.device) -> None:
    """Scores of ±1,000s, whose exponentials overflow; the greatest lies in the first part, or in the last."""
    states = random(1, 1, 300, 16, seed=1)
    states[0, 0, 7], states[0, 0, 293] = 40.0, -40.0
    keys, values = encoded(states, 8), encoded(random(1, 1, 300, 16, seed=2), 8)
    on = moved(keys, device), moved(values, device), torch.tensor([300], device=device)
    for sign, winner in ((1.0, 7), (-1.0, 293)):
        q = torch.full((1, 1, 16), 40.0 * sign)
        y = triton.decode_attention(q.to(device), *on, parts=parts)
        torch.testing.assert_close(y.cpu()[0, 0], attention.decode(values)[0, 0, winner], rtol=1e-5, atol=1e-5)


def test_room_for_no_token(device: torch.device) -> None:
    keys, values = cache((8, 8), (1, 1), (2, 1, 3, 16), 16, False)
    q, none = random(2, 4, 16).to(device), torch.zeros(2, dtype=torch.int64, device=device)
    on = [moved(cut(states, 2, 0), device) for states in (keys, values)]
    assert torch.equal(triton.decode_attention(q, on[0], on[1], none), torch.zeros_like(q))
    on = [moved(cut(states, 0, 3), device) for states in (keys, values)]
    assert triton.decode_attention(q[:0], on[0], on[1], none[:0]).shape == (0, 4, 16)


def test_the_operator_is_registered_rightly(device: torch.device) -> None:
    keys, values = (moved(s, device) for s in cache((4, 8), (1, 1), (2, 1, 3, 16), 16, False))
    k: tuple[object, ...] = (keys.packed_SKCB, keys.scale_SKCN, keys.zero_SKCN, 4)
    v: tuple[object, ...] = (values.packed_SKCB, values.scale_SKCN, values.zero_SKCN, 8, 16)
    lengths: Tensor = torch.tensor([3, 2], device=device)
    torch.library.opcheck(
        torch.ops.regauge_triton.decode_attention.default,
        (random(2, 4, 16).to(device), *k, *v, lengths, 0.25, 2),
        test_utils=("test_schema", "test_faketensor"),
    )
