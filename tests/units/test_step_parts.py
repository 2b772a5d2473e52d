"""The decode step over stores with packed parts, against torch."""

from __future__ import annotations

import pytest
import torch

from parts import part_of
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.cpu.library import available
from regauge.kernels.cpu.pieces import Block, Norm, Site
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store
from units.test_step_program import blocks_of, reference, sylvester

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("hadamard", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("new", [1, 4, 16])
def test_a_step_reads_parts_and_window_and_writes_behind_the_window(hadamard: tuple[bool, bool], new: int) -> None:
    """One block with a packed part before its window, one with a window alone; of two sequences, the second padded."""
    random, size = generator(), 16
    blocks = blocks_of([(4, 2, size, 9), (3, 1, 8, 5)], 12, random)
    keys = BlockLayout("keys", 32, size, 8, "time", 32, low=True)
    values = BlockLayout("values", 32, size, 8, "channels", size, low=True)
    part = part_of(keys, values, torch.full((2, 2), 352), random)
    firsts = torch.tensor([[0, 0], [40, 40]], dtype=torch.int32)
    part = type(part)(**{**vars(part), "firsts_BK": firsts})
    windows = [
        [torch.randn(2, heads, 37 + new, width, generator=random) for _ in (0, 1)]
        for heads, width in ((2, size), (1, 8))
    ]
    stores = [
        Store(*windows[0], origin=352, parts=(part,), hadamard=hadamard),
        Store(*windows[1], 0, torch.full((2, 1), 37, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)),
    ]
    x = torch.randn(2 * new, 12, generator=random)
    turn = [sylvester(size).double() if here else torch.eye(size, dtype=torch.float64) for here in hadamard]
    wanted = []
    for sequence in (0, 1):
        read = [part.read(sequence, head) for head in (0, 1)]
        pasts = [
            torch.stack(
                [torch.cat((read[h][i].double(), windows[0][i][sequence, h, :37].double())) @ turn[i] for h in (0, 1)]
            )
            for i in (0, 1)
        ]
        second = [memory[sequence, :, :37] for memory in windows[1]]
        own = x[sequence * new : sequence * new + new]
        wanted.append(reference(blocks, own, [(pasts[0], pasts[1]), (second[0], second[1])], [0, 0]))
    program = Program(blocks, Norm("none", 12, 0.0), Site(torch.eye(12)), 12, 0, 0.0)
    program.keep(stores)
    found = program(x, [0] * 2 * new, [0, 40], (), [389, 389])
    assert float((found - torch.cat(wanted)).abs().max()) < 2e-3
    y = x[-1].double() * torch.rsqrt(x[-1].double().pow(2).mean() + 1e-5)
    site = blocks[0].sites["k"].matrix
    assert isinstance(site, torch.Tensor)
    row = (site.double() @ y).view(2, size) @ turn[0]
    torch.testing.assert_close(windows[0][0][1, :, 36 + new], row.float(), atol=1e-5, rtol=1e-5)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = generator()
    blocks = blocks_of([(3, 3, 32, 2000)] * 2, 384, random)
    layouts = [BlockLayout(role, 32, 32, 4, "channels", 32, low=True) for role in ("keys", "values")]
    parts = [part_of(layouts[0], layouts[1], torch.tensor([[2048, 0, 512]]), random) for _ in blocks]
    x = torch.randn(1, 384, generator=random)
    found = []
    for threads in (1, 2, 3):
        windows = [torch.zeros(1, 3, 4, 32) for _ in range(4)]
        program = Program(blocks, Norm("none", 384, 0.0), Site(torch.eye(384)), 384, 0, 0.0)
        program.keep([Store(windows[2 * i], windows[2 * i + 1], parts=(parts[i],)) for i in (0, 1)])
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(program(x, [0], [0], (), [3, 3]))
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_a_block_behind_a_sliding_window_takes_no_parts() -> None:
    block = blocks_of([(2, 1, 16, 3)], 8, generator())[0]
    block = Block(block.norms, block.sites, (), {**block.integers, "window": 5}, block.scale)
    program = Program([block], Norm("none", 8, 0.0), Site(torch.eye(8)), 8, 0, 0.0)
    layouts = [BlockLayout(role, 32, 16, 4, "channels", 16) for role in ("keys", "values")]
    part = part_of(layouts[0], layouts[1], torch.tensor([[32]]), generator())
    program.keep([Store(torch.zeros(1, 1, 6, 16), torch.zeros(1, 1, 6, 16), parts=(part,))])
    with pytest.raises(ValueError, match="looks back only so far, which the decode step does not read"):
        program(torch.zeros(1, 8), [0], [0], (), [3])
