"""Grids, scales and packing against other implementations: torch's float8 casts and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP6_E2M3_DATA
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor

from regauge.formats.base import Format, Grid
from regauge.formats.grains import Channel, Group, Token
from regauge.formats.grids import E2M1, E2M3, E4M3, E5M2, Int
from regauge.formats.rangers import AbsMax, Dynamic, MinMax
from regauge.formats.readings import dynamic
from regauge.formats.scales import Float32, PowerOfTwo, TwoLevel
from regauge.kernels.reference import pack, packed_bytes, unpack


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(grid: Grid) -> Tensor:
    """Many magnitudes, every grid value, and every tie between two of them."""
    values = grid.table[~grid.table.isnan()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    return torch.cat([values, ties, draws(0, 20_000) * grid.high, draws(1, 20_000) * grid.high / 100]).clamp(
        grid.low, grid.high
    )


@pytest.mark.parametrize(("grid", "dtype"), [(E4M3(), torch.float8_e4m3fn), (E5M2(), torch.float8_e5m2)])
def test_8_bit_floats_are_torch_s(grid: Grid, dtype: torch.dtype) -> None:
    z = dense(grid)
    assert torch.equal(grid.snap(z), z.to(dtype).float())
    assert torch.equal(grid.encode(grid.snap(z)), z.to(dtype).view(torch.uint8))
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    ours = grid.table
    assert torch.equal(ours.nan_to_num(0), torch.where(theirs.isfinite(), theirs, 0.0))


@pytest.mark.parametrize(("grid", "cast"), [(E2M1(), FP4_E2M1_DATA.cast_to_fp4), (E2M3(), FP6_E2M3_DATA.cast_to_fp6)])
def test_4_and_6_bit_floats_are_compressed_tensors(grid: Grid, cast: object) -> None:
    z = dense(grid)
    assert callable(cast)
    assert torch.equal(grid.snap(z), cast(z.clone()))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 96, 101])
def test_packing_is_pack_quantized(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns), generator=torch.Generator().manual_seed(columns)).to(torch.uint8)
    theirs = pack_to_int32((codes.int() - (1 << (bits - 1))).to(torch.int8), bits)
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_bytes(columns, bits))
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    assert torch.equal(padded.contiguous().view(torch.int32), theirs)
    back = unpack_from_int32(padded.contiguous().view(torch.int32), bits, torch.Size((5, columns)))
    assert torch.equal(back.int() + (1 << (bits - 1)), codes.int())
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_packing_many_rows_is_packing_each() -> None:
    codes = torch.randint(0, 8, (700, 501), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )  # over one chunk
    packed = pack(codes, 3)
    assert torch.equal(packed, torch.cat([pack(row_I[None], 3) for row_I in codes]))
    assert torch.equal(unpack(packed, 3, 501), codes)
    assert torch.equal(pack(codes.T.contiguous().T, 3), packed)


def args_of(bits: int, kind: str, strategy: str, **options: object) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type=QuantizationType(kind), strategy=QuantizationStrategy(strategy), **options
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_groups_are_compressed_tensors(bits: int, symmetric: bool) -> None:
    w_OI = draws(2, 13, 64) * 0.05
    args = args_of(bits, "int", "group", group_size=16, symmetric=symmetric)
    grouped = w_OI.unflatten(1, (4, 16))
    scale_ON, zero_ON = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    theirs = fake_quantize(w_OI, scale_ON, zero_ON, args)
    fmt = Format(Int(bits, symmetric), Group(16), AbsMax() if symmetric else MinMax(), Float32())
    codes = fmt.encode(w_OI)
    assert torch.allclose(codes.step.scale_G1.view(13, 4), scale_ON, rtol=1e-6)
    if codes.step.zero_G1 is not None:
        assert torch.equal(codes.step.zero_G1.view(13, 4) - 2.0 ** (bits - 1), zero_ON.float())
    near = (fmt.decode(codes) - theirs).abs() <= 1e-6 * w_OI.abs().max()
    assert float(near.float().mean()) > 0.97  # the extremes lie on a tie by construction: 1 ulp of the step decides
    step = codes.step
    exact = quantize(w_OI, step.scale_G1.view(13, 4), zero_ON, args) + 2.0 ** (bits - 1)
    assert torch.equal(codes.codes_OI.float(), exact)


def test_fp8_channels_are_compressed_tensors() -> None:
    w_OI = draws(3, 13, 64) * 0.05
    args = args_of(8, "float", "channel", symmetric=True)
    scale_O1, zero_O1 = calculate_qparams(w_OI.amin(1, keepdim=True), w_OI.amax(1, keepdim=True), args)
    fmt = Format(E4M3(), Channel(), AbsMax(), Float32())
    codes = fmt.encode(w_OI)
    assert torch.equal(codes.step.scale_G1, scale_O1)
    assert torch.equal(fmt.decode(codes), fake_quantize(w_OI, scale_O1, zero_O1, args))


def test_nvfp4_is_compressed_tensors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w_OI = (draws(4, 16, 96) * 0.05).to(dtype).float()
        global_1 = generate_gparam(w_OI.min(), w_OI.max())
        args = args_of(4, "float", "tensor_group", group_size=16, symmetric=True, scale_dtype=torch.float8_e4m3fn)
        grouped = w_OI.unflatten(1, (6, 16))
        scale_ON, zero_ON = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=global_1)
        theirs = quantize(w_OI, scale_ON, zero_ON, args, global_scale=global_1)
        fmt = Format(E2M1(), Group(16), AbsMax(), TwoLevel())
        codes = fmt.encode(w_OI)
        assert torch.equal(codes.step.fields["global_scale"], global_1)
        assert torch.equal(codes.step.fields["scale"].float().view(16, 6), scale_ON.float())
        assert torch.equal(fmt.grid.decode(codes.codes_OI), theirs)
        packed = pack(codes.codes_OI, 4)
        assert torch.equal(packed, pack_fp4_to_uint8(theirs))
        assert torch.equal(unpack_fp4_from_uint8(packed, 16, 96, torch.float32), fmt.grid.decode(codes.codes_OI))
        assert torch.equal(fmt.decode(codes), fake_quantize(w_OI, scale_ON, zero_ON, args, global_scale=global_1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_is_compressed_tensors(dtype: torch.dtype) -> None:
    w_OI = (draws(5, 300, 96) * 0.05).to(dtype).float()
    w_OI[0, :32] = torch.linspace(-1.75, 1.75, 32)  # on the threshold
    w_OI[1, :32] = torch.linspace(-4.0, 4.0, 32)
    args = args_of(4, "float", "group", group_size=32, symmetric=True, scale_dtype=torch.uint8)
    grouped = w_OI.unflatten(1, (3, 32))
    # Their scale as bytes: `generate_mx_scales` before it becomes a float.
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    bytes_ON = generate_mx_scales(grouped.abs().amax(-1), num_bits=4)
    fmt = Format(E2M1(), Group(32), AbsMax(), PowerOfTwo())
    codes = fmt.encode(w_OI)
    assert torch.equal(codes.step.fields["scale"].view(300, 3).float(), bytes_ON.float())
    scale_ON = torch.exp2(bytes_ON.float() - 127)
    assert torch.equal(codes.step.scale_G1.view(300, 3), scale_ON)
    assert torch.equal(fmt.decode(codes), fake_quantize(w_OI, scale_ON, None, args))


@pytest.mark.parametrize(
    ("grid", "kind", "symmetric"), [(Int(8), "int", True), (Int(8, False), "int", False), (E4M3(), "float", True)]
)
def test_activations_are_compressed_tensors_token_by_token(grid: Grid, kind: str, symmetric: bool) -> None:
    x = draws(6, 3, 17, 40) * torch.logspace(-2, 1, 17)[:, None]
    args = args_of(8, kind, "token", dynamic=True, symmetric=symmetric)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    ours, theirs = dynamic(Format(grid, Token(), Dynamic(), Float32())).simulate(x), fake_quantize(x, scale, zero, args)
    if symmetric:
        assert torch.equal(ours, theirs)
    else:
        assert float((ours != theirs).float().mean()) < 1e-3
        assert bool(((ours - theirs).abs() <= 1.001 * scale).all())
