"""Fairy2i: the complex form is exact, each pass leaves less, and the product only adds and subtracts inputs."""

from __future__ import annotations

import pytest
import torch

from regauge.formats.phases import Phases, join, nearest, phases, signs, split, values
from regauge.formats.terms import KINDS, NAMES, checked
from regauge.rounding.compensators import PhasesLeft


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_complex_form_is_the_layer() -> None:
    w_OI, x_TI = draws(0, 14, 22).double(), draws(1, 5, 22).double()
    u_HJ, v_HJ = split(w_OI)
    x = torch.complex(*x_TI.chunk(2, 1))
    y = x @ u_HJ.T + x.conj() @ v_HJ.T
    assert torch.allclose(torch.cat([y.real, y.imag], 1), x_TI @ w_OI.T, atol=1e-12, rtol=0)
    assert torch.allclose(join(u_HJ, v_HJ), w_OI, atol=1e-15)


def test_sectors_and_steps_by_hand() -> None:
    w_HJ = torch.tensor([[3 + 1j, -1 + 2j, -5 - 4j, 0.5 - 6j]])
    codes_HJ, steps_2 = nearest(w_HJ)
    assert codes_HJ.tolist() == [[0, 1, 2, 3]]
    assert steps_2.tolist() == [4.0, 4.0]  # of 3 and 5, of 2 and 6
    assert values(codes_HJ, torch.tensor([4.0, 7.0])).tolist() == [[4, 7j, -4, -7j]]


def test_each_pass_leaves_less() -> None:
    w_OI = draws(2, 256, 512)
    left = [float((w_OI - phases(w_OI, n).dense()).norm() / w_OI.norm()) for n in (1, 2, 3, 4)]
    assert left == pytest.approx([0.60, 0.36, 0.24, 0.18], abs=0.02)
    assert phases(w_OI, 2).bytes == PhasesLeft(2).bytes((256, 512)) == 2 * (256 * 512 // 8 + 16)


def test_the_product_adds_and_subtracts_inputs() -> None:
    made = phases(draws(3, 12, 16), 3)
    for sign in signs(torch.arange(4, dtype=torch.uint8).view(1, 4)):
        assert set(sign.flatten().tolist()) == {-1, 0, 1}
    whole = Phases(made.codes_RB, torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 2, 2))
    x_TI, y_TO = draws(4, 7, 16).mul(9).round(), draws(5, 7, 12).mul(9).round()
    assert torch.equal(whole.apply(x_TI, y_TO), y_TO + x_TI @ whole.dense().T)  # whole numbers stay whole
    assert torch.allclose(made.apply(x_TI, y_TO), y_TO + x_TI @ made.dense().T, atol=1e-3)
    assert torch.equal(made.dense(torch.tensor([3, 11])), made.dense()[[3, 11]])


def test_what_is_kept_gives_it_again() -> None:
    w_OI, w_hat_OI = draws(6, 10, 24), draws(7, 10, 24)
    (term,) = checked(PhasesLeft(2)(w_OI, w_hat_OI, {}), (10, 24))
    assert set(term.tensors) == set(NAMES[term.kind])
    again = KINDS[term.kind]({name: tensor.clone() for name, tensor in term.tensors.items()})
    assert torch.equal(again.dense(), term.dense())
    assert float((w_OI - w_hat_OI - term.dense()).norm()) < 0.5 * float((w_OI - w_hat_OI).norm())
    with pytest.raises(ValueError, match="rows must divide by 2 and columns by 8"):
        phases(draws(8, 10, 12), 1)
    with pytest.raises(ValueError, match="passes are 1 to 8, not 0"):
        PhasesLeft(0)
