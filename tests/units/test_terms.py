"""What compensators give: whole terms of a kind that an artifact can hold, or a refusal in a sentence."""

from __future__ import annotations

import math

import pytest
import torch

from regauge import parts
from regauge.engine.block import round_site
from regauge.errors import RecipeError
from regauge.formats.terms import LowRank, checked
from tests.artifacts import choice


class Given:
    """What a part of another package may give as a term."""

    def __init__(self, kind: object, **tensors: object) -> None:
        self.kind, self.tensors = kind, tensors


FACTORS = {"left": torch.ones(3, 1), "right": torch.ones(1, 5)}
UNWHOLE: dict[str, tuple[object, str]] = {
    "a mapping": ({"bias": torch.ones(3)}, "gives a dict where a tuple of terms is due"),
    "nothing": (None, "gives a NoneType"),
    "a list": ([], "gives a list"),
    "tensors": ((torch.ones(3),), "gives a Tensor, which has no kind"),
    "another kind": ((Given("bias", bias=torch.ones(3)),), "kind 'bias', which nothing applies"),
    "no kind": ((Given(None),), "kind None"),
    "half": ((Given("low-rank", left=torch.ones(3, 1)),), "has left and wants left and right"),
    "more": ((Given("low-rank", **FACTORS, bias=torch.ones(3)),), "has bias, left, right"),
    "other ranks": ((Given("low-rank", left=torch.ones(3, 2), right=torch.ones(1, 5)),), "factors are"),
    "another shape": ((Given("low-rank", left=torch.ones(4, 1), right=torch.ones(1, 5)),), "is 4 x 5"),
    "NaN": ((Given("low-rank", left=torch.full((3, 1), math.nan), right=torch.ones(1, 5)),), "NaN or infinity"),
    "two": ((Given("low-rank", **FACTORS), Given("low-rank", **FACTORS)), "two terms of kind 'low-rank'"),
}


@pytest.mark.parametrize("what", UNWHOLE)
def test_terms_that_could_not_be_read_again_are_refused(what: str) -> None:
    found, why = UNWHOLE[what]
    with pytest.raises(ValueError, match=why):
        checked(found, (3, 5))


def test_terms_are_what_their_tensors_say() -> None:
    """An `apply` of another package is not used: the artifact holds tensors alone."""
    (term,) = checked((Given("low-rank", **FACTORS),), (3, 5))
    assert type(term) is LowRank
    assert term.dense().tolist() == torch.ones(3, 5).tolist()
    assert checked((), (3, 5)) == ()


def test_the_engine_says_which_part_and_which_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange:
        again = 0

        def __call__(self, *given: object) -> dict[str, torch.Tensor]:
            return {"left": torch.ones(3, 1)}

    monkeypatch.setattr(parts, "compensator_of", lambda _: Strange())
    with pytest.raises(RecipeError, match=r"the compensator 'lorc' does not serve a matrix of 3 x 32: it gives a dict"):
        round_site(torch.ones(3, 32), choice("int4", lorc=1).point, {})
