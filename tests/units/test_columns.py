"""Matrices in full precision that lie column by column: the head of a family that offers fewer channels.

Legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.artifact.cutting import FILE as CUT
from regauge.artifact.families import FILE
from regauge.engine.extracting import extract
from regauge.errors import ArtifactError
from regauge.kernels.cpu.interface import has
from regauge.kernels.cpu.pieces import Norm, Site, full
from regauge.kernels.cpu.step import Program
from tests.families import FAMILY, given, made, same
from tests.units.conftest import threads

pytestmark = pytest.mark.skipif(not has("rg_has_columns"), reason="the C++ kernels that are here read rows alone")


def turned(matrix_OI: Tensor) -> Tensor:
    """The same numbers, column by column."""
    return matrix_OI.t().contiguous().t()


def product(matrix_OI: Tensor, x_TI: Tensor) -> Tensor:
    """By a program of nothing but a head."""
    width = x_TI.shape[1]
    program = Program((), Norm("none", width, 0.0), Site(matrix_OI, activations="float32"), width, 0, 0.0)
    return program(x_TI.contiguous(), [0] * len(x_TI), [0] * len(x_TI), (), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4224, 24), (83, 37), (16, 8), (5, 3)])
def test_products_are_the_same_and_first_columns_those_of_a_copy(
    level: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    by_rows = torch.randn(rows, columns, generator=generator).to(dtype)
    whole, x_TI = turned(by_rows), torch.randn(9, columns, generator=generator)
    for count in (1, 2, 3, 5, 8, 9):
        found = product(whole, x_TI[:count])
        exact = x_TI[:count].double() @ by_rows.double().t()
        assert (found - exact).abs().max() < 2e-6 * columns**0.5 * 8
        assert found.equal(torch.cat([product(whole, x_TI[t : t + 1]) for t in range(count)]))
        with threads(3):
            assert product(whole, x_TI[:count]).equal(found)
    for fewer in {1, columns // 2, columns - 1}:
        own = x_TI[:3, :fewer]
        assert product(whole[:, :fewer], own).equal(product(turned(by_rows[:, :fewer]), own))
    assert product(whole[: rows // 2], x_TI).equal(product(whole, x_TI)[:, : rows // 2])


def test_what_lies_in_no_order_is_refused() -> None:
    assert full(turned(torch.ones(5, 3))).stride == -20
    for wrong in (torch.ones(5, 3, 2)[..., 0], turned(torch.ones(8, 3))[::2]):
        with pytest.raises(ValueError, match="side by side"):
            full(wrong)


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose table is the head's too, and of one whose is not."""
    tied = {"tie_word_embeddings": True} if request.param == "llama" else {}
    return made(tmp_path_factory.mktemp(request.param), request.param, "asym", **tied)


def test_the_head_stays_a_parameter_and_computes_what_it_did(family: Path, tmp_path: Path) -> None:
    model: Any = rg.load(family)
    shutil.copytree(family, tmp_path / "plain", ignore=shutil.ignore_patterns(Path(FILE).name))
    plain: Any = rg.load(tmp_path / "plain")
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert isinstance(head, torch.nn.Parameter)
    assert head.stride() == (1, head.shape[0])
    assert plain.get_output_embeddings().weight.is_contiguous()
    assert table.equal(plain.get_input_embeddings().weight)
    assert (head is table) == model.config.tie_word_embeddings
    assert head.equal(plain.get_output_embeddings().weight)
    for one, other in zip(given(model), given(plain), strict=True):
        assert (one - other).abs().max() < 4e-6 * other.abs().max()
    assert model.regauge_step.steps == 2
    assert same(given(model), given(copy.deepcopy(model)))
    assert model.half().get_output_embeddings().weight.stride() == head.stride()


def test_a_member_reads_one_piece_and_is_its_extract_to_the_bit(family: Path, tmp_path: Path) -> None:
    model: Any = rg.load(family)
    head = model.get_output_embeddings().weight
    for number, text in enumerate(("width=48", "ffn=0.5", "depth=2,width=48")):
        extract(family, text, tmp_path / str(number))
        alone: Any = rg.load(tmp_path / str(number))
        member = model.regauge.member(text)
        own = member.get_output_embeddings().weight
        assert own.data_ptr() == head.data_ptr()
        assert own.stride() == head.stride()
        assert alone.get_output_embeddings().weight.stride() == own.stride()
        with rg.use(model, text):
            assert same(given(model), given(alone)), text
            assert same(given(model), given(rg.load(family, subnet=text))), text
        assert member.regauge_step.steps == 2 * alone.regauge_step.steps == 4


def test_a_state_goes_out_and_in_again(family: Path) -> None:
    model, again = rg.load(family), rg.load(family)
    head = again.get_output_embeddings().weight
    key = next(name for name, held in again.named_parameters(remove_duplicate=False) if held is head)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    head.zero_()
    assert state[key].is_contiguous()
    again.load_state_dict(state)
    assert again.get_output_embeddings().weight.stride() == (1, len(head))
    assert same(given(again), given(model))


def test_a_family_that_offers_no_width_is_as_it_was(tmp_path: Path) -> None:
    out = made(tmp_path, "llama", "asym")
    path = out / FILE
    told = json.loads(path.read_text())
    del told["family"]["width"]
    path.write_text(json.dumps(told))
    model: Any = rg.load(out)
    assert "width: [48]" in FAMILY
    assert model.get_output_embeddings().weight.is_contiguous()
    extract(out, "ffn=0.5", tmp_path / "half")
    assert json.loads((tmp_path / "half" / CUT).read_text()).keys() == {"version", "subnet", "columns"}
    extract(out, "ffn=0.5", tmp_path / "half", force=True)
    (tmp_path / "half" / CUT).write_text(
        json.dumps({"version": 1, "subnet": "ffn=0.5", "columns": {}, "by_columns": 0})
    )
    with pytest.raises(ArtifactError, match="none of ours"):
        rg.load(tmp_path / "half")
