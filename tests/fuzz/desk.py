"""The folders that are attacked, and what a user does with them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from regauge.search import record
from regauge.search.options import site_groups
from tests import checkpoints, tiny
from tests.fuzz.hostile import SECRET, Attack
from tests.fuzz.watched import TRAP, fault
from tests.units.test_report_run import a_run

RECIPE = """name: walked
cite: [arXiv:2210.17323]
weights:
  blocks.*: {grid: int4-asym, grain: channel, ranger: minmax, scale: f32, rounder: nearest, compensator: lorc:2}
  '*.down': full
inputs:
  blocks.*.attn.in: {grid: int8, grain: token}
"""
IDS = torch.tensor([[1, 5, 7, 9]])
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]


@dataclass(frozen=True)
class Desk:
    """Pristine folders. Every attack is made on a copy in `root / "work"`."""

    root: Path
    text: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    def fault(self, kind: str, attack: Attack) -> str | None:
        """What is wrong with how the folders of a kind bear an attack, with the action that shows it."""
        for name, action in ACTIONS[kind].items():
            if not touches(name, attack.file):
                continue
            folder = self.fresh(kind)
            attack.change(folder / attack.file)
            before = self.kept()
            told = fault(lambda action=action, folder=folder: action(self, folder), *self.open(kind))  # type: ignore[misc]  # a lambda's default
            if told is None and self.kept() != before:
                told = "what lies outside of the folder has changed"
            if told:
                return f"{kind}, {name}: {attack.name}: {told}"
        return None

    def fresh(self, kind: str) -> Path:
        """A copy of a folder that shares its files."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.root / SECRET, self.work / SECRET)
        folder = self.work / kind
        shutil.copytree(self.root / "pristine" / kind, folder, copy_function=os.link)
        return folder

    def open(self, kind: str) -> tuple[Path, ...]:
        """What an action may look at: the copy, what it makes, and what the user names beside it."""
        made = [
            self.work / f"{name}{end}"
            for name in (kind, "out", "page.html", ".tmp-page.html")
            for end in ("", ".partial", ".replaced", ".search")
        ]
        return (*made, self.root / "pristine" / "source", self.root / "trap", self.text)

    def kept(self) -> dict[str, bytes]:
        """What is not to be touched."""
        return {str(path): path.read_bytes() for path in sorted((self.work / SECRET).rglob("*")) if path.is_file()}


def make(root: Path) -> Desk:
    """The folders: a source in shards, artifacts in both formats, the output of a search, a search cut off."""
    import regauge as rg

    pristine = root / "pristine"
    (root / SECRET).mkdir(parents=True)
    (root / SECRET / "kept.json").write_text('{"secret": "of the user"}\n')
    source = tiny.folder(pristine / "source", hidden_size=42, intermediate_size=37)
    shutil.copy(source / "model.safetensors", root / SECRET / "x.safetensors")
    checkpoints.shard(source)
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 1.0, "max_new_tokens": 3}')
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    (source / "modules.json").write_text(json.dumps(MODULES))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 42}')
    text = root / "text.txt"
    text.write_text("".join(f"{tiny.TEXT}{i}.\n\n" for i in range(40)))
    (root / "r.yaml").write_text(RECIPE)
    rg.apply(root / "r.yaml", source, pristine / "packed", wire="regauge")
    rg.apply("rtn-w8", source, pristine / "compressed", wire="compressed-tensors")
    shutil.copytree(pristine / "packed", pristine / "run")
    record.write(a_record(source, text), pristine / "run")
    return Desk(root, text)


def a_record(source: Path, text: Path) -> record.Run:
    """The record of a search that read this model and text."""
    from regauge.hosts import host_of
    from regauge.search.subject import reader
    from regauge.text.split import Sizes, prepare

    opened, sizes = host_of(source).open(source), Sizes(512, 128, 256)
    texts = prepare(reader(opened, 0), str(text), None, sizes, 0)
    picks = {group.name: group.options[0].name for group in site_groups(opened.anatomy)}
    run = a_run()
    return run.model_copy(
        update={
            "source": str(source),
            "source_hash": opened.digest(),
            "texts": texts.records,
            "points": tuple(point.model_copy(update={"picks": picks}) for point in run.points),
            "calibration": {
                "calibration": str(text), "eval": None, "revision": None, "sizes": dataclasses.asdict(sizes),
            },
        }
    )  # fmt: skip


def _load(desk: Desk, folder: Path) -> None:
    import regauge as rg

    model = rg.load(folder)
    with torch.inference_mode():
        model(input_ids=IDS)


def _generate(desk: Desk, folder: Path) -> None:
    import regauge as rg

    rg.load(folder).generate(IDS, max_new_tokens=2, pad_token_id=0)


def _data(desk: Desk, folder: Path) -> None:
    from regauge.artifact.reader import open_artifact

    made = open_artifact(folder)
    for block in made.blocks():
        for site in block.codes:
            made.dense(block, site)


def _inspect(desk: Desk, folder: Path) -> None:
    from regauge.report.inspection import inspect

    inspect(folder)


def _explain(desk: Desk, folder: Path) -> None:
    from regauge.report.explanation import explain

    explain(str(folder / "regauge" / "recipe.yaml"))


def _report(desk: Desk, folder: Path) -> None:
    from regauge.report.build import write

    write(folder, desk.work / "page.html")


def _measure(desk: Desk, folder: Path) -> None:
    """What `measure` reads before it measures."""
    from regauge.artifact.files import weight_bytes
    from regauge.artifact.folder import read_receipt
    from regauge.hosts import host_of

    weight_bytes(folder)
    read_receipt(folder)
    host_of(folder).tokenizer(folder)


def _tokenize(desk: Desk, folder: Path) -> None:
    from regauge.hosts import host_of
    from regauge.text.tokens import frame

    tokenizer = host_of(folder).tokenizer(folder)
    frame(tokenizer)
    tokenizer(tiny.TEXT)


def _recipe(desk: Desk, folder: Path) -> None:
    """An artifact as the recipe."""
    import regauge as rg
    from regauge.engine import dry_run

    dry_run(folder, desk.root / "pristine" / "source", desk.work / "out")
    rg.apply(folder, desk.root / "pristine" / "source", desk.work / "out")


def _apply(desk: Desk, folder: Path) -> None:
    """The folder as the model."""
    import regauge as rg

    rg.apply("rtn-w8", folder, desk.work / "out")


def _replace(desk: Desk, folder: Path) -> None:
    """The folder as an OUT that is replaced."""
    import regauge as rg

    rg.apply("rtn-w8", desk.root / "pristine" / "source", folder, force=True)


def _pick(desk: Desk, folder: Path) -> None:
    from regauge.search.fit import pick

    pick(folder, 0, desk.work / "out")


Action = Callable[[Desk, Path], None]
ARTIFACT: Mapping[str, Action] = {
    "load": _load, "generate": _generate, "read as data": _data, "inspect": _inspect, "explain": _explain,
    "apply its recipe": _recipe, "apply to it": _apply, "measure": _measure, "report": _report, "replace": _replace,
}  # fmt: skip
ACTIONS: Mapping[str, Mapping[str, Action]] = {
    "source": {"load": _load, "generate": _generate, "inspect": _inspect, "apply": _apply, "tokenize": _tokenize},
    "packed": ARTIFACT,
    "compressed": ARTIFACT,
    "run": {"pick": _pick, "report": _report},
}

READ: Mapping[str, tuple[str, ...]] = {
    "load": ("config.json", ".safetensors", "index.json", "generation_config.json"),
    "generate": ("generation_config.json",),
    "read as data": ("config.json", ".safetensors", "anatomy.json", "recipe.yaml"),
    "inspect": ("config.json", ".safetensors", "index.json", "anatomy.json"),
    "explain": ("recipe.yaml",),
    "apply its recipe": ("recipe.yaml",),
    "apply to it": ("config.json",),
    "apply": ("",),
    "measure": ("index.json", "receipt.json", "run-log.json"),
    "tokenize": ("token", "chat_template.jinja", "config.json"),
    "report": ("receipt.json", "run.json"),
    "replace": ("manifest.json", "receipt.json"),
    "pick": ("run.json",),
}


def touches(action: str, file: str) -> bool:
    return any(word in file for word in READ[action])


def set_trap(folder: Path) -> Path:
    """A module that leaves a mark when it is imported or called."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{TRAP}.py").write_text("raise SystemExit('a trap was imported')\n")
    return folder
