"""The C++ kernels under any shape, number of threads, of callers and of tokens, and in a forked child."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panels import STEPS, VALUES, Case, case, close, levels, tokens
from regauge.kernels.cpu import library, matrix
from regauge.kernels.cpu.layout import FLOAT, unit
from regauge.kernels.cpu.matrix import FEW

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="the C++ kernels were not built here"),
    pytest.mark.usefixtures("one_thread"),
]


def test_no_tokens_at_all(level: str) -> None:
    one = case("int4")
    none = torch.zeros(0, 131)
    for activations in matrix.ACTIVATIONS:
        assert matrix.linear(none, one.packed, activations).shape == (0, 37)
    assert matrix.blocked(none, one.packed).shape == (0, 37)
    assert matrix.blocked_integers(none.to(torch.int8), torch.ones(0), one.packed, torch.float32).shape == (0, 37)
    assert matrix.integers(none.to(torch.int8), one.packed).shape == (0, 37)
    assert matrix.take(one.packed, torch.zeros(0, dtype=torch.int64), torch.float32).shape == (0, 131)
    assert matrix.decode(one.packed, 5, 5, torch.float32).shape == (0, 131)


def test_threads_change_nothing(level: str) -> None:
    one = case("int3-asym", 203, 131)
    x = tokens(FEW + 3, 131)
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.append([matrix.linear(x, one.packed, a) for a in matrix.ACTIVATIONS] + [matrix.blocked(x, one.packed)])
    for other in seen[1:]:
        assert all(a.equal(b) for a, b in zip(seen[0], other, strict=True))


def test_tokens_that_lie_apart() -> None:
    one = case("int4")
    wide = tokens(6, 262)
    for x in (wide[::2, ::2], wide[:, 1:132], wide.T[:131, :6].T, tokens(1, 131).expand(4, 131)):
        assert matrix.linear(x, one.packed).equal(
            matrix.linear(x.clone(memory_format=torch.contiguous_format), one.packed)
        )


def test_two_callers_at_once() -> None:
    """One of them finds the threads taken, and computes alone."""
    torch.set_num_threads(2)
    one, other = case("int4", 401, 517), case("int2", 307, 1031, seed=5)
    inputs = {one: tokens(3, 517), other: tokens(2, 1031)}
    wanted = {each: matrix.linear(x, each.packed) for each, x in inputs.items()}
    wrong: list[Case] = []

    def call(each: Case) -> None:
        for _ in range(200):
            if not matrix.linear(inputs[each], each.packed).equal(wanted[each]):
                wrong.append(each)

    callers = [threading.Thread(target=call, args=(each,)) for each in (one, other, one)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes() -> None:
    """The parent's threads are not in the child, which must find others."""
    torch.set_num_threads(2)
    one, x = case("int4", 401, 517), tokens(3, 517)
    wanted = matrix.linear(x, one.packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if matrix.linear(x, one.packed).equal(wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert matrix.linear(x, one.packed).equal(wanted)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_group_alignment_thread_and_level(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(VALUES)))
    least = unit(VALUES[name][0])
    span = least * data.draw(st.integers(1, 5)) if data.draw(st.booleans()) else 0
    columns = span * data.draw(st.integers(1, 4)) if span else data.draw(st.integers(1, 300))
    rows, count = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 20))
    step = data.draw(st.sampled_from(STEPS[1:])) if span and span < columns else None
    activations = data.draw(st.sampled_from(sorted(matrix.ACTIVATIONS)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    one = case(name, rows, columns, span, step, data.draw(st.integers(0, 99)))
    offset = data.draw(st.integers(0, 9))  # x begins anywhere
    x = tokens(1, count * columns + offset, dtype)[0, offset:].view(count, columns)
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    kernels, best = library.library(), library.level()
    assert kernels is not None
    assert kernels.rg_set_level(data.draw(st.sampled_from(levels())).encode()) == 0
    try:
        assert close(matrix.linear(x, one.packed, activations), x, one, activations)
        assert matrix.decode(one.packed, 0, rows, torch.float32).equal(one.weights())
        if one.packed.meta[6] != FLOAT and name != "nf4":
            assert close(matrix.blocked(x, one.packed), x, one, "int8")
    finally:
        kernels.rg_set_level(best.encode())
