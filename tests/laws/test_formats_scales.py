"""Laws of every scale in the table of parts."""

from __future__ import annotations

import pytest
import torch

from regauge import parts
from regauge.formats.base import Scale
from regauge.formats.grids import E2M1, Int
from regauge.kernels.reference import pack

SCALES = [*sorted(parts.TABLE["scale"]), "super:6", "super-low:4"]


def scale_of(name: str) -> Scale:
    made: Scale = parts.build("scale", parts.read("scale", name))
    return made


STEPS = {
    "normal": [0.013, 0.5, 1.7, 1e-4, 3.0, 0.26],
    "zeros": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "one zero": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
    "tiny": [1e-45, 1e-40, 1e-38, 1e-37, 2e-39, 0.0],
    "huge": [1e38, 3e38, 1e30, 1.0, 0.0, 1e-30],
    "equal": [0.1] * 6,
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_stored_step_is_positive_finite_and_stays(name: str, steps: list[float], rows: int) -> None:
    raw_G1 = torch.tensor(steps).view(-1, 1)
    scale = scale_of(name).bind(raw_G1, E2M1(), rows)
    assert scale.bind(raw_G1 * 3, E2M1(), rows).store(raw_G1)[0].equal(scale.store(raw_G1)[0])  # bound once
    stored_G1, fields = scale.store(raw_G1)
    assert stored_G1.dtype is torch.float32
    assert bool((stored_G1 > 0).all())
    assert bool(stored_G1.isfinite().all())
    assert torch.equal(scale.load(fields), stored_G1)
    again_G1, again = scale.store(stored_G1)
    assert torch.equal(again_G1, stored_G1)
    assert all(torch.equal(again[key].float(), fields[key].float()) for key in fields)
    fields = {
        key: pack(field.view(1, -1), scale.packed[key]) if key in scale.packed else field
        for key, field in fields.items()
    }
    size = sum(field.numel() * field.element_size() for field in fields.values())
    assert size == scale.bytes(len(steps), rows)


@pytest.mark.parametrize("name", SCALES)
def test_an_ordinary_step_is_stored_near_itself(name: str) -> None:
    raw_G1 = torch.linspace(0.01, 3.0, 30).view(-1, 1) * 0.02 + 0.005
    scale = scale_of(name).bind(raw_G1, Int(4), 3)
    ratio = scale.store(raw_G1)[0] / raw_G1
    assert bool((ratio > 0.49).all())
    assert bool((ratio < 2.01).all())
    if name in ("m1", "m2"):
        assert bool((ratio > 0.999).all())  # never smaller: nothing is clipped
