"""Certificates: the measure by hand, and the error that names what was moved."""

from __future__ import annotations

import pytest
import torch

from regauge.anatomy.certificate import EXACT, TOLERANCE, certify, relative_error
from regauge.errors import ExactnessError


def test_relative_error_by_hand() -> None:
    assert relative_error(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.tensor([float("inf")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_certify_returns_the_error_or_names_what_was_moved() -> None:
    x = torch.tensor([2.0], dtype=torch.float64)
    assert certify(x + 1e-11, x, EXACT, "block 3") == pytest.approx(5e-12, rel=1e-3)
    with pytest.raises(ExactnessError, match=r"blocks\.3\.value\.1 of block 3: the output changed by 5\.0e-02"):
        certify(x + 0.1, x, EXACT, "blocks.3.value.1 of block 3")
    with pytest.raises(ExactnessError):
        certify(x * float("nan"), x, TOLERANCE[torch.bfloat16], "block 3")
    assert TOLERANCE[torch.float64] == EXACT < TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]
