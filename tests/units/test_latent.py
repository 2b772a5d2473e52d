"""Grouped queries written anew as latent attention: exact at full latent, smaller below, cached as what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.anatomy.factoring import Grouped, Latent, Mixed, kept, latent, loss, mixed
from regauge.engine import apply, dry_run
from regauge.errors import RecipeError
from regauge.hosts.precise import precise
from regauge.hosts.transformers.latent import numbers, why_not, write
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from regauge.plan import parse
from regauge.rewrites.latent import LatentAttention
from tests import tiny
from tests.pico import pico, save

READ = {"tokens": 256, "length": 32}
HEADS, GROUPS, DIM, HIDDEN = 6, 3, 10, 23


def block(seed: int = 0) -> tuple[Grouped, Tensor, Tensor]:
    """Attention with biases, inputs (T, D + 1), and their moment."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    x_TD = some(40, HIDDEN + 1)
    x_TD[:, -1] = 1
    pairs, rates = torch.arange(5), 100.0 ** -(torch.arange(5, dtype=torch.float64) / 5)
    maps = [some(rows * DIM, HIDDEN + 1) / 5 for rows in (HEADS, GROUPS, GROUPS)]
    return Grouped(*maps, HEADS, GROUPS, pairs, pairs + 5, rates), x_TD, x_TD.T @ x_TD / len(x_TD)


def turned(x_NTC: Tensor, rates_F: Tensor) -> Tensor:
    """Pairs (i, i + half) turned by position times rate."""
    angle_TF = torch.arange(x_NTC.shape[1], dtype=torch.float64)[:, None] * rates_F
    a, b = x_NTC.chunk(2, -1)
    return torch.cat([a * angle_TF.cos() - b * angle_TF.sin(), b * angle_TF.cos() + a * angle_TF.sin()], -1)


def grouped_output(one: Grouped, x_TD: Tensor) -> Tensor:
    """(H, T, e) as grouped queries compute it."""
    q, k, v = (
        (x_TD @ w.T).view(len(x_TD), -1, DIM).transpose(0, 1).repeat_interleave(HEADS * DIM // len(w), 0)
        for w in (one.q, one.k, one.v)
    )
    return weighted(turned(q, one.rates) @ turned(k, one.rates).transpose(1, 2)) @ v


def latent_output(one: Latent, x_TD: Tensor) -> Tensor:
    """(H, T, e) from turned(rotary x) and down x alone."""
    key_TR, latent_Tr = turned((x_TD @ one.rotary.T)[None], one.rates)[0], x_TD @ one.down.T
    q_HTR = turned(torch.einsum("hrd,td->htr", one.q_rotary, x_TD), one.rates)
    free_HTN = torch.einsum("hnd,td->htn", one.q_free, x_TD)
    score_HTT = q_HTR @ key_TR.T + free_HTN @ torch.einsum("hnr,tr->hnt", one.up_keys, latent_Tr)
    values_GTe = torch.einsum("ger,tr->gte", one.up_values, latent_Tr)
    return weighted(score_HTT) @ values_GTe.repeat_interleave(HEADS // GROUPS, 0)


def weighted(score_HTT: Tensor) -> Tensor:
    later = torch.ones_like(score_HTT[0]).triu(1).bool()
    return score_HTT.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_with_every_slot_turned_it_is_grouped_attention(orthogonal: bool) -> None:
    one, x_TD, moment = block()
    made = latent(one, mixed(one, moment, orthogonal), moment, torch.full((5,), GROUPS), GROUPS * DIM, 64)
    torch.testing.assert_close(latent_output(made, x_TD), grouped_output(one, x_TD), rtol=1e-11, atol=1e-12)


def test_a_mix_of_heads_alike_for_both_halves_of_a_frequency_commutes_with_the_turn_and_another_does_not() -> None:
    one, x_TD, moment = block()
    mix_FGG = torch.linalg.qr(torch.randn(5, GROUPS, GROUPS, dtype=torch.float64)).Q
    keys = torch.einsum("fsg,gfcd->sfcd", mix_FGG, one.halves(one.k))
    mix = Mixed(keys, mix_FGG.transpose(1, 2), torch.ones(5, GROUPS, dtype=torch.float64))
    every = torch.full((5,), GROUPS)
    made = latent(one, mix, moment, every, GROUPS * DIM, 64)
    torch.testing.assert_close(latent_output(made, x_TD), grouped_output(one, x_TD), rtol=1e-11, atol=1e-12)
    apart = keys.clone()
    apart[:, :, 1] = torch.einsum("fsg,gfd->sfd", mix_FGG.flip(1), one.halves(one.k)[:, :, 1])
    made = latent(one, replace(mix, keys=apart), moment, every, GROUPS * DIM, 64)
    assert float((latent_output(made, x_TD) - grouped_output(one, x_TD)).abs().max()) > 0.05


def test_dropping_the_turn_is_approximate_at_any_rank_and_least_so_at_low_frequencies() -> None:
    one, x_TD, moment = block()
    mix = mixed(one, moment)
    want = grouped_output(one, x_TD)

    def error(counts: list[int]) -> float:
        made = latent(one, mix, moment, torch.tensor(counts), 36, 40)
        return float((latent_output(made, x_TD) - want).norm() / want.norm())

    low, high = error([3, 3, 3, 3, 0]), error([0, 3, 3, 3, 3])
    assert 1e-6 < low < 0.5 * high


def test_what_stays_turned_is_what_the_scores_would_lose() -> None:
    one, _, moment = block()
    losses = loss(mixed(one, moment, False), one.rates, 64)
    assert bool((losses[:, :-1] >= losses[:, 1:]).all())
    counts = kept([losses], 6)
    assert int(counts.sum()) == 6
    cut = [losses[f, n] for f, n in enumerate(counts.tolist()) if n < GROUPS]
    stay = [losses[f, n - 1] for f, n in enumerate(counts.tolist()) if n]
    assert max(cut) <= min(stay)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases everywhere": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
    "one key head": ("llama-tied", {"num_key_value_heads": 1}),
}


def written(where: Path, name: str, keep: float, **changes: Any) -> tuple[Source, Source]:
    """A pico model in float64, and what is made of it."""
    source = Source.open(save(pico(name, **changes).double(), where / "source"))
    x_TD = torch.randn(200, source.anatomy.hidden + 1, dtype=torch.float64)
    x_TD[:, -1] = 1
    (where / "latent").mkdir()
    write(source, where / "latent", [x_TD.T @ x_TD / 200] * source.anatomy.blocks, LatentAttention(keep))
    return source, Source.open(where / "latent")


@pytest.mark.parametrize("name", MODELS)
def test_at_full_latent_the_logits_of_a_family_are_the_same_in_float64(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    source, made = written(tmp_path, family, 1.0, **changes)
    ids_BT = torch.arange(24).view(2, 12) % 53
    with precise(), torch.no_grad():
        want, found = (next(Runner(one, dtype=torch.float64).logits([ids_BT])) for one in (source, made))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    assert made.anatomy.cached == source.anatomy.cached + source.anatomy.blocks  # the constant of its norm


def test_half_a_latent_is_half_a_cache_and_another_function(tmp_path: Path) -> None:
    source, made = written(tmp_path, "llama", 0.5)
    assert made.anatomy.cached == source.anatomy.cached // 2
    assert numbers(source, LatentAttention(0.5)) == (16, 13)
    assert numbers(source, LatentAttention(0.5, published=True)) == (10, 19)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("qwen3", {}, "a qwen3 is not of the families"),
        ("mistral", {}, "look back a bounded window"),
        ("llama-bias", {}, "feed-forward layers have biases"),
    ],
)
def test_what_cannot_be_written_so_is_refused_in_a_sentence(
    name: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = tiny.folder(tmp_path / "model", name, **changes)
    assert why in why_not(Source.open(model))
    with pytest.raises(RecipeError, match=why):
        apply("transmla-r50", model, tmp_path / "out", calibration=tiny.text(tmp_path), **READ)
    with pytest.raises(RecipeError, match=why):
        dry_run("transmla-r50", model)
    assert not list(tmp_path.glob("*out*"))


def test_it_comes_first_and_once_and_keeps_a_share_that_there_is(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path)
    for rewrites in ("[fold-norm, latent]", "[latent, 'latent:0.25']"):
        with pytest.raises(RecipeError, match="put it first"):
            dry_run(parse(f"rewrites: {rewrites}"), model)
    with pytest.raises(RecipeError, match="leaves none beside 10 turned channels; keep more"):
        dry_run(parse("rewrites: [{part: latent, keep: 0.15, published: true}]"), model)
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"rotary": 1.0}, {"reach": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            LatentAttention(**wrong)  # type: ignore[arg-type]  # what a recipe may hold


def test_an_artifact_of_half_a_latent_decodes_from_half_the_bytes(tmp_path: Path) -> None:
    """Quantised too; prefill is decode token by token; the cache is what the formula says."""
    model, text, out = tiny.folder(tmp_path / "model"), tiny.text(tmp_path), tmp_path / "out"
    plan = parse(
        "rewrites: ['latent:0.5']\nweights: {blocks.*: {grid: int8, grain: channel, ranger: absmax, scale: f32, "
        "rounder: nearest}}"
    )
    seen = dry_run(plan, model)
    receipt = apply(plan, model, out, calibration=text, **READ)
    assert (receipt.family, seen.family) == ("llama", "deepseek_v3")
    assert any("leaves 30 numbers a block in the cache where it left 60" in note for note in receipt.notes)
    assert not any("was not used" in note for note in receipt.notes)
    assert receipt.calibration["kind"] == "text"
    assert not list(tmp_path.glob(".out*"))
    loaded = rg.load(out, dtype="float32", activations="float32")
    ids_BT = torch.arange(22).view(2, 11)
    with torch.no_grad():
        whole = loaded(input_ids=ids_BT, use_cache=True)
        past, steps = None, []
        for at in range(11):
            step = loaded(input_ids=ids_BT[:, at : at + 1], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert past is not None
    held = sum(t.numel() for layer in past.layers for t in (layer.keys, layer.values))
    assert held == 2 * 11 * 2 * 30  # sequences, tokens, blocks, numbers
    said = loaded.generate(input_ids=ids_BT, max_new_tokens=4, do_sample=False, num_beams=2)
    assert said.shape == (2, 15)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_families_that_are_latent_keep_their_latent_in_the_cache(family: str, tmp_path: Path) -> None:
    """Compressed keys and values and the turned key, not expanded heads."""
    from tests.architectures import build

    model = save(build(family), tmp_path / "model")
    loaded = rg.load(model, dtype="float32")
    ids_BT = torch.arange(14).view(2, 7)
    with torch.no_grad():
        past = loaded(input_ids=ids_BT, use_cache=True).past_key_values
    numbers_of = loaded.config.kv_lora_rank + loaded.config.qk_rope_head_dim
    held = sum(t.numel() for layer in past.layers for t in (layer.keys, layer.values))
    assert held == 2 * 7 * loaded.config.num_hidden_layers * numbers_of
    assert Source.open(model).anatomy.cached == loaded.config.num_hidden_layers * numbers_of


@pytest.mark.slow
def test_on_a_real_model_half_a_latent_is_better_than_half_of_the_heads(shared: Path, tmp_path: Path) -> None:
    """KL on held-out novels against the model with half of its key and value heads, the best, at the same bytes."""
    model, out = shared / "models" / "novel-llama-8m", tmp_path / "out"
    receipt = apply("transmla-r50", model, out, calibration=shared / "data" / "novels", tokens=8192, length=512)
    assert any("leaves 128 numbers a block in the cache where it left 256" in note for note in receipt.notes)
    original, made = rg.load(model, dtype="float32"), rg.load(out, dtype="float32")
    text = next(iter(sorted((shared / "data" / "novels-heldout").glob("*.txt")))).read_text(encoding="utf-8")
    ids_BT = torch.tensor(Source.open(model).tokenizer()(text[20000:40000])["input_ids"][:2048]).view(4, 512)
    with torch.no_grad():
        want = original(input_ids=ids_BT).logits.log_softmax(-1)
        latent_kl = divergence(want, made(input_ids=ids_BT).logits)
        for layer in original.model.layers:
            _drop_half(layer.self_attn, original.config.num_key_value_heads)
        dropped_kl = divergence(want, original(input_ids=ids_BT).logits)
    assert latent_kl < 0.06
    assert latent_kl < 0.4 * dropped_kl


def divergence(want_BTV: Tensor, logits_BTV: Tensor) -> float:
    return float((want_BTV.exp() * (want_BTV - logits_BTV.log_softmax(-1))).sum(-1).mean())


def _drop_half(attention: Any, groups: int) -> None:
    """What the groups write that write least."""
    with torch.no_grad():
        parts = attention.o_proj.weight.chunk(groups, 1)
        values = attention.v_proj.weight.chunk(groups, 0)
        size = [float(o.norm() * v.norm()) for o, v in zip(parts, values, strict=True)]
        for group in sorted(range(groups), key=size.__getitem__)[: groups // 2]:
            parts[group].zero_()
