"""What other runtimes make of an artifact: matrices that they fuse, and encoders through sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regauge as rg
from regauge.anatomy.fusing import fused
from regauge.formats.base import Format
from regauge.formats.grains import Group
from regauge.formats.grids import E2M1
from regauge.formats.rangers import AbsMax
from regauge.formats.scales import BFloat16, TwoLevel
from regauge.hosts.transformers.source import Source
from tests import tiny
from tests.pico import FAMILIES, pico, save

SIZES = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtimes") / "llama"
    tiny.tokenizer().save_pretrained(folder)
    return save(pico("llama", vocab_size=tiny.VOCABULARY, **SIZES, **BF16), folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("rounder", ["nearest", "gptq"])
def test_what_runtimes_fuse_has_one_global_scale(rounder: str, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nweights: {'blocks.*': {grid: fp4, grain: 'group:16', ranger: absmax, scale: nv, "
        f"rounder: {rounder}}}}}\n"
    )
    text = {"calibration": [tiny.TEXT * 9], "tokens": 256, "length": 32} if rounder == "gptq" else {}
    rg.apply(recipe, llama, tmp_path / "out", wire="compressed-tensors", **text)
    tensors, source = stored(tmp_path / "out"), Source.open(llama)
    stacks = fused(source.anatomy.sites)
    assert len(stacks) == 4
    for sites in stacks.values():
        scales = {float(tensors[f"{site.module}.weight_global_scale"]) for site in sites}
        peak = max(float(source.read([f"{site.name}.weight"])[f"{site.name}.weight"].abs().max()) for site in sites)
        assert list(scales) == [pytest.approx(448 * 6 / peak, rel=1e-6)]
    alone = {float(tensors[f"model.layers.{i}.{name}.weight_global_scale"]) for i in (0, 1)
             for name in ("self_attn.o_proj", "mlp.down_proj")}  # fmt: skip
    assert len(alone) == 4, "what stands alone keeps its own"


def test_one_level_for_several_matrices_by_hand() -> None:
    fmt = Format(E2M1(), Group(16), AbsMax(), TwoLevel())
    small, large = torch.full((2, 16), 0.5), torch.full((2, 16), 8.0)
    together = fmt.together([small, large])
    assert together.fit(small).fields["global_scale"].tolist() == [448 * 6 / 8.0]
    assert fmt.fit(small).fields["global_scale"].tolist() == [448 * 6 / 0.5]
    assert fmt.together([small]) is fmt
    plain = Format(E2M1(), Group(16), AbsMax(), BFloat16())
    assert plain.together([small, large]) is plain


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_read_one_tap(family: str, tmp_path: Path) -> None:
    """What is said to be fused is read from the same activation, in every family."""
    anatomy = Source.open(save(pico(family), tmp_path / "model")).anatomy
    stacks = fused(anatomy.sites)
    assert any(stack == "q, k, v" for _, _, stack in stacks)
    for sites in stacks.values():
        assert len({(site.tap, site.block, site.expert) for site in sites}) == 1


SAID = "runtimes that fuse those matrices"
REST = "grain: channel, ranger: absmax, scale: bf16, rounder: nearest"
FOUR, EIGHT = f"{{grid: int4, {REST}}}", f"{{grid: int8, {REST}}}"
PLANS = {
    "q is wider": (f"'blocks.*': {FOUR}, 'blocks.*.attn.q': {EIGHT}", ["q, k, v of 2 blocks"]),
    "v is full": (f"'blocks.*': {FOUR}, 'blocks.1.attn.v': full", ["q, k, v of 1 block (first 1)"]),
    "gate too": (f"'blocks.*.attn.*': {FOUR}, '*.gate': {FOUR}", ["gate, up of 2 blocks"]),
    "alike": (f"'blocks.*': {FOUR}", []),
    "o apart": (f"'blocks.*': {FOUR}, '*.o': {EIGHT}, '*.down': full", []),
    "blocks apart": (f"'blocks.0.*': {FOUR}, 'blocks.1.*': {EIGHT}", []),
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_plans_that_other_runtimes_do_not_read_are_said(plan: str, llama: Path, tmp_path: Path) -> None:
    rules, stacks = PLANS[plan]
    (tmp_path / "mine.yaml").write_text(f"name: mine\nweights: {{{rules}}}\n")
    dry = rg.dry_run(tmp_path / "mine.yaml", llama, wire="compressed-tensors")
    assert dry.refusals == ()
    told = [note for note in dry.notes if SAID in note]
    assert len(told) == len(stacks)
    assert all(stack in note for stack, note in zip(stacks, told, strict=True))
    if plan == "q is wider":
        receipt = rg.apply(tmp_path / "mine.yaml", llama, tmp_path / "out", wire="compressed-tensors")
        assert told[0] in receipt.notes
        ours = rg.dry_run(tmp_path / "mine.yaml", llama, wire="regauge")
        assert not any(SAID in note for note in ours.notes)


@pytest.mark.parametrize("how", ["rtn-w8", "rtn-w8a8", "rtn-w4g32"])
def test_an_encoder_is_expanded_by_stock_code_and_says_so(how: str, llama: Path, tmp_path: Path) -> None:
    source = save(pico("bert", **{**SIZES, "head_dim": 32}), tmp_path / "bert")
    receipt = rg.apply(how, source, tmp_path / "out")
    assert quantisation(tmp_path / "out")["dequantize"] is True
    told = " ".join(receipt.notes)
    assert "SentenceTransformer expand the matrices to float32" in told
    assert ("do not round activations" in told) == (how == "rtn-w8a8")
    if how == "rtn-w8":
        rg.apply(how, llama, tmp_path / "language")
        assert "dequantize" not in quantisation(tmp_path / "language")


def quantisation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found


@pytest.mark.slow  # it imports sentence-transformers
@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_sentence_transformers_opens_every_scheme(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    plain = tiny.folder(tmp_path / "plain", "bert", hidden_size=96, intermediate_size=64)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(plain)
    source = str(tmp_path / "source")
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(96), Dense(96, 24)]).save(source)
    found = {"source": SentenceTransformer(source).encode([tiny.TEXT[:30]], normalize_embeddings=True)[0]}
    for how in ("rtn-w8", "rtn-w8a8", "rtn-w4g32"):
        rg.apply(how, source, tmp_path / how)
        found[how] = SentenceTransformer(str(tmp_path / how)).encode([tiny.TEXT[:30]], normalize_embeddings=True)[0]
    assert all(float(first @ other) > 0.9 for first, other in combinations(found.values(), 2))
