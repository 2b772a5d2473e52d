"""Inputs that kernels take as codes: zero points, stored steps, groups of channels, transforms. Integers are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import regauge as rg
from panels import case, random
from regauge import parts
from regauge.engine import apply
from regauge.errors import RecipeError
from regauge.formats.base import Codes, Format
from regauge.formats.readings import Reading, fit
from regauge.formats.terms import LowRank
from regauge.formats.transforms import Crossed
from regauge.kernels.cpu import coded
from regauge.kernels.cpu.coded import Tokens
from regauge.plan import parse
from regauge.runtime.matrices import codes as own
from regauge.runtime.matrices.modules import PackedMatrix
from tests import tiny
from tests.pico import pico, save

pytestmark = [
    pytest.mark.skipif(not coded.here(), reason="the C++ kernels that are here take no ready codes"),
    pytest.mark.usefixtures("one_thread"),
]

SHAPE = (37, 192)
WORDS = {
    "static": {"grid": "int8", "grain": "tensor", "ranger": "static"},
    "static asym": {"grid": "int8-asym", "grain": "tensor", "ranger": "static"},
    "static int6": {"grid": "int6-asym", "grain": "tensor", "ranger": "static"},
    "static grouped": {"grid": "int4-asym", "grain": "group:96", "ranger": "static"},
    "asym": {"grid": "int8-asym", "grain": "token"},
    "grouped": {"grid": "int4-asym", "grain": "group:96"},
    "tensor": {"grid": "int8", "grain": "tensor"},
    "hadamard": {"transform": "hadamard", "grid": "int4", "grain": "token"},
    "turned static": {"transform": "hadamard", "grid": "int8-asym", "grain": "tensor", "ranger": "static"},
    "diagonal static": {"transform": "diagonal", "grid": "int8-asym", "grain": "tensor", "ranger": "static"},
}
PAIR = {"left": torch.randn(12, 12, generator=random(10)), "right": torch.randn(16, 16, generator=random(11))}
"""Factors of a learnt transform: neither of them orthogonal."""


def reading_of(name: str, columns: int = SHAPE[1]) -> Reading:
    """A reading whose range is from -1.7 to 3.1, where it is static."""
    if name.startswith("kronecker"):
        plain = reading_of("static asym" if "static" in name else "asym")
        return replace(plain, transform=Crossed(PAIR["left"], PAIR["right"]))
    point = parts.point("inputs", **WORDS[name])
    ends = {"minimum": torch.full((columns,), -1.7), "maximum": torch.linspace(1, 3.1, columns)}
    maker = parts.maker_of(point)
    stats = {need: torch.linspace(0.5, 2, columns) for need in maker.needs}
    return fit(parts.format_of(point), maker.fit(columns, stats, [torch.randn(5, columns, generator=random(9))]), ends)


def weights(grid: str = "int4-asym", grain: str = "group:96") -> tuple[Format, Codes]:
    fmt = parts.format_of(parts.point("weights", grid=grid, grain=grain, scale="f32", ranger="minmax"))
    return fmt, fmt.encode(torch.randn(SHAPE, generator=random(0)))


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
@pytest.mark.parametrize("columns", [131, 384])
def test_sums_of_codes_with_zero_points_are_exact(level: str, bits: int, columns: int) -> None:
    """Against 64-bit integers: any number of tokens, zero points of all tokens and of each, at the ends of a byte."""
    one = case(f"int{bits}", 37, columns)
    w_OI = one.codes_OI.long() - (1 << (bits - 1))
    for count in (1, 3, 4, 8, 9, 13, 29):
        z_TI = torch.randint(-128, 128, (count, columns), generator=random(count), dtype=torch.int8)
        z_TI[0], step_T1 = -128, torch.exp2(torch.arange(count).float() % 5 - 2).view(-1, 1)
        zero_T1 = torch.randint(-128, 128, (count, 1), generator=random(bits), dtype=torch.int32)
        zero_T1[0] = 127
        for zero_N1 in (None, zero_T1, zero_T1[-1:], torch.full((1, 1), -128, dtype=torch.int32)):
            less_TI = z_TI.long() if zero_N1 is None else z_TI.long() - zero_N1.long()
            row_O = torch.ones(37) if one.packed.row_scale_O is None else one.packed.row_scale_O[:37]
            wanted = (less_TI @ w_OI.T).double() * step_T1.double() * row_O.double()
            found = coded.linear(Tokens(z_TI, step_T1, zero_N1), one.packed, torch.float32).double()
            torch.testing.assert_close(found, wanted, rtol=4e-7, atol=0.5**20)


def test_a_step_for_each_group_of_channels(level: str) -> None:
    one = case("int4-asym", 37, 384, 64, torch.float16)
    z_TI = torch.randint(-128, 128, (14, 384), generator=random(1), dtype=torch.int8)
    scale_TG = torch.rand(14, 3, generator=random(2)) + 0.1
    zero_TG = torch.randint(-128, 128, (14, 3), generator=random(3), dtype=torch.int32)
    for zero_NG in (None, zero_TG, zero_TG[:1]):
        less_TGK = z_TI.double().view(14, 3, 128) - (0 if zero_NG is None else zero_NG.double().unsqueeze(-1))
        wanted = (less_TGK * scale_TG.double().unsqueeze(-1)).view(14, 384) @ one.weights().double().T
        for count in (4, 14):
            some = zero_NG if zero_NG is None or len(zero_NG) == 1 else zero_NG[:count]
            x = Tokens(z_TI[:count], scale_TG[:count].contiguous(), some)
            found = coded.linear(x, one.packed, torch.float32).double()
            assert float((found - wanted[:count]).norm() / wanted[:count].norm()) < 1e-6


def test_what_the_kernels_do_not_multiply_is_a_sentence() -> None:
    one = case("int4", 37, 384, 64, torch.float16)
    z_TI = torch.zeros(2, 384, dtype=torch.int8)
    for groups, zero, message in (
        (12, None, "do not multiply such codes"),  # two steps in one group of the panels
        (5, None, "384 channels are no 5 equal groups"),
        (1, 128, "do not multiply such codes"),
    ):
        zero_11 = None if zero is None else torch.full((1, 1), zero, dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            coded.linear(Tokens(z_TI, torch.ones(2, groups), zero_11), one.packed, torch.float32)
    with pytest.raises(ValueError, match="do not multiply such codes"):
        coded.linear(Tokens(z_TI[:, :131].contiguous(), torch.ones(2, 1)), case("fp8").packed, torch.float32)


@pytest.mark.parametrize("name", WORDS)
def test_a_packed_matrix_multiplies_the_codes_of_its_reading(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sees the very codes of `Reading.codes`, whose product is what float64 makes of them, and no input goes
    through its codes and back."""
    reading, (fmt, codes) = reading_of(name), weights()
    packed = PackedMatrix(codes, fmt, torch.float32, reading=reading)
    assert "simulated" not in packed.way.name
    seen: list[Tokens] = []
    real = coded.linear_of
    monkeypatch.setattr(coded, "linear_of", lambda x, *rest: seen.append(x) or real(x, *rest))
    monkeypatch.setattr(Reading, "simulate", lambda *_: pytest.fail("an input went through its codes and back"))
    for count in (0, 1, 5, 33):
        x_TI = torch.randn(count, SHAPE[1], generator=random(count)) * 1.5
        y_TO = packed(x_TI)
        assert y_TO.shape == (count, SHAPE[0])
        if not count:
            continue
        x, wanted = seen.pop(), reading.codes(x_TI)
        groups = x.scale_TG.shape[1]
        assert less(x.z_TI.float(), x.zero_NG, groups).equal(less(wanted.z_TI, wanted.step.zero_G1, groups))
        assert x.scale_TG.equal(wanted.step.scale_G1.view(-1, groups).expand(count, groups))
        product = wanted.decode().double() @ fmt.decode(codes).double().T
        assert float((y_TO.double() - product).norm() / product.norm()) < 3e-7


def less(z_TI: torch.Tensor, zero: torch.Tensor | None, groups: int) -> torch.Tensor:
    """Codes less the zero points of their groups."""
    zero_NG1 = torch.zeros(1, groups, 1) if zero is None else zero.float().view(-1, groups, 1)
    return (z_TI.view(len(z_TI), groups, -1) - zero_NG1).view(z_TI.shape)


@pytest.mark.parametrize("weight", ["nf4", "fp8"])
def test_what_is_no_integer_stays_simulated(weight: str) -> None:
    packed = PackedMatrix(*reversed(weights(weight, "group:96")), torch.float32, reading=reading_of("static"))  # type: ignore[arg-type]  # codes and format
    assert "simulated" in packed.way.name


def test_a_step_a_channel_is_no_sum_of_integers() -> None:
    fmt, codes = weights()
    point = parts.point("inputs", grid="int8", grain="group:1", ranger="static")
    ends = {"minimum": torch.full((192,), -1.0), "maximum": torch.linspace(1, 3, 192)}
    reading = fit(parts.format_of(point), parts.maker_of(point).fit(192, {}, []), ends)
    packed = PackedMatrix(codes, fmt, torch.float32, reading=reading)
    assert "simulated" in packed.way.name
    assert not own.alone(reading)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["static asym", "asym", "static grouped"])
def test_a_value_that_is_none_spoils_its_token_alone(name: str, bad: float) -> None:
    fmt, codes = weights()
    packed = PackedMatrix(codes, fmt, torch.float32, reading=reading_of(name))
    for count in (2, 20):
        x_TI = torch.randn(count, SHAPE[1], generator=random(3))
        wanted = packed(x_TI)
        x_TI[1, 7] = bad
        found = packed(x_TI)
        assert found[1].isnan().all()
        assert found[0].equal(wanted[0])
        assert found[2:].equal(wanted[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_in_float32(dtype: torch.dtype) -> None:
    fmt, codes = weights()
    packed = PackedMatrix(codes, fmt, dtype, reading=reading_of("static asym"))
    x_TI = torch.randn(20, SHAPE[1], generator=random(4)).to(dtype)
    wanted = packed.reading.codes(x_TI).decode().double() @ fmt.decode(codes).double().T  # type: ignore[union-attr]  # it has one
    found = packed(x_TI)
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm() / wanted.norm()) < (4e-3 if dtype != torch.float64 else 1e-6)


@pytest.mark.parametrize("name", [*WORDS, "kronecker", "kronecker static"])
@pytest.mark.parametrize("grid", ["int4-asym", "nf4"])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_gradient_of_the_input_is_through_the_decoded_weights_and_the_transform(
    name: str, grid: str, rank: int
) -> None:
    """As autograd has it of x A Wᵀ, what lies beside the codes included: kernels that take codes, simulated inputs. Of
    static steps as of the simulated reading, by which nothing passes where a value lies outside the range."""
    fmt, codes = weights(grid)
    left, right = torch.randn(SHAPE[0], rank, generator=random(6)), torch.randn(rank, SHAPE[1], generator=random(7))
    codes = replace(codes, terms=(LowRank(left, right),) if rank else ())
    reading = reading_of(name)
    packed = PackedMatrix(codes, fmt, torch.float32, reading=reading)
    x_TI, dy_TO = (torch.randn(20, width, generator=random(5)) for width in (SHAPE[1], SHAPE[0]))
    given, alike = x_TI.clone().requires_grad_(), x_TI.double().requires_grad_()
    packed(given).backward(dy_TO)  # type: ignore[no-untyped-call]  # torch's own
    w_OI = (fmt.decode(codes) + left @ right).double()
    read = reading.passed if reading.step is not None else reading.transform.forward
    (read(alike) @ w_OI.T).backward(dy_TO.double())
    assert given.grad is not None
    assert alike.grad is not None
    assert reading.step is None or not reading._inside(x_TI).all()
    torch.testing.assert_close(given.grad.double(), alike.grad, rtol=1e-4, atol=1e-4)


W8 = "{grid: int8, grain: channel, ranger: absmax, scale: f32, rounder: nearest}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model all of whose inputs have a static step and a zero point, one of them turned."""
    folder = tmp_path_factory.mktemp("static")
    model = save(pico("llama", vocab_size=258, intermediate_size=48), folder / "model")
    tiny.tokenizer().save_pretrained(model)
    plan = parse(
        f'name: static\nweights: {{"blocks.*": {W8}}}\ninputs:\n'
        "  blocks.*: {grid: int8-asym, grain: tensor, ranger: static}\n"
        "  blocks.*.mlp.hidden: {transform: hadamard, grid: int8, grain: tensor, ranger: static}\n"
    )
    apply(plan, model, folder / "out", calibration=tiny.text(folder, 6000), tokens=512, length=32)
    return folder / "out"


def test_a_prompt_of_a_static_model_goes_through_the_kernels(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its logits are the simulated ones, which the same artifact gives where the kernels take no ready codes."""
    ids = torch.arange(3, 30)[None]
    with pytest.MonkeyPatch.context() as without:
        without.setattr(coded, "here", lambda: False)
        simulated = rg.load(made, activations="float32", dtype="float32")(ids).logits
    model = rg.load(made, activations="float32", dtype="float32")
    monkeypatch.setattr(Reading, "simulate", lambda *_: pytest.fail("an input went through its codes and back"))
    found = model(ids).logits
    assert float((found - simulated).norm() / simulated.norm()) < 1e-5


def test_a_trace_of_it_says_native_and_of_a_transform_that_it_is_none(made: Path) -> None:
    """A turned input's site multiplies integers too; what turns it is a product of its own, and one of floats."""
    found = {one.name: one for one in rg.trace(made).products if one.name.startswith("blocks.")}
    runs = {name: one.runs for name, one in found.items() if "attn.s" not in name}
    turned = {name for name in runs if name.endswith(".transform")}
    assert turned == {f"blocks.{block}.mlp.down.transform" for block in (0, 1)}
    assert {runs[name] for name in turned} == {"float"}
    assert {name.rpartition(".")[2] for name in runs.keys() - turned} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert {runs[name] for name in runs.keys() - turned} == {"native"}
    assert found["blocks.1.mlp.down"].times == 1
    assert found["blocks.1.mlp.down"].inputs == "hadamard, int8, static"
    assert "turned by floats" in found["blocks.1.mlp.down.transform"].why


def test_a_recipe_that_promises_integers_turns_no_input(made: Path, tmp_path: Path) -> None:
    plan = parse(
        f"name: turned\nproducts: integer\nweights: {{'{{blocks.*,embed,head}}': {W8}}}\ninputs:\n"
        "  blocks.* | *.{queries,keys,values,probabilities} | head.in: {grid: int8, grain: tensor, ranger: static}\n"
        "  blocks.*.mlp.hidden: {transform: hadamard, grid: int8, grain: tensor, ranger: static}\n"
    )
    with pytest.raises(RecipeError, match=r"turned in floats before it is rounded: blocks.0.mlp.hidden"):
        apply(plan, made.parent / "model", tmp_path / "out", calibration=tiny.text(tmp_path, 6000))


def test_a_static_step_outside_the_blocks_is_refused(tmp_path: Path) -> None:
    """But for what the head reads, of which calibration keeps the ends of its range."""
    model = save(pico("vit"), tmp_path / "model")
    weights = "{blocks.*: {grid: int8, grain: channel}, embed.patch: {grid: int8, grain: channel}}"
    plan = parse(
        f"name: x\nweights: {weights}\ninputs: {{embed.patch.in: {{grid: int8, grain: tensor, ranger: static}}}}\n"
    )
    with pytest.raises(
        RecipeError, match=r"embed\.patch\.in is read outside the blocks, where activations have no static"
    ):
        apply(plan, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
