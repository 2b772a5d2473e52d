"""Arguments of every Python entry of the C++ kernels, drawn: the right numbers, or a raised error; never a crash.

`REGAUGE_FUZZ=20 pytest -m slow` draws longer. Run under the sanitisers by scripts/sanitize.sh.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from panels import STEPS, VALUES, case, close, random, tokens
from regauge.kernels.cpu import matrix
from regauge.kernels.cpu.interface import META, struct_of
from regauge.kernels.cpu.layout import Value, unit
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.matrix import Matrix
from regauge.kernels.cpu.pieces import Block, Norm, Site, Tap
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store
from units.test_step_program import blocks_of

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
RAISED = (ValueError, IndexError, MemoryError)
LONG = int(os.environ.get("REGAUGE_FUZZ", "10"))
BRIEF = settings(max_examples=40, deadline=None)
WHOLE = st.one_of(st.integers(-3, 300), st.sampled_from([1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 31, 1 << 40]))
"""Sizes that are likely, at an edge, or beyond 32 bits."""


def threads(count: int) -> Any:
    """While it is open the kernels are asked for so many threads."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "get_num_threads", lambda: count)
    return patch


@st.composite
def matrices(draw: st.DrawFn) -> Any:
    name = draw(st.sampled_from(sorted(VALUES)))
    step = draw(st.sampled_from(STEPS))
    columns = unit(VALUES[name][0]) * draw(st.integers(1, 6)) if step is not None else draw(st.integers(1, 150))
    return name, draw(st.integers(1, 40)), columns, 0, step, draw(st.integers(0, 9))


def right(one: Any, count: int, activations: str, wide: bool, workers: int) -> None:
    """What every entry gives for a sound matrix: weights to the bit, products to what rounding allows."""
    patch, columns = threads(workers), one.packed.shape[1]
    try:
        wanted = one.weights()
        assert matrix.unpack(one.packed).equal(one.codes_OI)
        assert matrix.decode(one.packed, 0, len(wanted), torch.float32).equal(wanted)
        index = torch.randint(len(wanted), (count,), generator=random(count))
        assert matrix.take(one.packed, index, torch.float32).equal(wanted[index])
        x_TI = (
            tokens(count, 2 * columns)[:, ::2] if wide else tokens(count, columns)
        )  # rows with gaps between their numbers
        assert close(matrix.linear(x_TI, one.packed, activations), x_TI, one, activations)
        with suppress(ValueError):  # tables of 16 bits and small floats have no blocked product
            assert close(matrix.blocked(x_TI, one.packed), x_TI, one, "int8")
        part = one.packed.prefix(max(1, len(wanted) // 2), columns)
        assert matrix.decode(part, 0, part.shape[0], torch.float32).equal(wanted[: part.shape[0]])
    finally:
        patch.undo()


SOUND = (matrices(), st.integers(0, 20), st.sampled_from(sorted(matrix.ACTIVATIONS)), st.booleans(), st.integers(-2, 5))


@given(*SOUND)
@BRIEF
def test_sound_matrices_are_right(one: Any, count: int, activations: str, wide: bool, workers: int) -> None:
    right(case(*one), count, activations, wide, workers)


def everything(made: Matrix, x_TI: Tensor) -> None:
    """Every entry that takes a matrix; errors are welcome, as long as they are raised."""
    calls: list[Callable[[], object]] = [
        lambda: matrix.linear(x_TI, made),
        lambda: matrix.linear(x_TI, made, "int8"),
        lambda: matrix.linear_of(x_TI, made.struct, matrix.TOKEN + 4),
        lambda: matrix.blocked(x_TI, made),
        lambda: matrix.blocked_integers(x_TI.to(torch.int8), torch.ones(len(x_TI)), made, torch.float32),
        lambda: matrix.integers(x_TI.to(torch.int8), made),
        lambda: matrix.decode(made, 0, 3, torch.bfloat16),
        lambda: matrix.take(made, torch.tensor([0, 2]), torch.float16),
        lambda: matrix.unpack(made),
        lambda: made.prefix(2, 3),
    ]
    for call in calls:
        with suppress(*RAISED):
            call()


META_OF_INT4 = (37, 131, 4, 132, 0, 0, 0, 8, 0, 0)
FULL = (37, 131, 1, 160, 0, 0, 3, 0, 0, 0)
"""Full precision, which only a step reads, and whose dtype stands where the bits do."""


@given(
    st.lists(st.tuples(st.sampled_from(range(len(META))), WHOLE), max_size=3), WHOLE | st.just(0), st.integers(-40, 0)
)
@example([(3, 0)], 0, 0)
@example([*enumerate(FULL)], 0, 0)
@example([(3, 1 << 20)], 0, 0)
@BRIEF
def test_a_matrix_of_any_integers(changed: list[tuple[int, int]], stride: int, short: int) -> None:
    one = case("int4")
    meta = list(one.packed.meta)
    for at, number in changed:
        meta[at] = number
    panels = one.packed.panels[: one.packed.panels.numel() + short]
    try:
        made = Matrix(panels, one.packed.row_scale_O, None, tuple(meta), stride)
    except RAISED:
        return
    columns = made.shape[1]
    everything(made, torch.ones(2, columns if columns < 1 << 20 else 1))


def bad_tensors(good: Tensor) -> list[Any]:
    """Others than one that is wanted: of another dtype, shape, order, or place."""
    return [
        good.double(), good.to(torch.int32), good.bool(), good.to(torch.complex64), good[None], good[..., :0],
        good.repeat(*([1] * (good.ndim - 1)), 3), good.to("meta"), torch.empty(0), torch.zeros(()),
        good.repeat(3, *[1] * (good.ndim - 1)),
    ]  # fmt: skip


def test_every_tensor_of_every_entry_may_be_wrong() -> None:
    """Refused, but for what is as good: nothing is read past the end of what was given."""
    one, x_TI = case("int4-asym", 37, 64, 32, torch.float16), tokens(3, 64)
    z_TI, scale_T = torch.ones(3, 64, dtype=torch.int8), torch.ones(3)
    bits, value, group = 4, Value(), 32
    codes, steps = torch.zeros(37, 64, dtype=torch.uint8), torch.ones(37, 2, dtype=torch.float16)
    zeros, rows = torch.zeros(37, 2, dtype=torch.uint8), torch.ones(37)
    entries: list[tuple[Callable[[Any], object], Tensor]] = [
        (lambda t: matrix.linear(t, one.packed), x_TI),
        (lambda t: matrix.blocked(t, one.packed), x_TI),
        (lambda t: matrix.blocked_integers(t, scale_T, one.packed, torch.float32), z_TI),
        (lambda t: matrix.blocked_integers(z_TI, t, one.packed, torch.float32), scale_T),
        (lambda t: matrix.integers(t, one.packed), z_TI),
        (lambda t: matrix.decode_of(one.packed.struct, 0, 2, t, torch.float32), torch.tensor([0, 36])),
        (lambda t: matrix.take(one.packed, t, torch.float32), torch.tensor([0, 36])),
        (lambda t: matrix.pack(t, bits, value, group, steps, zeros, rows), codes),
        (lambda t: matrix.pack(codes, bits, value, group, t, zeros, rows), steps),
        (lambda t: matrix.pack(codes, bits, value, group, steps, t, rows), zeros),
        (lambda t: matrix.pack(codes, bits, value, group, steps, zeros, t), rows),
        (lambda t: matrix.pack(codes, bits, value, group, steps, zeros, rows, lambda _: t), one.packed.panels),
        (lambda t: struct_of(t, one.packed.row_scale_O, None, one.packed.meta), one.packed.panels),
        (lambda t: struct_of(one.packed.panels, t, None, one.packed.meta), torch.ones(48)),
    ]
    for number, (entry, good) in enumerate(entries):
        entry(good)
        refused = 0
        for bad in bad_tensors(good):
            try:
                entry(bad)
            except (*RAISED, TypeError, NotImplementedError):
                refused += 1
        assert refused >= 4, number


@given(st.sampled_from(["int3", "int4-asym", "nf4", "fp8"]), st.integers(-3, 12), WHOLE, st.data())
@BRIEF
def test_what_is_packed_is_sound_or_refused(name: str, bits: int, group: int, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 20), st.integers(0, 70)))
    codes = torch.randint(0, data.draw(st.sampled_from([2, 8, 256])), shape, generator=random(1)).to(torch.uint8)
    try:
        made = matrix.pack(codes, bits, VALUES[name][1], group, None)
    except RAISED:
        return
    assert matrix.unpack(made).equal(codes)
    everything(made, torch.ones(2, shape[1]))


def step_of(wrong: dict[str, Any], workers: int = 1) -> Tensor:
    """Two tokens of two sequences through two blocks, with some arguments of program or call replaced."""
    some = random(0)
    given_here = {
        "size": 6,
        "hidden": 12,
        "rotary": 4,
        "length": 3,
        "room": 9,
        "positions": [3, 4, 3, 4],
        "starts": [0, 1],
    }
    given_here |= {
        "table": (8, 2),
        "batch": 2,
        "norm": 12,
        "rope": 0,
        "window": 0,
        "activation": 3,
        "x": (4, 12),
        "kv": 2,
    }
    given_here |= wrong
    g = given_here
    blocks = blocks_of([(4, 2, 6, 9), (2, 2, 6, 5)], 12, some)
    more = {name: g[name] for name in ("rotary", "rope", "window", "activation")} | {"head_dim": g["size"]}
    norms = {name: Norm("rms", g["norm"], 1e-5) for name in ("attn_norm", "mlp_norm")}
    blocks = [replace(block, integers=block.integers | more, norms=norms) for block in blocks]
    program = Program(blocks, Norm("none", g["hidden"], 0.0), Site(torch.eye(12)), g["hidden"], 1, 0.0)
    memory = [torch.randn(g["batch"], g["kv"], g["room"], 6, generator=some) for _ in range(4)]
    patch = threads(workers)
    try:
        program.keep([Store(*memory[:2]), Store(*memory[2:])])
        tables = [tuple(torch.rand(*g["table"], generator=some) for _ in range(2))]
        x_NH = torch.randn(*g["x"], generator=some)
        return program(x_NH, g["positions"], g["starts"], tables, [g["length"]] * 2)
    finally:
        patch.undo()


SIZE = st.one_of(st.integers(-2, 14), st.sampled_from([64, 65, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31)]))
CHANGES: dict[str, Any] = dict.fromkeys(
    ("size", "hidden", "rotary", "length", "norm", "rope", "window", "activation"), SIZE
)
CHANGES |= {"room": st.integers(0, 14), "batch": st.integers(0, 4), "kv": st.integers(0, 4)}
CHANGES |= {"positions": st.lists(SIZE, max_size=6), "starts": st.lists(SIZE, max_size=4)}
CHANGES |= {
    "table": st.tuples(st.integers(0, 9), st.integers(0, 5)),
    "x": st.tuples(st.integers(0, 70), st.integers(10, 13)),
}
HARMLESS = {"length", "room", "window", "activation", "positions", "starts", "table", "rotary"}
"""Of which another value may be as sound."""


def stepped(wrong: dict[str, Any], workers: int) -> None:
    try:
        logits = step_of(wrong, workers)
    except RAISED:
        return
    known = {"size": 6, "hidden": 12, "norm": 12, "rope": 0, "batch": 2, "kv": 2, "x": (4, 12)}
    if wrong.get("rotary") == 0:
        del known["rope"]  # no table is read
    assert all(name in HARMLESS or known.get(name, value) == value for name, value in wrong.items()), wrong
    assert logits.isfinite().all()


@given(st.dictionaries(st.sampled_from(sorted(CHANGES)), st.none(), max_size=2), st.integers(-1, 4), st.data())
@BRIEF
def test_a_step_of_any_sizes(names: dict[str, None], workers: int, data: st.DataObject) -> None:
    stepped({name: data.draw(CHANGES[name]) for name in names}, workers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": [3, 8, 3, 4]}, {"positions": [3, -1, 3, 4]}, {"positions": [3, 4]}, {"starts": [0, -1]},
        {"norm": 4}, {"table": (8, 1)}, {"rotary": 8}, {"rotary": 3}, {"rope": 1}, {"size": 3}, {"length": 8},
        {"length": -1}, {"batch": 3}, {"activation": 9}, {"x": (4, 11)}, {"x": (3, 12)}, {"hidden": 0},
        {"hidden": 1 << 31}, {"kv": 1}, {"starts": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_of_wrong_sizes_is_refused(wrong: dict[str, Any]) -> None:
    assert step_of({}).isfinite().all()
    with pytest.raises(ValueError, match=r"."):
        step_of(wrong)


def test_every_tensor_of_a_program_may_be_wrong() -> None:
    one, vector = case("int4", 12, 8), torch.ones(12)
    entries: list[tuple[Callable[[Any], object], Tensor]] = [
        (lambda t: Norm("rms", 12, 1e-5, t), vector),
        (lambda t: Norm("rms", 12, 1e-5, None, t), vector),
        (lambda t: Site(one.packed, t), vector),
        (lambda t: Site(one.packed, low_rank=(t, torch.ones(2, 8))).struct(), torch.ones(1, 2, 16)),
        (lambda t: Site(t).struct(), torch.ones(12, 8)),
        (lambda t: Tap(diagonal_I=t).check(12), vector),
        (lambda t: Tap("kronecker", 3, None, t, torch.ones(4, 4)).check(12), torch.ones(3, 3)),
        (lambda t: Tap("kronecker", 3, None, torch.ones(3, 3), t).check(12), torch.ones(4, 4)),
        (lambda t: Store(t, torch.ones(2, 3, 4, 5)), torch.ones(2, 3, 4, 5)),
        (lambda t: Store(torch.ones(2, 3, 4, 5), t), torch.ones(2, 3, 4, 5)),
        (lambda t: Store(*[torch.ones(2, 3, 4, 5)] * 2, 0, t), torch.ones(2, 3, dtype=torch.int32)),
    ]
    for number, (entry, good) in enumerate(entries):
        entry(good)
        refused = 0
        for bad in bad_tensors(good):
            try:
                entry(bad)
            except (*RAISED, TypeError, NotImplementedError):
                refused += 1
        assert refused >= 4, number
    with pytest.raises(ValueError, match="'hadamar' is no transform of a tap"):
        Tap("hadamar")
    with pytest.raises(ValueError, match="'heds' is no field of a block"):
        Block({}, {}, (), {"heds": 3})
    with pytest.raises(ValueError, match="side by side"):
        Site(torch.ones(1, 8).expand(12, 8)).struct()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["sound", "integers", "packed", "step"])
def test_longer(which: str) -> None:
    more = settings(max_examples=40 * LONG, deadline=None)
    tests: dict[str, Callable[..., None]] = {
        "sound": test_sound_matrices_are_right,
        "integers": test_a_matrix_of_any_integers,
        "packed": test_what_is_packed_is_sound_or_refused,
        "step": test_a_step_of_any_sizes,
    }
    more(tests[which])()
