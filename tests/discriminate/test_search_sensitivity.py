"""Predicted KL ranks options as true KL does, on models where the answer can be had; true KL is transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from regauge.hosts.transformers.source import Source
from regauge.measure.quality import compare
from regauge.search.losses.borders import Borders
from regauge.search.losses.fisher import fisher
from regauge.search.losses.shelf import Shelf
from regauge.search.losses.stock import Stock
from regauge.search.losses.trials import true_kl
from regauge.search.options import Option, site_groups
from regauge.search.subject import Subject
from regauge.text.windows import Windows
from tests.pico import pico, save

WIDE = {"hidden_size": 96, "intermediate_size": 70, "vocab_size": 61}


def subject(folder: Path, name: str, **changes: object) -> Subject:
    model = pico(name, 0, **{**WIDE, **changes})
    with torch.no_grad():  # confident predictions, as trained models have
        for key, tensor in model.named_parameters():
            if key.endswith(("lm_head.weight", "embed_out.weight")):
                tensor.mul_(4)
    return Subject.of(Source.open(save(model, folder)))


def ids(rows: int, length: int = 32, vocabulary: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def windows(ids_BT: torch.Tensor) -> Windows:
    return Windows(tuple(ids_BT), tuple(range(len(ids_BT))), (1,) * len(ids_BT))


def shelf_of(found: Subject, folder: Path) -> Shelf:
    (folder / "shelf").mkdir()
    return Shelf(folder / "shelf", site_groups(found.anatomy, bits=(2, 4)))


def every(shelf: Shelf) -> set[tuple[str, str]]:
    return {(group.name, option.name) for group in shelf.groups for option in group.options if option.choice}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_predictions_rank_as_true_kl_does(name: str, tmp_path: Path) -> None:
    more = {"intermediate_size": 110} if name == "gpt_neox" else {}
    found = subject(tmp_path / "model", name, **more)
    shelf = shelf_of(found, tmp_path)
    borders = Borders(found, [ids(12), ids(12, seed=1), ids(12, seed=4)], tmp_path)
    predicted = fisher(borders, shelf.groups, 2)
    assert set(predicted) == {group.name for group in shelf.groups}
    Stock(shelf, borders)(every(shelf))
    variants = [(g, o) for g in shelf.groups if g.block is not None for o in g.options if o.bits <= 4]
    true = true_kl(found, shelf, windows(ids(12, seed=2)), [{g.name: o} for g, o in variants])
    guess = [predicted[g.name][o.name] for g, o in variants]
    assert spearmanr(guess, true).statistic > 0.9
    ratios = sorted(a / b for a, b in zip(guess, true, strict=True))
    assert 0.6 < ratios[len(ratios) // 2] < 1.7
    assert all(predicted[g.name]["full"] == 0.0 for g in shelf.groups if g.block is not None)


def test_trials_are_what_transformers_computes(tmp_path: Path) -> None:
    """Two single-site variants, one of both and none, against the module with its weights overwritten."""
    from transformers import AutoModelForCausalLM

    found = subject(tmp_path / "model", "llama-tied")
    shelf = shelf_of(found, tmp_path)
    Stock(shelf, Borders(found, [ids(8)], tmp_path))(every(shelf))
    text = windows(ids(6, seed=3))
    embed, other = shelf.groups[0], shelf.groups[-1]
    assert (embed.name, other.block) == ("embed", 1)
    few, low = embed.option("int2-g32"), other.options[0]
    variants: list[dict[str, Option]] = [{}, {embed.name: few}, {other.name: low}, {embed.name: few, other.name: low}]
    measured = true_kl(found, shelf, text, variants)
    inputs = [batch.ids_BT for batch in text.batches(2048)]

    def logits(picks: dict[str, Option]) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(found.source.path, dtype=torch.float32).eval()
        with torch.no_grad():
            for group in shelf.groups:
                if group.name in picks:
                    site = group.sites[0]
                    key = found.anatomy.site(site.name).weight.key
                    model.get_parameter(key).copy_(shelf.weight(site.name, picks[group.name], group.block))
            return [model(batch).logits for batch in inputs]

    base = logits({})
    expected = [float(compare(text, base, logits(picks), 2048).kl_N.mean()) for picks in variants]
    assert measured[0] == pytest.approx(0.0, abs=1e-7)
    assert measured[1:] == pytest.approx(expected[1:], rel=1e-3)
    assert min(expected[1:]) > 1e-6


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_options_outside_the_blocks_rank_as_true_kl_does(name: str, tmp_path: Path) -> None:
    """Embedding and head: each group's options in order, and within an order of magnitude of what they really cost; of
    trellises within 30 times."""
    found = subject(tmp_path / "model", name)
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(tmp_path / "shelf", tuple(g for g in site_groups(found.anatomy) if g.block is None))
    borders = Borders(found, [ids(12), ids(12, seed=1)], tmp_path)
    predicted = fisher(borders, shelf.groups, 2)
    Stock(shelf, borders)(every(shelf))
    for group in shelf.groups:
        options = [option for option in group.options if option.choice is not None]
        true = true_kl(found, shelf, windows(ids(12, seed=2)), [{group.name: option} for option in options])
        guess = [predicted[group.name][option.name] for option in options]
        assert spearmanr(guess, true).statistic > 0.9
        for option, a, b in zip(options, guess, true, strict=True):
            near = 30 if option.name.startswith("trellis") else 10
            assert b <= 1e-5 or 1 / near < a / b < near, option.name


def test_what_is_on_the_shelf_is_rounded_once_and_alike_whatever_is_asked_with_it(tmp_path: Path) -> None:
    found = subject(tmp_path / "model", "llama")
    shelf = shelf_of(found, tmp_path)
    borders = Borders(found, [ids(8), ids(8, seed=1)], tmp_path)
    Stock(shelf, borders)(every(shelf))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shelf.folder.iterdir()}
    Stock(Shelf(shelf.folder, shelf.groups), borders)(every(shelf))
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shelf.folder.iterdir()} == before
    (tmp_path / "other").mkdir()
    other = Shelf(tmp_path / "other", shelf.groups)
    for pair in sorted(every(shelf)):  # one at a time, from states that were made again
        borders.drop()
        Stock(other, borders)({pair})
    again = Shelf(other.folder, shelf.groups)
    for group in shelf.groups:
        for option in group.options:
            for site in group.sites if option.choice is not None else ():
                args = site.name, option, group.block
                assert torch.equal(again.weight(*args), shelf.weight(*args))
    spoilt = shelf.folder / "options-1.safetensors"
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:-1])
    left = Shelf(shelf.folder, shelf.groups)
    assert set(left.missing(every(left))) == {1}
    Stock(left, borders)(every(left))
    assert spoilt.read_bytes() == whole
