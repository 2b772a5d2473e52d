"""Under pytest a public tensor function refuses a shape or dtype that is not the one it names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError

from regauge.kernels import reference

CODES, TABLE = torch.zeros(3, 6, dtype=torch.uint8), torch.arange(4.0)
WRONG: dict[str, Callable[[], object]] = {
    "inner sizes differ": lambda: reference.integer_matmul(torch.ones(2, 3), torch.ones(4, 5)),
    "steps of another matrix": lambda: reference.dequantise(CODES, TABLE, torch.ones(2, 1)),
    "codes in floats": lambda: reference.pack(CODES.float(), 2),
    "codes in one run": lambda: reference.pack(CODES.view(-1), 2),
    "a bias of another length": lambda: reference.linear(
        torch.ones(1, 6), reference.pack(CODES, 2), 2, TABLE, torch.ones(3, 1), bias_O=torch.ones(1)
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_shape_is_refused(how: str) -> None:
    with pytest.raises(TypeCheckError):
        WRONG[how]()


def test_right_shapes_go_through() -> None:
    packed = reference.pack(CODES, 2)
    y_TO = reference.linear(torch.ones(2, 1, 6), packed, 2, TABLE, torch.ones(1, 2), bias_O=torch.ones(3))
    assert torch.equal(y_TO, torch.ones(2, 1, 3))
