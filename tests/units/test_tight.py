"""What a head reads of a prompt lies as if there were no more, and nothing else is changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.hosts.transformers.tight import closed
from tests.pico import pico, save


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_reads_the_last_row_close(tmp_path: Path, packed: bool) -> None:
    source, sizes = tmp_path / "model", {"hidden_size": 48, "vocab_size": 64}
    save(pico("llama", **sizes), source)
    if packed:
        rg.apply("rtn-w8", source, tmp_path / "out", quiet=True)
    model = rg.load(tmp_path / "out" if packed else source)
    seen: list[Any] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        last = model(input_ids=ids, logits_to_keep=1).logits
        every = model(input_ids=ids).logits
    assert seen[0] == (48, 48, 1)  # (12 * 48, 48, 1) as it was cut out
    torch.testing.assert_close(last, every[:, -1:])


def test_the_native_step_still_serves(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save(pico("llama"), source)
    rg.apply("rtn-w8", source, tmp_path / "out", quiet=True)
    model = rg.load(tmp_path / "out")
    with torch.inference_mode():
        found = model(input_ids=torch.arange(5)[None], use_cache=True)
        model(input_ids=torch.tensor([[3]]), past_key_values=found.past_key_values, use_cache=True)
    assert model.regauge_step.steps == 1


def test_rows_that_lie_apart_are_copied() -> None:
    x_BTH = torch.arange(48, dtype=torch.float32).view(2, 3, 8)[:, 1:]
    (found,) = closed(torch.nn.Identity(), (x_BTH,))
    assert found.is_contiguous()
    assert torch.equal(found, x_BTH)
    assert closed(torch.nn.Identity(), ()) == ()
