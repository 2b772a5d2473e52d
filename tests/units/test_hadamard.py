"""Hadamard matrices: by hand, by their law, and for the widths of real models."""

from __future__ import annotations

import pytest
import torch

from regauge.formats.hadamard import factorise, hadamard, prime_order, rotation


def test_by_hand() -> None:
    assert hadamard(1).tolist() == [[1]]
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]
    # Paley I over GF(3): squares are {1}, so χ = 0, 1, −1.
    assert prime_order(4).tolist() == [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]


@pytest.mark.parametrize(
    ("n", "orders"),
    [
        (12, (12,)),
        (20, (20,)),
        (28, (28,)),  # 27 = 3³
        (36, (36,)),  # Paley II, 17
        (52, (52,)),  # Paley II, 25 = 5²
        (76, (76,)),  # Paley II, 37
        (100, (100,)),  # Paley II, 49 = 7²
        (144, (12, 12)),
        (576, (2, 2, 12, 12)),
        (896, (2, 2, 2, 2, 2, 28)),
        (344, (344,)),  # 343 = 7³
    ],
)
def test_constructions(n: int, orders: tuple[int, ...]) -> None:
    assert factorise(n) == orders
    matrix = hadamard(n)
    assert set(matrix.unique().tolist()) == {-1, 1}
    wide = matrix.to(torch.int64)
    assert torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.int64))


def test_every_order_of_paley_and_sylvester_below_130_is_found() -> None:
    """Of the multiples of four below 130 only 92 and 116 need other constructions."""
    assert [n for n in range(4, 130, 4) if factorise(n) is None] == [92, 116]
    assert all(factorise(n) is None for n in (3, 5, 6, 10, 22, 23))


@pytest.mark.parametrize("width", [768, 896, 1024, 1152, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 576, 960])
def test_widths_of_real_models_have_one(width: int) -> None:
    assert factorise(width) is not None


@pytest.mark.parametrize("width", [11008, 14336, 18944, 8960, 13824, 6912, 5632, 17408])
def test_neurons_of_real_models_have_one(width: int) -> None:
    assert factorise(width) is not None


@pytest.mark.parametrize("n", [1, 2, 12, 24, 48, 96, 128, 160, 7, 23, 46, 92])
def test_rotation_is_orthogonal_fast_and_undone(n: int) -> None:
    q = rotation(n, seed=3)
    matrix = q.matrix()
    eye = torch.eye(n, dtype=torch.float64)
    assert (matrix @ matrix.T - eye).abs().max() < 1e-14
    x = torch.randn(3, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (q(x, 1) - torch.einsum("ij,ajb->aib", matrix, x)).abs().max() < 1e-13
    assert (q.inverse()(q(x, 1), 1) - x).abs().max() < 1e-14
    assert torch.equal(rotation(n, seed=3).matrix(), matrix)
    if n > 2:
        assert not torch.equal(rotation(n, seed=4).matrix(), matrix)


def test_a_hadamard_spreads_one_channel_evenly_and_a_fallback_says_so() -> None:
    for n in (64, 96, 28):
        q = rotation(n, seed=0)
        assert torch.allclose(q.matrix().abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))
        assert q.made.startswith("Hadamard")
    assert rotation(96, 0).made == "Hadamard of size 96 (Sylvester 2^3 ⊗ Paley I of order 12 over GF(11))"
    fallback = rotation(46, seed=0)
    assert fallback.made == (
        "random orthogonal matrix of size 23 times a Hadamard of size 2 (Sylvester 2^1): "
        "no construction of a Hadamard of size 46 is known here"
    )
    assert (fallback.matrix().abs() < 1e-9).sum() < 5  # every channel meets every other
