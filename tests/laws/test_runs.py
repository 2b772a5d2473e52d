"""Laws of grids that round runs of weights together, with every grain, scale and rounder that takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.formats.base import Format, Grid
from regauge.formats.deviations import some
from regauge.formats.grains import Channel, Group
from regauge.formats.runs import refusal
from regauge.formats.scales import Float16
from regauge.formats.trellis import Trellis
from regauge.kernels.cpu import trellis
from regauge.kernels.reference import pack, packed_bytes, unpack
from regauge.parts.scales import WORDS

SPELLINGS = ["trellis2", "trellis2:6", "trellis3", "trellis4"]
MSE = {"trellis2": 0.0859, "trellis2:6": 0.0803, "trellis3": 0.0218, "trellis4": 0.0070}
"""Of a unit Gaussian, as counted before anything was built (the shared notes on code books)."""
ALONE = {2: 0.1175, 3: 0.0345, 4: 0.0095}
"""The least that values of single weights can have (Lloyd-Max)."""


def grid_of(name: str) -> Trellis:
    made: Trellis = parts.build("grid", parts.read("grid", name))
    return made


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def random_codes(grid: Grid, seed: int, rows: int, words: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << grid.bits, (rows, words * grid.run), generator=generator, dtype=torch.uint8)


def test_these_are_the_grids_of_runs() -> None:
    runs = {name for name in parts.TABLE["grid"] if parts.build("grid", parts.read("grid", name)).run > 1}
    assert runs == {name.partition(":")[0] for name in SPELLINGS} | set(WORDS)  # of lists: discriminate/test_code_words
    assert [grid_of(name).run for name in SPELLINGS] == [32, 64, 64, 16]


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_codes_are_a_path_and_come_back_through_values(name: str) -> None:
    grid = grid_of(name)
    codes = random_codes(grid, 1, 19, 3)
    values = grid.decode(codes)
    assert values.dtype is torch.float32
    assert len(set(grid.table.tolist())) == len(grid.table) == 128
    assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.encode(values.double()), codes)
    assert torch.equal(grid.snap(values), values)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_snap_is_idempotent_and_leaves_its_argument_alone(name: str, dtype: torch.dtype) -> None:
    grid = grid_of(name)
    z = (draws(2, 21, 2 * grid.run) * 1.3).to(dtype)
    before = z.clone()
    snapped = grid.snap(z)
    assert torch.equal(z, before)
    assert snapped.dtype is dtype
    assert snapped.shape == z.shape
    if dtype is not torch.bfloat16:
        assert torch.equal(grid.snap(snapped), snapped)
        assert torch.equal(grid.decode(grid.encode(snapped)).to(dtype), snapped)
    far = grid.snap(torch.full((1, grid.run), 1e6, dtype=torch.float32))
    assert bool((far <= grid.high).all())


@pytest.mark.parametrize("name", SPELLINGS)
def test_turning_a_word_by_whole_weights_turns_its_values(name: str) -> None:
    grid = grid_of(name)
    codes = random_codes(grid, 3, 7, 1)
    for by in (1, 5, grid.run - 1):
        assert torch.equal(grid.decode(codes.roll(by, 1)), grid.decode(codes).roll(by, 1))


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_window_by_hand(name: str) -> None:
    """The window of a weight, of its word's bits written out: it ends with the weight's own bits."""
    grid = grid_of(name)
    codes = random_codes(grid, 4, 1, 1)[0].tolist()
    fresh, plain = grid.fresh, grid.plain
    string = "".join(format(code & ((1 << fresh) - 1), f"0{fresh}b")[::-1] for code in codes)  # lowest bit first
    assert len(string) == 64
    values = grid.decode(torch.tensor([codes], dtype=torch.uint8))[0]
    for place, code in enumerate(codes):
        end = (place + 1) * fresh
        bits = [string[(end - grid.window + k) % 64] for k in range(grid.window)]
        window = sum(int(bit) << k for k, bit in enumerate(bits))
        assert float(values[place]) == float(grid.table[(code >> fresh) << grid.window | window])
    assert plain + fresh == grid.bits


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_gaussian_keeps_as_little_error_as_was_counted(name: str) -> None:
    grid = grid_of(name)
    z = draws(5, 512, 128)
    error = float((grid.snap(z) - z).square().mean())
    assert error < 1.02 * MSE[name]
    assert error == pytest.approx(grid.book.mse, rel=0.03)
    assert error < 0.8 * ALONE[grid.bits]  # two free bits a weight, whatever they are called, cannot do this


@pytest.mark.parametrize("name", SPELLINGS)
def test_kernels_find_the_path_that_the_definition_finds(name: str) -> None:
    grid = grid_of(name)
    z = draws(6, 37, 2 * grid.run).view(-1, grid.run)
    path = grid.table[trellis.paths(z, grid.paths)]
    found = trellis.snapped(z, grid.paths)
    least, got = (path - z).square().sum(1), (found - z).square().sum(1)
    assert torch.allclose(got, least, rtol=1e-4, atol=1e-5)  # ties may fall otherwise
    assert float((path == found).float().mean()) > 0.99


def test_two_passes_are_near_the_best_of_all_starts() -> None:
    grid = grid_of("trellis2")
    z = draws(7, 40, grid.run)
    whole = torch.arange(32, dtype=torch.int64)
    closed = [trellis.solved(z, grid.paths, state.expand(40), state.expand(40)) for state in whole]
    best = torch.stack([(grid.table[path] - z).square().sum(1) for path in closed]).amin(0)
    found = (grid.snap(z) - z).square().sum(1)
    assert bool((found >= best - 1e-4).all())
    assert float(found.sum()) < 1.02 * float(best.sum())


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("grain", [Channel(), Group(64)])
def test_bytes_are_those_of_the_bits_and_the_steps(name: str, grain: Channel | Group) -> None:
    ranger = parts.build("ranger", parts.read("ranger", "deviation"))
    fmt = Format(grid_of(name), grain, ranger, Float16())
    w_OI = draws(8, 5, 128) * 0.02
    codes = fmt.encode(w_OI)
    stored = pack(codes.codes_OI, fmt.grid.bits)
    assert stored.numel() == 5 * packed_bytes(128, fmt.grid.bits) == 5 * 128 * fmt.grid.bits // 8
    assert fmt.bytes((5, 128)) == stored.numel() + 2 * codes.step.scale_G1.numel()
    assert torch.equal(unpack(stored, fmt.grid.bits, 128), codes.codes_OI)
    w_hat_OI = fmt.decode(codes)
    assert float((w_hat_OI - w_OI).square().mean() / w_OI.square().mean()) < 0.8 * ALONE[fmt.grid.bits]
    assert torch.equal(fmt.encode(w_hat_OI, codes.step).codes_OI, codes.codes_OI)
    assert torch.equal(fmt.load(codes.step.fields).scale_G1, codes.step.scale_G1)


def test_what_runs_do_not_divide_is_said() -> None:
    ranger = parts.build("ranger", parts.read("ranger", "deviation"))
    fmt = Format(grid_of("trellis2"), Group(16), ranger, Float16())
    assert refusal(fmt, (4, 64)) == "trellis2 rounds runs of 32 weights, which do not divide groups of 16"
    fmt = Format(grid_of("trellis2"), Channel(), ranger, Float16())
    assert refusal(fmt, (4, 100)) == "trellis2 rounds runs of 32 weights, which do not divide a width of 100"
    assert refusal(fmt, (4, 96)) is None
    with pytest.raises(ValueError, match="words of 32 weights do not divide a run of 100"):
        fmt.encode(torch.zeros(4, 100))
    with pytest.raises(ValueError, match="no table for windows of 9 at 2 bits"):
        Trellis(2, 9)


def test_some_runs_of_a_long_group_speak_for_all() -> None:
    x_GK = torch.arange(4096.0).view(2, 2048)
    assert some(x_GK, 32)[0].tolist() == [float(start + i) for start in range(0, 2048, 128) for i in range(32)]
    assert some(x_GK[:, :500], 1).shape == (2, 500)
    assert some(x_GK[:, :1000], 32).shape == (2, 1000)


@pytest.mark.parametrize("name", SPELLINGS)
def test_rows_of_zeros_stay_next_to_nothing(name: str) -> None:
    ranger = parts.build("ranger", parts.read("ranger", "deviation"))
    fmt = Format(grid_of(name), Channel(), ranger, Float16())
    assert float(fmt.decode(fmt.encode(torch.zeros(2, 64))).abs().max()) < 1e-4
