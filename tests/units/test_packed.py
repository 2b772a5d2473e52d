"""Packed matrices: whatever way holds them, the product is that of the decoded weights, to the dtype's rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from artifacts import Choice, choice, decode, encode
from regauge import parts
from regauge.errors import ModelError
from regauge.formats.grids import E4M3, Int
from regauge.kernels.cpu.library import available, level
from regauge.kernels.cpu.matrix import FEW
from regauge.runtime import capabilities
from regauge.runtime.matrices import int4, lookup
from regauge.runtime.matrices.modules import PackedLinear, PackedMatrix
from regauge.runtime.matrices.multiply import blocks

FORMS = {
    "int2": choice("int2", "group:32", "bf16"),
    "int3": choice("int3", "group:32", "bf16"),
    "int3-asym": choice("int3-asym", "group:32", "f16", "minmax"),
    "int4": choice("int4", "group:32", "bf16"),
    "int4-asym": choice("int4-asym", "group:64", "bf16", "minmax"),
    "int4 channel": choice("int4", "channel", "f32"),
    "int5": choice("int5", "group:32", "f32"),
    "int6-asym": choice("int6-asym", "channel", "bf16", "minmax"),
    "int7": choice("int7", "group:16", "bf16"),
    "int8": choice("int8", "channel", "f32"),
    "int8 group": choice("int8", "group:32", "bf16"),
    "int8-asym": choice("int8-asym", "channel", "f32", "minmax"),
    "int8 tensor": choice("int8", "tensor", "f32"),
    "nf4": choice("nf4", "group:64", "bf16"),
    "ternary": choice("ternary", "group:32", "bf16"),
    "fp4": choice("fp4", "group:32", "bf16"),
    "nvfp4": choice("fp4", "group:16", "nv"),
    "mxfp4": choice("fp4", "group:32", "e8m0"),
    "m2": choice("fp4", "group:32", "m2"),
    "fp6": choice("fp6", "channel", "f32"),
    "fp8": choice("fp8", "channel", "f32"),
    "fp8-e5m2": choice("fp8-e5m2", "group:64", "m1"),
    "super": choice("int4-asym", "group:32", "super:6", "minmax"),
    "f16-low": choice("int3-asym", "group:32", "f16-low", "minmax"),
    "super-low": choice("int2-asym", "group:16", "super-low:4", "minmax"),
    "channel super-low": choice("int4-asym", "channel", "super-low:6", "minmax"),
    "lorc low": choice("int4-asym", "group:32", "super-low:6", "minmax", lorc=3),
    "lorc": choice("int3", "group:32", "bf16", lorc=3),
    "w8a8": choice("int8", "channel", "f32", inputs="int8"),
    "w4a8": choice("int4", "group:32", "bf16", inputs="int8"),
    "fp8 inputs": choice("fp8", "channel", "f32", inputs="fp8"),
}
ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Of one number, relative to the largest: what a dtype brings."""
SIXTEEN, EIGHT = 4e-5, 1e-2
"""Of a product, relative to its norm: what rounding activations to 16 bits a group brings (2e-5 measured; 3e-5 with
nf4, whose table is rounded too), and to 8 (6e-3)."""


def expected(packed: PackedMatrix, tokens: int) -> float:
    """The error that this product may have, relative to its norm."""
    own = ROUNDING[packed.dtype]
    if not packed.way.name.startswith("panels"):
        return own
    assert packed.native is not None
    half, bits = packed.dtype != torch.float32, packed.native.bits
    if tokens <= FEW:
        return own + (EIGHT if half and bits <= 4 else SIXTEEN)
    return own + (EIGHT if half and bits <= 4 and level() == "vnni" else 0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(how: Choice, rows: int, columns: int, dtype: torch.dtype) -> tuple[PackedMatrix, torch.Tensor]:
    """A packed matrix of random weights, and the weights that its codes stand for."""
    codes = encode(random(rows, columns), how)
    return PackedMatrix(codes, parts.format_of(how.point), dtype, "cpu", how.activations), decode(codes, how)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_product_is_that_of_the_decoded_weights(form: str, dtype: torch.dtype) -> None:
    how = FORMS[form]
    packed, w_OI = matrix(how, 208, 192, dtype)  # 208 rows: torch's int4 layout ends in a shorter block
    for tokens in (1, 3, 17, 100):  # few and many take different ways
        x = random(tokens, 192, seed=1).to(dtype)
        seen = x if how.activations is None else how.activations.simulate(x)
        wanted = seen.double() @ w_OI.double().T
        assert (packed(x).double() - wanted).norm() <= expected(packed, tokens) * wanted.norm(), packed.way.name
    weights = packed.rows(7, 150)
    assert (weights.double() - w_OI[7:150]).abs().max() <= ROUNDING[dtype] * w_OI.abs().max()
    some = torch.tensor([207, 0, 63, 64, 129, 0])
    assert (packed.take(some).double() - w_OI[some]).abs().max() <= ROUNDING[dtype] * w_OI.abs().max()


@pytest.mark.parametrize("form", [form for form in FORMS if "group" not in form])
def test_odd_shapes(form: str) -> None:
    inputs = None if FORMS[form].activations is None else "int8"
    how = choice(FORMS[form].point.name("grid"), "channel", "f32", "minmax" if "asym" in form else "absmax", inputs)
    packed, w_OI = matrix(how, 31, 29, torch.float32)
    x = random(2, 5, 29, seed=1)
    assert packed(x).shape == (2, 5, 31)
    wanted = (x if how.activations is None else how.activations.simulate(x)) @ w_OI.T
    assert (packed(x) - wanted).norm() <= expected(packed, 10) * wanted.norm()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("int4", "int4"),
        ("int4-asym", "int4"),
        ("int4 channel", "int4"),
        ("int8", "int8"),
        ("w8a8", "int8 x int8"),
        ("int3", "decoded"),
        ("nf4", "decoded"),
        ("int8 group", "decoded"),
        ("w4a8", "int4, int8 inputs simulated"),
    ],
)
def test_which_way_is_taken(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = FORMS[form]
    if available():
        inputs = {"w8a8": ", int8 inputs", "w4a8": ", int8 inputs"}.get(form, "")
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            assert matrix(how, 64, 128, dtype)[0].way.name == f"panels{inputs}"
    monkeypatch.setattr(capabilities, "available", lambda: False)
    packed, _ = matrix(how, 64, 128, torch.bfloat16)
    assert packed.way.name == name
    assert packed.native is None
    if how.activations is None:
        assert matrix(how, 64, 128, torch.float32)[0].way.name == "decoded"  # torch's kernels are slow in float32


@pytest.mark.parametrize("form", FORMS)
def test_only_packed_bytes_are_held(form: str) -> None:
    how = FORMS[form]
    packed, _ = matrix(how, 64, 128, torch.bfloat16)
    assert not list(packed.parameters())
    held = sum(
        b.numel() * b.element_size() for name, b in packed.named_buffers() if "_" not in name and "terms" not in name
    )
    assert held <= 1.15 * parts.format_of(how.point).bytes((64, 128)) + 64 * 4


def test_integers_of_odd_bits_are_planes() -> None:
    """By hand: 5 bits are a plane of 4 and one of 1."""
    assert lookup.planes(Int(5)) == ((4, 0), (1, 4))
    assert lookup.planes(Int(7)) == ((4, 0), (2, 4), (1, 6))
    assert lookup.planes(E4M3()) == ((8, 0),)
    codes = torch.tensor([[0, 1, 16, 31, 17, 15, 30, 2]], dtype=torch.uint8)
    low, high = lookup.split(codes, Int(5))
    assert low.tolist() == [[0x10, 0xF0, 0xF1, 0x2E]]
    assert high.tolist() == [[0b01011100]]
    assert lookup.decode([low, high], Int(5), 8, torch.bfloat16).tolist() == [[-16, -15, 0, 15, 1, -1, 14, -14]]


@pytest.mark.parametrize("rows", [16, 64, 80, 128, 208])
def test_the_layout_of_torchs_int4_kernel_is_read_back(rows: int) -> None:
    codes = torch.randint(16, (rows, 34), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = int4.convert(codes)
    assert int4.usable()
    assert int4.rows(packed, (rows, 34), 0, rows).equal(codes)
    assert int4.rows(packed, (rows, 34), 5, 14).equal(codes[5:14])
    index = torch.tensor([rows - 1, 0, 3])
    assert int4.take(packed, (rows, 34), index).equal(codes[index])
    for start, stop, z_In in int4.columns(packed, (rows, 34), torch.float32):
        assert z_In.t().equal(codes[start:stop].float() - 8)


def test_blocks_cover_every_row_once() -> None:
    for shape in ((1, 1), (208, 192), (5000, 4096), (100_000, 64)):
        runs = blocks(shape)
        assert runs[0][0] == 0
        assert runs[-1][1] == shape[0]
        assert all(stop == start for (_, stop), (start, _) in pairwise(runs))


def test_a_linear_of_several_matrices_keeps_the_order_of_its_rows() -> None:
    """By hand: rows 2 and 0 in the first part, row 1 in the second."""
    one, a = matrix(choice("int8"), 2, 8, torch.float32)
    two, b = matrix(choice("nf4"), 1, 8, torch.float32)
    linear = PackedLinear([one, two], torch.tensor([2, 0, 1]), torch.tensor([1.0, 2.0, 3.0]), torch.float32)
    x = random(4, 8, seed=1)
    wanted = x @ torch.stack([a[1], b[0], a[0]]).T + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(linear(x), wanted, rtol=1e-3, atol=1e-3)
    assert linear.weight.shape == (3, 8)
    with pytest.raises(ModelError, match="a packed layer has no weight to compute with"):
        linear.weight.sum()


def test_no_tokens_at_all() -> None:
    for form in FORMS:
        packed, _ = matrix(FORMS[form], 64, 128, torch.bfloat16)
        assert packed(torch.zeros(0, 128, dtype=torch.bfloat16)).shape == (0, 64)
