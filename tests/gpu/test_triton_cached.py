"""Attention over packed parts against its definition: every width that is read, both axes, ragged heads, padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parts import part_of, with_rows
from regauge.errors import RegaugeError
from regauge.kernels.attention import Part, Window
from regauge.kernels.attention import attend as defined
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.triton.cached import attend

pytestmark = pytest.mark.gpu

LENGTHS = torch.tensor([[64, 0], [32, 256]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layouts(bits: int, size: int, axes: tuple[str, str], low: bool) -> list[BlockLayout]:
    offset = 0 if low or bits == 16 else 1 << (bits - 1)
    groups = [32 if axis == "time" else size for axis in axes]
    low = low and bits != 16
    return [
        BlockLayout(role, 32, size, bits, axis, group, low, offset)
        for role, axis, group in zip(("keys", "values"), axes, groups, strict=True)
    ]


def moved(part: Part, device: torch.device) -> Part:
    """The same with its memory on the device."""
    names = ("key_blocks", "value_blocks", "key_offsets_BK", "value_offsets_BK", "lengths_BK", "firsts_BK", "key_rows")
    found: dict[str, Any] = {name: getattr(part, name) for name in (*names, "value_rows", "row_offsets_BK")}
    return replace(part, **{name: one.to(device) for name, one in found.items() if one is not None})


def far(
    q: Tensor, parts: list[Part], window: Window, device: torch.device, scale: float, softcap: float = 0.0
) -> float:
    on = Window(window.keys_BKTD.to(device), window.values_BKTE.to(device), window.lengths_BK, window.firsts_BK)
    found = attend(q.to(device), [moved(part, device) for part in parts], on, scale, softcap)
    wide = Window(window.keys_BKTD.double(), window.values_BKTE.double(), window.lengths_BK, window.firsts_BK)
    wanted = defined(q.double(), parts, wide, scale, softcap)
    return float((found.double().cpu() - wanted).abs().max())


def some(size: int, new: int = 2) -> tuple[Tensor, Window]:
    q = torch.randn(2, new, 6, size, generator=seeded(0))
    keys, values = (torch.randn(2, 2, 5, size, generator=seeded(seed)) for seed in (1, 2))
    return q, Window(keys, values)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("axes", [("time", "channels"), ("channels", "time")], ids="-".join)  # of keys, of values
def test_cached_codes_of_every_width_along_both_axes(bits: int, axes: tuple[str, str], device: torch.device) -> None:
    q, window = some(24)
    part = part_of(*layouts(bits, 24, axes, bits % 2 == 0), LENGTHS, seeded(bits))
    assert far(q, [part], window, device, 0.3) < 1e-4


def test_cached_padding_multipliers_caps_and_several_parts(device: torch.device) -> None:
    q, window = some(32, 3)
    part = with_rows(part_of(*layouts(4, 32, ("time", "channels"), True), LENGTHS, seeded(1)), seeded(2))
    part = replace(part, firsts_BK=torch.tensor([[40, 0], [32, 7]], dtype=torch.int32))
    other = part_of(*layouts(2, 32, ("time", "time"), False), LENGTHS.flip(0), seeded(3))
    window = replace(window, firsts_BK=torch.tensor([[0, 1], [2, 0]], dtype=torch.int32))
    assert far(q, [part, other], window, device, 0.2) < 1e-4
    assert far(q, [part, other], window, device, 0.2, softcap=3.0) < 1e-4


def test_cached_blocks_that_are_not_read_are_refused(device: torch.device) -> None:
    q, window = some(32)
    part = part_of(*layouts(5, 32, ("time", "channels"), True), LENGTHS, seeded(1))
    with pytest.raises(RegaugeError, match="codes of 5 bits of the grid integers are not read on a GPU"):
        attend(q.to(device), [moved(part, device)], window, 0.3)


def test_cached_a_loaded_model_decodes_by_the_codes(device: torch.device, tmp_path: Any, monkeypatch: Any) -> None:
    """As when what is held is decoded first: padded on the left, with beams, a block sealed on the way."""
    import regauge
    from regauge.hosts.transformers import attending, coding
    from tests.pico import pico, save

    rule = {"keys": "int4-asym/time:32", "values": "int4-asym/token", "window": 8}
    folder = save(pico("llama", 0), tmp_path / "model")
    ids = (torch.arange(2 * 103).view(2, 103) * 7 % 53).to(device)  # the first new token seals the third block
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    calls: list[int] = []

    def counted(layer: Any, query: Tensor, *more: Any) -> Tensor | None:
        found = coding.attended(layer, query, *more)
        calls.append(query.shape[2] * (found is not None))
        return found

    monkeypatch.setattr(attending, "attended", counted)
    said = []
    for read in (True, False):
        model = regauge.load(folder, device="cuda", dtype="float32", cache=rule)
        if not read:
            monkeypatch.setattr(coding, "installed", lambda name: False)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        said.append(torch.stack(out.logits))
        assert bool(calls) == read
        assert all(calls)
        calls.clear()
    torch.testing.assert_close(said[0], said[1], rtol=1e-3, atol=1e-3)
