"""L-Mul: the integer addition is the definition, in products of matrices and in whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge import parts
from regauge.engine import measure
from regauge.errors import RecipeError, SettingError
from regauge.hosts import host_of
from regauge.measure.arithmetic import LMul, Products, under
from tests.pico import pico, save
from tests.words import save_tokenizer

OFFSETS = {1: 1, 2: 1, 3: 1, 4: 2, 7: 8}
"""2^(m - l(m)), by hand: l is m up to 3, 3 for 4 and 4 above."""
BIAS = 127


def added(x: tuple[int, int, int], y: tuple[int, int, int], bits: int) -> float:
    """Fields of sign, exponent and mantissa, added as one integer and read again."""
    size = 1 << bits
    field = (x[1] * size + x[2]) + (y[1] * size + y[2]) - BIAS * size + OFFSETS[bits]
    return (-1) ** (x[0] ^ y[0]) * 2.0 ** (field // size - BIAS) * (1 + field % size / size)


def value(x: tuple[int, int, int], bits: int) -> float:
    return (-1) ** x[0] * 2.0 ** (x[1] - BIAS) * (1 + x[2] / (1 << bits))


@pytest.mark.parametrize(("bits", "carries", "error"), [(3, 28, 0.052), (4, 136, 0.051), (7, None, 0.027)])
def test_products_are_the_integer_addition(bits: int, carries: int | None, error: float) -> None:
    size = 1 << bits
    sides = [(a % 2, BIAS + a % 5 - 2, a) for a in range(size)]
    x = torch.tensor([value(one, bits) for one in sides])
    found = LMul(bits).multiply(x[:, None], x[None, :])
    expected = torch.tensor([[added(one, other, bits) for other in sides] for one in sides])
    assert torch.equal(found, expected)
    formula = torch.tensor(
        [[1 + a / size + b / size + OFFSETS[bits] / size for b in range(size)] for a in range(size)],
        dtype=torch.float64,
    )
    if carries is not None:
        assert int((formula != LMul(bits).table).sum()) == carries
    true = (1 + torch.arange(size)[:, None] / size) * (1 + torch.arange(size)[None, :] / size)
    assert float(((LMul(bits).table - true) / true).abs().mean()) == pytest.approx(error, abs=5e-4)


def test_numbers_are_rounded_to_the_mantissa_first() -> None:
    power, mantissa = LMul(3).parts(torch.tensor([1.0, -1.0625, 1.96, 6.0, 0.0, 1.0625 + 1e-6, 1e-40]))
    assert power.tolist() == [1.0, -1.0, 2.0, 4.0, 0.0, 1.0, 0.0]  # 1.0625 lies on the tie, 1.96 rounds up to 2
    assert mantissa.tolist()[:6] == [0, 0, 0, 4, 0, 1]


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_a_product_of_matrices_sums_products_of_numbers(bits: int) -> None:
    drawn = torch.Generator().manual_seed(bits)
    x, y = torch.randn(2, 5, 31, generator=drawn), torch.randn(2, 31, 7, generator=drawn)
    x[0, 0, :3] = 0
    expected = LMul(bits).multiply(x[..., None], y[:, None]).double().sum(2)
    assert torch.allclose(LMul(bits).matmul(x, y).double(), expected, atol=1e-5)
    assert float((expected - (x @ y).double()).abs().max()) > 1e-2


def test_modules_multiply_so_while_it_is_entered_and_no_longer() -> None:
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, generator=drawn) for heads in (4, 2, 2))
    x, linear, ones = torch.randn(3, 8, generator=drawn), torch.nn.Linear(8, 5), torch.ones(1, 6)
    own = LMul(4)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), Products(own):
        made = (linear(x), x @ x.T, torch.addmm(linear.bias, x, linear.weight.T), torch.ones(4, 1).mul(1.3) @ ones)
        causal = attend(q, k, v, is_causal=True, enable_gqa=True)
        masked = attend(q, k, v, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril(), enable_gqa=True)
    want = own.matmul(x, linear.weight.T) + linear.bias
    assert torch.allclose(made[0], want)
    assert torch.allclose(made[2], want)
    assert torch.allclose(made[1], own.matmul(x, x.T))
    assert torch.equal(made[3], torch.full((4, 6), 1.3))  # an outer product sums nothing
    assert torch.equal(causal, masked)
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    shares = own.matmul(q, wide_k.transpose(-1, -2)) / 8**0.5
    shares = shares.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    assert torch.allclose(causal, own.matmul(shares, wide_v))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_a_model_is_nearer_to_itself_with_more_bits(tmp_path: Path) -> None:
    path = save(pico("llama"), tmp_path / "model")
    batches = [{"input_ids": torch.arange(12)[None] % 29}]
    read = host_of(path).outputs
    (want,) = read(path, batches)()
    errors = []
    for bits in (1, 3, 7):
        outputs = under(LMul(bits), read(path, batches))
        (found,), (again,) = outputs(), outputs()
        assert torch.equal(found, again)
        errors.append(float((found - want).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_what_cannot_be_evaluated_is_a_sentence(tmp_path: Path) -> None:
    path = save_tokenizer(save(pico("llama"), tmp_path / "model"))
    assert parts.build(parts.ARITHMETIC, parts.read(parts.ARITHMETIC, "l-mul:3", parts.MEASURE)) == LMul(3)
    with pytest.raises(RecipeError, match=r"there is no arithmetic 'lmul' \(did you mean 'l-mul'"):
        measure([path], arithmetic="lmul")
    with pytest.raises(RecipeError, match="l-mul adds mantissas of 1 to 7 bits, not 9"):
        measure([path], arithmetic="l-mul:9")
    with pytest.raises(SettingError, match="l-mul:4 is evaluated on a text: leave out tasks and long"):
        measure([path], arithmetic="l-mul:4", long=4)
