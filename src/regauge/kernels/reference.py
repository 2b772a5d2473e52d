"""The definition of every packed operation, in plain torch. Faster kernels override these and are tested against them.

Packed layout: a row of codes is one dense stream of bits, lowest bit first. Element i of b bits starts at bit i·b, so
a code may straddle two bytes, and only the end of a row is padded (with zero bits, to a whole byte). Padded to 32 bits
and viewed as little-endian int32 it is the layout of compressed-tensors' `pack_quantized`.

Shapes and dtypes of the public functions are checked under pytest (jaxtyping), and cost nothing elsewhere.

Legend: O output channels, I input channels, B bytes in a packed row, T tokens, N groups along a row.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64, Integer, Shaped, UInt8
from torch import Tensor

CHUNK = 1 << 17
"""Elements worked on at a time, so that temporaries stay in a core's second-level cache."""


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return (columns * bits + 7) // 8


def pack(codes_OI: UInt8[Tensor, "O I"], bits: int) -> UInt8[Tensor, "O B"]:
    """Dense rows of bits.

    Args:
        codes_OI: uint8, each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 (O, ceil(I · bits / 8)).

    Cost: eight shifts on 64-bit words for every eight codes; one pass at 8 bits.
    """
    rows, columns = codes_OI.shape
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    if bits == 8:
        return codes_OI.contiguous()
    packed_OB = torch.empty(rows, packed_bytes(columns, bits), dtype=torch.uint8, device=codes_OI.device)
    step = max(1, CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        part_OI = codes_OI[start : start + step]
        if columns % 8:
            part_OI = torch.nn.functional.pad(part_OI, (0, -columns % 8))
        packed_OB[start : start + step] = _pack_eights(part_OI, bits)[:, : packed_OB.shape[1]]
    return packed_OB


def _pack_eights(codes_OI: Tensor, bits: int) -> Tensor:
    """Rows of a multiple of eight codes: every eight make `bits` bytes."""
    rows = codes_OI.shape[0]
    if bits in (1, 2, 4):  # a byte holds whole codes
        lanes = codes_OI.reshape(rows, -1, 8 // bits)
        byte = lanes[..., 0].clone()
        for lane in range(1, 8 // bits):
            byte |= lanes[..., lane] << (bits * lane)
        return byte
    lanes = codes_OI.reshape(rows, -1, 8).long()
    word = lanes[..., 0].clone(memory_format=torch.contiguous_format)  # one element keeps its stride otherwise
    for lane in range(1, 8):
        word |= lanes[..., lane] << (bits * lane)
    return word.view(torch.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)


def unpack(packed_OB: UInt8[Tensor, "O B"], bits: int, columns: int) -> UInt8[Tensor, "O {columns}"]:
    """Codes (O, I), uint8, of rows that `pack` made."""
    rows, width = packed_OB.shape
    if width != packed_bytes(columns, bits):
        raise ValueError(f"a row of {columns} codes of {bits} bits is {packed_bytes(columns, bits)} bytes, not {width}")
    if bits == 8:
        return packed_OB
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8, device=packed_OB.device)
    step = max(1, CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        codes_OI[start : start + step] = _unpack_rows(packed_OB[start : start + step], bits)[:, :columns]
    return codes_OI


def _unpack_rows(packed_OB: Tensor, bits: int) -> Tensor:
    rows, width = packed_OB.shape
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_OB.device)
        return ((packed_OB.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(rows, -1)
    if width % bits:
        packed_OB = torch.nn.functional.pad(packed_OB, (0, -width % bits))
    eights = torch.zeros(rows, packed_OB.shape[1] // bits, 8, dtype=torch.uint8, device=packed_OB.device)
    eights[..., :bits] = packed_OB.reshape(rows, -1, bits)
    word = eights.view(torch.int64)  # (rows, eights, 1)
    shifts = torch.arange(0, 8 * bits, bits, device=packed_OB.device, dtype=torch.int64)
    return ((word >> shifts) & ((1 << bits) - 1)).to(torch.uint8).reshape(rows, -1)


def dequantise(
    codes_OI: UInt8[Tensor, "O I"],
    table: Float32[Tensor, " codes"],
    scale_ON: Float[Tensor, "#O N"],
    zero_ON: Float[Tensor, "#O N"] | None = None,
) -> Float[Tensor, "O I"]:
    """Weights of codes: scale · (table[code] − zero), float32.

    Args:
        codes_OI: uint8.
        table: float32, the grid's value of each code.
        scale_ON: a step for each of N equal groups along a row; N divides I, and O may be 1 (one step for the matrix).
        zero_ON: the grid value that decodes to 0.
    """
    rows, columns = codes_OI.shape
    groups = scale_ON.shape[1]
    w_ONK = table[codes_OI.int()].view(rows, groups, columns // groups)
    if zero_ON is not None:
        w_ONK = w_ONK - zero_ON.unsqueeze(-1)
    return (w_ONK * scale_ON.unsqueeze(-1)).view(rows, columns)


def linear(
    x_TI: Float[Tensor, "*T I"],
    packed_OB: UInt8[Tensor, "O B"],
    bits: int,
    table: Float32[Tensor, " codes"],
    scale_ON: Float[Tensor, "#O N"],
    zero_ON: Float[Tensor, "#O N"] | None = None,
    bias_O: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*T O"]:
    """x Wᵀ + b with W packed: unpack, dequantise, multiply in the dtype of `x`."""
    w_OI = dequantise(unpack(packed_OB, bits, x_TI.shape[-1]), table, scale_ON, zero_ON)
    return torch.nn.functional.linear(x_TI, w_OI.to(x_TI.dtype), bias_O)


def embedding(
    ids: Integer[Tensor, "*T"],
    packed_OB: UInt8[Tensor, "O B"],
    bits: int,
    columns: int,
    table: Float32[Tensor, " codes"],
    scale_ON: Float[Tensor, "#O N"],
    zero_ON: Float[Tensor, "#O N"] | None = None,
) -> Float[Tensor, "*T {columns}"]:
    """Rows of a packed table, float32; only the rows asked for are unpacked."""
    row = ids.reshape(-1)
    steps = scale_ON if scale_ON.shape[0] == 1 else scale_ON[row]
    zeros = zero_ON if zero_ON is None or zero_ON.shape[0] == 1 else zero_ON[row]
    rows_OI = dequantise(unpack(packed_OB[row], bits, columns), table, steps, zeros)
    return rows_OI.view(*ids.shape, columns)


def integer_matmul(x_TI: Shaped[Tensor, "T I"], w_OI: Shaped[Tensor, "O I"]) -> Int64[Tensor, "T O"]:
    """Exact product x Wᵀ of integer tensors, int64.

    float64 carries it: |x|, |w| ≤ 255 and I < 2^36 stay below 2^53.
    """
    return (x_TI.double() @ w_OI.double().T).long()


def plane_matmul(
    x_TI: UInt8[Tensor, "T I"], w_OI: UInt8[Tensor, "O I"], x_bits: int, w_bits: int
) -> Int64[Tensor, "T O"]:
    """Exact product x Wᵀ of unsigned codes of any two widths, int64, by planes of single bits (ABQ-LLM, 2408.08554).

    X = Σ 2^s X_s and W = Σ 2^t W_t, so X Wᵀ = Σ 2^(s+t) popcount(X_s & W_t): work grows with the product of the widths,
    whatever they are. Signed codes z − offset give the same with the terms of the offsets beside it.

    Args:
        x_TI, w_OI: each below 2^bits.
        x_bits, w_bits: 1 to 8.
    """
    for name, codes, bits in (("x", x_TI, x_bits), ("w", w_OI, w_bits)):
        if not 1 <= bits <= 8 or (codes.numel() and int(codes.max()) >> bits):
            raise ValueError(f"codes of {name} are below 2^bits for 1 to 8 bits; bits is {bits}")
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=x_TI.device)
    total_TO = torch.zeros(len(x_TI), len(w_OI), dtype=torch.int64, device=x_TI.device)
    planes = [(s, pack((x_TI >> s) & 1, 1)) for s in range(x_bits)]
    for t in range(w_bits):
        w_OB = pack((w_OI >> t) & 1, 1)
        for s, x_TB in planes:
            both_TOB = x_TB[:, None] & w_OB[None]
            total_TO += ones[both_TOB.int()].sum(-1, dtype=torch.int64) << (s + t)
    return total_TO
