"""The capability table is true: every row multiplies on the real kernels, and nothing else claims to.

The rows of GPUs are walked in tests/gpu/test_triton_capabilities.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

import regauge as rg
from regauge import parts
from regauge.errors import SettingError
from regauge.formats.base import Codes, Format, Grid
from regauge.formats.grains import Token
from regauge.formats.grids import E4M3, E5M2, NF4, Int, Ternary
from regauge.formats.logs import Log2
from regauge.formats.rangers import Dynamic
from regauge.formats.readings import Reading, dynamic
from regauge.formats.runs import refusal
from regauge.formats.scales import Float32
from regauge.kernels.cpu import coded, trellis
from regauge.kernels.cpu import matrix as kernels
from regauge.kernels.cpu.library import available
from regauge.parts.points import INPUTS, WEIGHTS
from regauge.parts.table import TABLE
from regauge.plan import load, patterns
from regauge.runtime import capabilities
from regauge.runtime.capabilities import DECODED, ask
from regauge.runtime.matrices import choose, int4, lookup, multiply, operators
from regauge.runtime.matrices.modules import PackedMatrix
from regauge.runtime.rows import CODED, CPU, CUDA, INT4, NATIVE, PATHS, ROWS, Read, Row
from regauge.runtime.step.sites import site_of, tap_of
from tests.pico import pico, save
from tests.words import save_tokenizer

SHAPE = (48, 192)
GRAINS = ("channel", "tensor", "group:96", "group:32", "group:24", "group:8")
GRIDS = tuple(name for name, part in TABLE["grid"].items() if WEIGHTS in part.places)
INPUT_GRIDS = tuple(name for name, part in TABLE["grid"].items() if INPUTS in part.places)
ERROR = {torch.float64: 1e-5, torch.float32: 5e-5, torch.float16: 1.2e-2, torch.bfloat16: 1.5e-2}
"""Of a product, relative to its norm: 8 bits a group beside codes of up to 4 bits, 16 beside others."""


@cache
def formatted(grid: str, grain: str, scale: str = "f32") -> Format:
    point = parts.point("weights", grid=grid, grain=grain, scale=scale, ranger="absmax", rounder="nearest")
    return parts.format_of(point)


@cache
def encoded(grid: str, grain: str, scale: str = "f32") -> Codes:
    w_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return formatted(grid, grain, scale).encode(w_OI)


def grid_of(name: str | None) -> Grid | None:
    return None if name is None else parts.build("grid", parts.Spec(name))


def token(grid: Grid | None) -> Reading | None:
    """A step a token, from each call's own values."""
    return None if grid is None else dynamic(Format(grid, Token(), Dynamic(), Float32()))


def suits(row: Row, fmt: Format, inputs: Grid | None) -> bool:
    read = None if inputs is None else Read(inputs)
    return bool(row.inputs) == (inputs is not None) and not any(c(row, fmt, SHAPE, read) for c in capabilities.CHECKS)


def cases(row: Row) -> Iterator[tuple[str, str, str | None]]:
    """(grid, grain, inputs) of the table of parts that a row takes."""
    for grid, grain, inputs in product(GRIDS, GRAINS, INPUT_GRIDS if row.inputs else (None,)):
        if suits(row, formatted(grid, grain), grid_of(inputs)):
            yield grid, grain, inputs


def tokens(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)


def far(packed: PackedMatrix, fmt: Format, codes: Codes, count: int) -> float:
    """The error of a product, relative to its norm, against float64."""
    x_TI = tokens(count, packed.dtype)
    read = x_TI if packed.reading is None else packed.reading.simulate(x_TI.float())
    wanted = read.double() @ fmt.decode(codes).double().T
    return float((packed(x_TI).double() - wanted).norm() / wanted.norm())


@contextmanager
def without(row: Row) -> Iterator[None]:
    """Rows before this one, and those of other libraries, are not to be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capabilities, "ROWS", (row,) if not row.inputs else (row, *_plain(row)))
        yield


def _plain(row: Row) -> tuple[Row, ...]:
    return tuple(other for other in ROWS if other.kernel == row.kernel and not other.inputs)


ON_CPU = [row for row in ROWS if row.device == CPU]


@pytest.mark.parametrize("row", ON_CPU, ids=lambda row: f"{row.kernel}-{row.kind}-{row.inputs}")
def test_every_row_multiplies_what_it_claims(row: Row) -> None:
    """Each grid, and each grain and input that it takes, in every dtype."""
    if row.library == NATIVE and not available():
        pytest.skip("the C++ kernels were not built here")
    if row.library == PATHS and not trellis.here():
        pytest.skip("the C++ kernels that are here have no trellises")
    if row.library == CODED and not coded.here():
        pytest.skip("the C++ kernels that are here take no ready codes")
    if row.library == INT4 and not int4.usable():
        pytest.skip("this torch lays int4 out in a way that we cannot read")
    taken = list(cases(row))
    assert {parts.build("grid", parts.Spec(grid)).bits for grid, _, _ in taken} <= set(row.bits)
    assert taken
    if row.taps:  # rounded by the step, one tap for all that read it: test_step.py multiplies
        grid, grain, inputs = taken[-1]
        packed = PackedMatrix(
            encoded(grid, grain), formatted(grid, grain), torch.float32, reading=token(grid_of(inputs))
        )
        assert tap_of("a site", packed).rounding == "dynamic"
        assert not site_of("a site", packed).unrounded
        return
    taken = taken[:: 1 + len(taken) // 30]
    with without(row):
        for (grid, grain, inputs), dtype in zip(taken, (row.dtypes * len(taken))[: len(taken)], strict=True):
            fmt, codes = formatted(grid, grain), encoded(grid, grain)
            packed = PackedMatrix(codes, fmt, dtype, reading=token(grid_of(inputs)))
            assert row.kernel in packed.way.name, (grid, grain, inputs)
            for count in (1, 3, 33):
                assert far(packed, fmt, codes, count) < ERROR[dtype], (grid, grain, inputs, dtype, count)


@contextmanager
def seen() -> Iterator[list[str]]:
    """Names of what decodes weights to floats, or sends inputs through their codes and back, as it is called."""
    calls: list[str] = []

    def watch(patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        old = getattr(owner, name)

        def called(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return old(*args, **kwargs)

        patch.setattr(owner, name, called)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, Reading, "simulate")
        watch(patch, multiply, "by_blocks")
        watch(patch, kernels, "decode_of")
        watch(patch, lookup, "decode")
        watch(patch, Format, "decode")
        yield calls


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_simulated_decodes_and_what_is_native_does_not(grid: str) -> None:
    """What the table says is what a product of two tokens does: every format of the parts, and with each a third of the
    grids of inputs, another third with the next."""
    whole, few = (None, *INPUT_GRIDS[GRIDS.index(grid) % 3 :: 3]), (None, "int8", "fp8")
    some = [*product(GRAINS[:1], whole, (torch.bfloat16,)), *product(GRAINS[1:], few, (torch.bfloat16,))]
    for grain, inputs, dtype in [*some, *product(GRAINS[:2], few, (torch.float64,))]:
        if refusal(formatted(grid, grain), SHAPE) is not None:
            continue
        fmt, codes, read = formatted(grid, grain), encoded(grid, grain), grid_of(inputs)
        answer = ask(fmt, SHAPE, None if read is None else Read(read), dtype, here=True)
        packed = PackedMatrix(codes, fmt, dtype, reading=token(read))
        x_TI = tokens(2, dtype)
        with seen() as calls:
            packed(x_TI)
        assert bool(calls) != answer.native, (grid, grain, inputs, str(answer), calls)
        assert ("simulated" in packed.way.name or packed.way.name == DECODED) != answer.native
        assert (answer.kernel == DECODED) == packed.way.name.startswith(DECODED)
        assert answer.native == (answer.why == "")


@pytest.mark.parametrize("scale", list(TABLE["scale"]))
@pytest.mark.parametrize("grid", ["int4", "fp4", "nf4", "fp8"])
def test_how_a_step_is_stored_changes_nothing(grid: str, scale: str) -> None:
    fmt, codes = formatted(grid, "group:32", scale), encoded(grid, "group:32", scale)
    packed = PackedMatrix(codes, fmt, torch.float32)
    assert ask(fmt, SHAPE, dtype=torch.float32, here=True).native == available()
    assert far(packed, fmt, codes, 3) < ERROR[torch.float32]


def test_by_hand() -> None:
    """What the README promises, in words that a user reads."""

    def say(grid: str, grain: str, inputs: str | None = None, device: str = CPU, shape: tuple[int, int] = SHAPE) -> str:
        read = grid_of(inputs)
        return str(ask(formatted(grid, grain), shape, None if read is None else Read(read), device=device))

    assert say("int4-asym", "group:32") == "native (panels)"
    assert say("int8", "channel", "int8") == "native (panels)"
    assert say("int8", "channel", "int8", CUDA) == "native (w8a8)"
    assert say("int6", "channel", "int6", CUDA) == "native (w6a6)"
    assert say("int3", "tensor", "int8", CUDA) == "native (packed_int)"
    assert say("fp8", "channel", "fp8", CUDA) == "native (fp8)"
    assert say("nf4", "group:24", None, CUDA) == "native (linear)"
    assert say("fp8", "group:24", None, CUDA) == "native (linear)"
    said = "simulated (inputs are rounded before a product of floats: no kernel of cpu reads fp8 with rounded inputs)"
    assert say("fp8", "channel", "fp8") == said
    assert say("int4", "group:32", "int8", CUDA) == (
        "simulated (inputs are rounded before a product of floats: packed_int takes a step a row, not of 32)"
    )
    assert say("int4-asym", "channel", "int8", CUDA) == (
        "simulated (inputs are rounded before a product of floats: packed_int takes no zero points)"
    )


def test_what_a_row_asks_of_a_shape() -> None:
    """A group of 24 is 24 codes of 4 bits, but of 3 bits no whole blocks of 32; one row of 300,000 would be 16."""
    assert ask(formatted("int4", "group:24"), SHAPE).native
    assert ask(formatted("int3", "group:24"), SHAPE).why == (
        "weights are decoded: panels takes groups of a multiple of 32, not of 24"
    )
    assert ask(formatted("int4", "channel"), (1, 300_000)).why == (
        "weights are decoded: panels would hold 16.00 times its codes"
    )
    wide = Read(Int(8))
    assert ask(formatted("int8", "channel"), (8, 131_072), wide, device=CUDA).why == (
        "inputs are rounded before a product of floats: w8a8 does not take 8 x 131072"
    )


def test_inputs_that_no_kernel_reads() -> None:
    fmt = formatted("int8", "channel")
    for read in (Read(Int(8), static=True), Read(Int(8), grain="tensor"), Read(Int(8), transform="hadamard")):
        assert str(ask(fmt, SHAPE, read)) == "native (panels)"
        assert not ask(fmt, SHAPE, read, device=CUDA).native
    assert not ask(fmt, SHAPE, Read(E4M3(), static=True)).native
    assert not ask(formatted("nf4", "group:32"), SHAPE, Read(Int(8), "tensor", static=True)).native
    wide = formatted("int4", "group:96")
    assert ask(wide, SHAPE, Read(Int(8), "group:96", static=True)).native
    assert ask(wide, SHAPE, Read(Int(8), "group:32", static=True)).why == (
        "inputs are rounded before a product of floats: panels sums 96 inputs as integers, and 32 of these share a step"
    )


def test_what_a_grid_is() -> None:
    assert capabilities.is_like(E4M3(), torch.float8_e4m3fn)
    assert not capabilities.is_like(E5M2(), torch.float8_e4m3fn)
    assert not capabilities.is_like(Int(8), torch.float8_e4m3fn)
    assert [capabilities.is_whole(grid) for grid in (Int(8), Ternary(), NF4(), E4M3())] == [True, True, False, False]


def test_a_device_that_the_runtime_does_not_know() -> None:
    with pytest.raises(SettingError, match=r"the runtime has no kernels for 'cudda' \(did you mean 'cuda'\?\)"):
        ask(formatted("int4", "channel"), SHAPE, device="cudda")


def test_without_its_library_a_row_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "installed", lambda library: False)
    fmt = formatted("int4", "group:32")
    assert ask(fmt, SHAPE).native
    assert ask(fmt, SHAPE, device=CUDA, here=True).why == "weights are decoded: triton is not installed"
    assert choose.choose(encoded("int4", "group:32"), fmt, torch.bfloat16).kernel == DECODED
    assert operators is not None


def test_explain_and_receipts_say_how_a_preset_runs(tmp_path: Path) -> None:
    assert "on cpu: native (panels)\n  on cuda: native (w8a8)" in rg.explain("smoothquant")
    told = " ".join(rg.explain("zeroquant-fp").split())
    assert "on cpu: simulated (inputs are rounded before a product of floats: panels does not round inputs to" in told
    model = save_tokenizer(save(pico("llama"), tmp_path / "model"))
    receipt = rg.apply("rtn-w8a8", model, out=tmp_path / "out")
    sites = {site.name: site.runs for site in receipt.sites}
    assert sites["blocks.0.attn.q"] == {CPU: "native (panels)", CUDA: "native (w8a8)"}
    assert sites["embed"] == {}
    assert {tuple(found.values()) for found in sites.values()} == {(), ("native (panels)", "native (w8a8)")}


def test_every_preset_by_hand() -> None:
    """What each preset runs as; those that are not native everywhere are few and named."""
    found = {}
    for pattern in patterns():
        plan = load(next(iter(pattern.points())))
        rules = {rule.select: rule.point for rule in plan.of("weights")}
        reads = {rule.select: rule.point for rule in plan.of("inputs")}
        for select, point in rules.items():
            if point is not None:
                told = capabilities.runs(point, reads.get(select), (4096, 4096))
                found[plan.name] = tuple(how.partition(" ")[0] for how in told.values())
    assert {name: how for name, how in found.items() if how != ("native", "native")} == {
        "fp8": ("simulated", "native"),
        "quarot-w4a8": ("native", "simulated"),  # but for the tap that is turned first
        "flexq-w6a6": ("native", "simulated"),
        "gptq-q3-k": ("simulated", "native"),  # panels take 32 codes of three bits at a time
        "q3-k": ("simulated", "native"),
        "flatquant-w4a4kv4": ("native", "simulated"),
        "zeroquant-fp-m1": ("simulated", "simulated"),
        "repquant-w6a6": ("native", "simulated"),  # a stored step with a zero point
        # zero points of weights are for the CPU's kernels alone.
        "abq-llm-w2a4": ("native", "simulated"),
        **dict.fromkeys(("rtn-w6a6", "smoothquant-w6a6", "quarot-w6a6", "omniquant-w6a6"), ("native", "simulated")),
        **dict.fromkeys(("rtn-w4a4kv4", "smoothquant-w4a4kv4", "quarot-w4a4kv4"), ("native", "simulated")),
        "smoothquant-static": ("native", "simulated"),
        "zeroquant-fp": ("simulated", "simulated"),
        "trellis-w2": ("native", "simulated"),
        # panels take 32 codes of three bits at a time, which those of two bits a weight have in memory.
        **dict.fromkeys(("iq2-xs", "iq2-s", "gptq-iq2-xs", "gptq-iq2-s"), ("simulated", "native")),
        "outlier-suppression-plus": ("native", "simulated"),  # a stored step with a zero point
    }


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
def test_the_step_rounds_inputs_to_integers_beside_every_grid() -> None:
    """It is the tap that is rounded, not the input of a kernel; to small floats too, which no kernel of modules is."""
    for grid, grain in (("nf4", "group:32"), ("int4", "group:32"), ("fp4", "group:32"), ("fp8", "channel")):
        for inputs in (Int(8), Int(6)):
            codes, fmt = encoded(grid, grain), formatted(grid, grain)
            packed = PackedMatrix(codes, fmt, torch.bfloat16, reading=token(inputs))
            if packed.native is not None:
                tap = tap_of("a site", packed)
                assert (tap.rounding, tap.bits, tap.asymmetric, tap.group) == ("dynamic", inputs.bits, False, 0)
                assert not site_of("a site", packed).unrounded
    codes, fmt = encoded("int8", "channel"), formatted("int8", "channel")
    packed = PackedMatrix(codes, fmt, torch.bfloat16, reading=token(E4M3()))
    assert tap_of("a site", packed).floats == (3, 448.0, 2.0**-6)


def test_what_the_step_alone_rounds_is_said() -> None:
    """Small floats and steps of less than a group of the panels are simulated by modules, and native in the step."""
    fmt = formatted("int4", "group:32")
    both = (
        Read(Int(8, symmetric=False)),
        Read(Int(8), "tensor", static=True),
        Read(Int(4), "group:32"),
        Read(Int(4), "group:7 else group:32 else token"),
        Read(Int(8), transform="hadamard"),
    )
    alone = (
        Read(Int(8), "group:1", static=True),
        Read(Int(8), "group:8"),
        Read(Int(8), "group:8 else token"),
        Read(E4M3()),
    )
    for read in (*both, *alone):
        assert ask(fmt, SHAPE, read).native == (read in both)
        assert str(ask(fmt, SHAPE, read, step=True)) == "native (step)"
    assert ask(fmt, SHAPE, Read(Int(8), "tensor"), step=True).why.endswith("step takes no dynamic steps of a tensor")
    assert not ask(fmt, SHAPE, Read(Log2()), step=True).native
    weights, inputs = parts.point("weights", grid="int4", grain="group:32"), parts.point("inputs", grid="fp8")
    told = capabilities.runs(weights, inputs, SHAPE)
    assert told[CPU].startswith("simulated (inputs are")
    assert told[CPU].endswith("); native in the step of one token")
    for grain, native in (("group:8", False), ("group:7 else group:32 else token", True)):
        reading = parts.point("inputs", grid="int8", grain=grain)
        assert capabilities.runs(weights, reading, SHAPE)[CPU].startswith("native" if native else "simulated")
    assert "step" not in told[CUDA].rpartition(")")[2]
