"""Taps that no matrix reads: queries, keys, values, probabilities and the residual may be rounded too.

The reference is the same forward written out by hand on a model whose weights stay in full precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.attention.reads import Ranges, attended
from regauge.engine import apply
from regauge.errors import ArtifactError, FallbackWarning, RecipeError, RefusedError, SettingError
from regauge.formats.base import Format
from regauge.formats.grains import Group, Token, Whole
from regauge.formats.grids import Int
from regauge.formats.logs import Log2, LogSqrt2, parity
from regauge.formats.rangers import Dynamic
from regauge.formats.readings import dynamic
from regauge.formats.scales import Float32
from regauge.kernels.cpu.library import available
from regauge.plan import parse
from tests import tiny
from tests.artifacts import outputs

READ = {"tokens": 256, "length": 32}
IDS = torch.arange(3, 40)[None]
HEADS = "blocks.*.attn."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"), 4000)


def recipe(inputs: str, weights: str = "{grid: int8, grain: channel}") -> Any:
    return parse(f"name: inner\nweights: {{blocks.*.mlp.down: {weights}}}\ninputs: {inputs}\n")


def made(inputs: str, model: Path, text: Path, out: Path) -> Path:
    apply(recipe(inputs), model, out, calibration=text, **READ)
    return out


def test_powers_by_hand() -> None:
    """-log2 of 0.3 is 1.74 and of 0.2 2.32; twice those are 3.47 and 4.64. Below half a place under the last: 0."""
    z = torch.tensor([1.0, 0.3, 0.2, 0.05, 0.0, 3.0])
    assert Log2(3).snap(z).tolist() == [1.0, 0.25, 0.25, 0.0625, 0.0, 1.0]
    assert Log2(3).encode(z).tolist() == [0, 2, 2, 4, 7, 0]
    assert LogSqrt2(3).encode(z).tolist() == [0, 3, 5, 7, 7, 0]
    assert LogSqrt2(3).decode(torch.tensor([0, 1, 2, 7])).tolist() == pytest.approx([1, 0.5**0.5, 0.5, 0])


def test_a_code_of_base_root_two_is_a_shift_and_a_parity() -> None:
    """Two sums of shifted integers, one of the even codes and one of the odd times √2 once, are the product."""
    grid, codes = LogSqrt2(4), torch.arange(15)
    shift, factor = parity(codes)
    assert shift.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert torch.allclose(2.0**-shift * factor, grid.decode(codes), rtol=1e-6, atol=0)
    values = torch.arange(15) * 1024 - 4000
    shifted = values >> shift if (values >= 0).all() else torch.div(values, 2**shift, rounding_mode="floor")
    odd = (codes & 1).bool()
    exact = values.double() / 2**shift
    assert (shifted - exact).abs().max() < 1
    found = exact[~odd].sum() + 2**0.5 * exact[odd].sum()
    assert float(found) == pytest.approx(float((values.double() * grid.decode(codes).double()).sum()), rel=1e-6)


def test_attention_on_codes_by_hand() -> None:
    """One head, two tokens, keys rounded to {−2 … 1} and probabilities to powers of two."""
    token = dynamic(Format(Log2(3), Token(), Dynamic(), Float32()))
    q, k = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0], [1.0986123, 0.0]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    whole = attended((q, k, v), None, 1.0, {})
    assert whole.flatten().tolist() == pytest.approx([4.0, 7.0])  # the second: a quarter and three quarters
    # 0.75 is a row's largest, so its step; 0.25 / 0.75 is a third: 2^-1.58, so 2^-2 of 0.75.
    found = attended((q, k, v), None, 1.0, {"probabilities": token})
    assert found.flatten().tolist() == pytest.approx([4.0, 0.75 * 8 + 0.75 / 4 * 4])


def test_what_is_not_seen_stays_nothing() -> None:
    """Also where a grid has no 0: what lies behind a mask adds nothing."""
    asymmetric = dynamic(Format(Int(2), Whole(), Dynamic(), Float32()))
    q = k = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    v = torch.zeros(1, 2, 5, 3)
    v[:, :, 4] = 1e6
    found = attended((q, k, v), None, 0.5, {"probabilities": asymmetric})
    assert not found[:, :4].any()


def test_ranges_are_of_all_calls() -> None:
    seen = Ranges()
    for rows in ([[1.0, -2.0]], [[3.0, 0.5], [-1.0, 0.0]]):
        seen.see("keys", torch.tensor(rows))
    assert [end.tolist() for end in seen.stats("keys").values()] == [[-1.0, -2.0], [3.0, 0.5]]


@pytest.mark.parametrize("word", ["queries", "keys", "values", "probabilities"])
@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_a_tap_is_read_by_the_loaded_model_as_in_calibration(
    word: str, how: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    """By hand: the loaded model with full attention in which that one tensor is replaced."""
    coarse = "{grid: log-sqrt2:3, grain: token}" if word == "probabilities" else "{grid: int3, grain: token}"
    if how == "static":
        coarse = "{grid: int3, grain: tensor, ranger: static}"
    out = made(f"{{{HEADS}{word}: {coarse}}}", llama, text, tmp_path / "out")
    model: Any = rg.load(out, activations="float32")
    found = outputs(model, IDS)
    readings = [getattr(layer, "regauge_reads").readings for layer in model.model.layers]  # noqa: B009  # its name
    assert [list(one) for one in readings] == [[word], [word]]
    plain: Any = rg.load(made("{}", llama, text, tmp_path / "plain"), activations="float32")
    assert float((outputs(plain, IDS) - found).norm() / found.norm()) > 1e-3
    assert torch.allclose(by_hand(plain, word, [one[word] for one in readings]), found, rtol=1e-4, atol=1e-5)


def by_hand(model: Any, word: str, readings: list[Any]) -> Tensor:
    """The model's output where one tensor of each attention is replaced by what its codes stand for."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        read = readings[module.layer_idx].simulate
        q, k, v = (read(x) if name == word else x for name, x in (("queries", q), ("keys", k), ("values", v)))
        groups = q.shape[1] // k.shape[1]
        p = q @ repeat_kv(k, groups).mT * scaling
        unseen = torch.ones(p.shape[-2:], dtype=torch.bool).triu(1)
        p = p.masked_fill(unseen, -torch.inf).softmax(-1)
        p = read(p).masked_fill(unseen, 0.0) if word == "probabilities" else p
        return (p @ repeat_kv(v, groups)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("regauge_by_hand", eager)
    model.config._attn_implementation = "regauge_by_hand"
    return outputs(model, IDS)


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
def test_the_step_says_why_it_does_not_serve(llama: Path, tmp_path: Path) -> None:
    apply(recipe(f"{{{HEADS}keys: {{grid: int8}}}}"), llama, tmp_path / "out")
    model: Any = rg.load(tmp_path / "out")
    with pytest.warns(FallbackWarning, match="what attention or the residual reads is rounded inside blocks"):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert model.regauge_step.steps == 0


def test_the_residual_is_what_the_next_block_reads(llama: Path, text: Path, tmp_path: Path) -> None:
    rule = "{blocks.0.residual: {grid: int4, grain: group:1, ranger: static}}"
    model: Any = rg.load(made(rule, llama, text, tmp_path / "out"), activations="float32")
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(model, IDS)
    values = [len(seen[0][0, :, channel].unique()) for channel in range(8)]
    assert max(values) <= 16
    assert min(values) > 2


def test_gradients_pass_through_what_is_read_inside_blocks(llama: Path, text: Path, tmp_path: Path) -> None:
    """The residual, keys and a turned input in 8 bits: gradients are near those of the model that rounds nothing."""
    rule = "{blocks.*.residual: {grid: int8}, blocks.*.attn.keys: {grid: int8}}"
    turned = "{blocks.*.mlp.hidden: {grid: int8, transform: hadamard}}"
    found = []
    for name, inputs in (("plain", "{}"), ("inside", rule), ("turned", turned)):
        model: Any = rg.load(made(inputs, llama, text, tmp_path / name), activations="float32", dtype="float32")
        table = model.get_input_embeddings()
        x = table(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits[0, -1].softmax(-1)[7].log().backward()
        assert x.grad is not None
        found.append(x.grad.flatten())
    for one in found[1:]:
        assert float(torch.cosine_similarity(one, found[0], 0)) > 0.98


def test_a_static_range_is_that_of_the_text(llama: Path, text: Path, tmp_path: Path) -> None:
    """Of its own tap: values are smaller than keys, and a step is the range over the grid's."""
    rule = f"{{{HEADS}keys: {{grid: int8, grain: group:1, ranger: static}}}}"
    model: Any = rg.load(made(rule, llama, text, tmp_path / "out"))
    reading = model.model.layers[0].regauge_reads.readings["keys"]
    assert reading.format.grain == Group(1)
    assert reading.step.scale_G1.shape == (model.config.head_dim, 1)
    assert len(reading.step.scale_G1.unique()) > 1


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ("{blocks.*.attn.probabilties: {grid: int8}}", "matches nothing .did you mean"),
        ("{blocks.*.attn.keys: {grid: int8, transform: hadamard}}", "'hadamard' is folded into the matrices that read"),
        (
            "{blocks.*.attn.probabilities: {grid: int8, grain: 'group:4'}}",
            "has as many channels as there are tokens, so a step is a token's or a tensor's",
        ),
        ("{blocks.*.attn.values: {grid: int8, grain: 'group:7'}}", "groups of 7 do not divide a width of"),
    ],
)
def test_what_such_a_tap_cannot_have_is_a_sentence(inputs: str, why: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=why):
        apply(recipe(inputs), llama, tmp_path / "out")


def test_a_tap_that_the_model_lacks_is_a_sentence(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'blocks\.9\.attn\.keys' matches nothing .did you mean"):
        apply(recipe("{blocks.9.attn.keys: {grid: int8}}"), llama, tmp_path / "out")


def test_other_formats_and_windows_of_memory_refuse_it(llama: Path, tmp_path: Path) -> None:
    plan = recipe(f"{{{HEADS}keys: {{grid: int8}}}}")
    with pytest.raises(RefusedError, match="none that attention or the residual does"):
        apply(plan, llama, tmp_path / "stock", wire="compressed-tensors")
    apply(plan, llama, tmp_path / "out")
    with pytest.raises(SettingError, match="leave memory= out"):
        rg.load(tmp_path / "out", memory="1GB")


def test_an_artifact_without_its_step_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = made(f"{{{HEADS}keys: {{grid: int8, grain: tensor, ranger: static}}}}", llama, text, tmp_path / "out")
    shard = next(path for path in out.glob("*.safetensors") if "blocks.1.attn.keys.scale" in load_file(path))
    save_file({k: v for k, v in load_file(shard).items() if "attn.keys" not in k}, shard)
    with pytest.raises(ArtifactError, match=r"lacks the static step of blocks\.1\.attn\.keys|differs from|hash"):
        rg.load(out)
