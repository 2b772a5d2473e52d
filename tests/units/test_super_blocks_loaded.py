"""A model of two-level steps, values of code 0 and code words, read back and run: its weights are its codes'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import regauge as rg
from regauge.artifact.codec.base import decoder
from regauge.artifact.reader import open_artifact
from regauge.formats.terms import summed
from tests.pico import pico, save
from tests.words import save_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
RECIPE = """
name: q4-k-and-the-embedding
weights:
  blocks.*: {grid: int4-asym, grain: group:32, ranger: least-squares, scale: {part: super-low, bits: 6, groups: 8}}
  embed: {grid: int6, grain: group:16, ranger: least-squares, scale: {part: super, bits: 8, groups: 16, signed: true}}
"""
SITES = {
    "attn.*": ("iq2-xxs", 32, 4),
    "attn.o": ("iq3-xxs", 32, 4),
    "mlp.*": ("iq3-s", 32, 4),
    "mlp.down": ("iq4", 32, 6),
}
CODE_WORDS = "name: words-of-lists\nweights:\n" + "".join(
    f"  blocks.*.{site}: {{grid: {grid}, grain: 'group:{size}', ranger: least-squares, "
    f"scale: {{part: super, bits: {bits}, groups: {256 // size}, {'signed' if grid == 'iq4' else 'odd'}: true}}}}\n"
    for site, (grid, size, bits) in SITES.items()
)


@pytest.mark.parametrize("text", [RECIPE, CODE_WORDS], ids=["integers", "words"])
def test_what_is_loaded_runs_as_its_decoded_weights_do(text: str, tmp_path: Path) -> None:
    source = save_tokenizer(save(pico("llama", **SIZES), tmp_path / "source"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    rg.apply(recipe, source, tmp_path / "out")
    model = rg.load(tmp_path / "out", dtype="float32")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights, artifact = dict(plain.named_parameters()), open_artifact(tmp_path / "out")
    sites = {site.name: site for site in artifact.layout.anatomy.sites}
    for block in artifact.blocks():
        for name, codes in block.codes.items():
            made = summed(codes, decoder(artifact.layout.quantised[name]))
            weights[sites[name].weight.key].data.copy_(made)
    ids = torch.tensor([[1, 5, 9, 3, 7, 2]])
    with torch.no_grad():
        wanted = plain(ids).logits
        assert (model(ids).logits - wanted).norm() < 3e-4 * wanted.norm()
        assert model.generate(ids, max_new_tokens=8).equal(plain.generate(ids, max_new_tokens=8))
