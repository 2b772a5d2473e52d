"""The rows for GPUs of the capability table: each multiplies on the real kernels, and nothing else claims to."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from regauge.errors import ModelError
from regauge.formats.base import Codes, Format
from regauge.runtime.capabilities import DECODED, ask
from regauge.runtime.matrices.modules import PackedMatrix
from regauge.runtime.rows import CUDA, ROWS, Read, Row
from units.test_capabilities import GRIDS, SHAPE, cases, encoded, formatted, grid_of, seen, token, tokens

pytestmark = pytest.mark.gpu
ERROR = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Of a product, relative to its norm: the rounding of the result. Inputs are not rounded but as a recipe says."""
ON_GPU = [row for row in ROWS if row.device == CUDA]


def far(packed: PackedMatrix, fmt: Format, codes: Codes, count: int, device: torch.device) -> float:
    x_TI = tokens(count, packed.dtype)
    read = x_TI if packed.reading is None else packed.reading.simulate(x_TI.float())
    wanted = read.double() @ fmt.decode(codes).double().T
    return float((packed(x_TI.to(device)).cpu().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("row", ON_GPU, ids=lambda row: f"{row.kernel}-{row.kind}-{row.inputs}")
def test_every_row_multiplies_what_it_claims(row: Row, device: torch.device) -> None:
    taken = [(*case, dtype) for case, dtype in zip(cases(row), row.dtypes * 1000, strict=False)]
    assert taken
    some = taken[:: 1 + len(taken) // 6]
    ran = set()
    for grid, grain, inputs, dtype in some:
        fmt, codes, read = formatted(grid, grain), encoded(grid, grain), grid_of(inputs)
        answer = ask(fmt, SHAPE, None if read is None else Read(read), dtype, CUDA)
        assert answer.native
        packed = PackedMatrix(codes, fmt, dtype, CUDA, reading=token(read)).to(device)
        assert packed.way.name.startswith(answer.kernel)
        ran.add(answer.kernel)
        assert far(packed, fmt, codes, 3, device) < ERROR[dtype], (grid, grain, inputs, dtype)
        w_OI = fmt.decode(codes)
        index = torch.tensor([5, 0, 47])
        torch.testing.assert_close(packed.rows(3, 9).cpu().float(), w_OI[3:9], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(packed.take(index.to(device)).cpu().float(), w_OI[index], rtol=1e-2, atol=1e-3)
    assert row.kernel in ran


@pytest.mark.parametrize("scale", ["f32", "f16", "bf16", "e8m0", "nv", "m1", "m2"])
def test_steps_however_they_are_stored(scale: str, device: torch.device) -> None:
    fmt, codes = formatted("fp4", "group:32", scale), encoded("fp4", "group:32", scale)
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA).to(device)
    assert packed.way.name == "linear"
    narrow = {"f32": torch.float32, "f16": torch.float16, "nv": torch.float32, "m2": torch.float32}
    assert packed.scale.dtype == narrow.get(scale, torch.bfloat16)
    assert far(packed, fmt, codes, 2, device) < ERROR[torch.float32]


@pytest.mark.parametrize("grid", ["int4", "int4-asym", "int6", "int8", "nf4", "fp8", "fp8-e5m2", "ternary"])
def test_what_is_simulated_says_so(grid: str, device: torch.device) -> None:
    """Formats × inputs: where a kernel rounds nothing, inputs go through their codes and back, and only there."""
    assert grid in GRIDS
    for grain, inputs in product(("channel", "group:24"), (None, "int8", "int8-asym", "fp8")):
        fmt, codes, read = formatted(grid, grain), encoded(grid, grain), grid_of(inputs)
        answer = ask(fmt, SHAPE, None if read is None else Read(read), torch.bfloat16, CUDA)
        packed = PackedMatrix(codes, fmt, torch.bfloat16, CUDA, reading=token(read)).to(device)
        with seen() as calls:
            packed(tokens(2, torch.bfloat16).to(device))
        assert bool(calls) != answer.native, (grid, grain, inputs, str(answer), calls)
        assert ("simulated" in packed.way.name or packed.way.name == DECODED) != answer.native


def test_a_format_that_no_kernel_reads_is_decoded(device: torch.device) -> None:
    fmt, codes = formatted("int4", "group:12"), encoded("int4", "group:12")
    assert ask(fmt, SHAPE, device=CUDA).why == "weights are decoded: linear takes groups of a multiple of 8, not of 12"
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA).to(device)
    assert packed.way.name == DECODED
    assert far(packed, fmt, codes, 2, device) < ERROR[torch.float32]


def test_another_dtype_leaves_steps_and_tables_as_they_are(device: torch.device) -> None:
    fmt, codes = formatted("nf4", "group:32"), encoded("nf4", "group:32")
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA).to(device).half()
    assert (packed.scale.dtype, packed.table.dtype, packed.packed.dtype) == (torch.float32, torch.float32, torch.uint8)
    assert far(packed, fmt, codes, 2, device) < ERROR[torch.float16]


def test_a_packed_matrix_stays_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, codes = formatted("int4", "group:32"), encoded("int4", "group:32")
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA)

    class Held(torch.Tensor):
        """A tensor that says that it is on a GPU."""

        __torch_function__ = torch._C._disabled_torch_function_impl
        device = torch.device("cuda", 0)

    packed._buffers["packed"] = packed.packed.as_subclass(Held)
    with pytest.raises(
        ModelError, match=r"loaded for a GPU .* cannot go to cpu; load it there: rg.load\(path, device="
    ):
        packed.to("cpu")


def test_compiled_and_differentiated(device: torch.device) -> None:
    """torch's own check of the operator that a packed layer calls: schema, fake kernel, gradient."""
    fmt, codes = formatted("int4", "group:32"), encoded("int4", "group:32")
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA).to(device)
    x_TI = tokens(2, torch.float32).to(device).requires_grad_()
    packed(x_TI).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    assert x_TI.grad is not None
    torch.testing.assert_close(x_TI.grad.cpu(), fmt.decode(codes).sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
