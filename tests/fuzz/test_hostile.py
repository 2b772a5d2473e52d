"""A hostile folder cannot run code, hang, take memory, or look outside of itself, by any field of any file of it.

Every field of every file is walked (`hostile.py`), one change at a time; then a user does with the folder what users do
(`desk.py`), watched by the interpreter's own audit hooks (`watched.py`). What is wrong with a folder is one sentence.
The default suite draws a few of the attacks, another few each day; `make slow` draws many; all of them with ATTACKS=0.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regauge.errors import ArtifactError
from tests.fuzz import desk as desks
from tests.fuzz.hostile import Attack, attacks
from tests.fuzz.watched import TRAP, fault, watched

Attacks = list[tuple[str, Attack]]
FOUND = (
    # once wrong, each the first of its kind
    ("packed", "config.json: hidden_act is a half"),
    ("packed", "config.json: rope_parameters.rope_type is a null byte"),
    ("packed", "config.json: num_hidden_layers is a huge number"),
    ("packed", "config.json: quantization_config.inputs.0.at.0 is long text"),
    ("packed", "config.json: quantization_config.terms.low-rank.0 is many"),
    ("packed", "regauge/anatomy.json: sites.1.heads is beyond 64 bits"),
    ("packed", "regauge/recipe.yaml: 'f32' at 277 is a sexagesimal"),
    ("packed", "regauge/manifest.json nests without end"),
    ("packed", "regauge-00001-of-00004.safetensors is a link to a device"),
    ("packed", "generation_config.json is a link out"),
    ("packed", "config.json is a pipe"),
    ("compressed", "config.json: quantization_config.ignore.0 is a half"),
    ("compressed", "config.json: quantization_config.config_groups.group_0.targets.0 is beyond 64 bits"),
    ("compressed", "model.safetensors.index.json: weight_map is zero"),
    ("source", "config.json: bos_token_id is many"),
    ("source", "tokenizer.json: post_processor.single.0.SpecialToken.id is a path out"),
    ("source", "model.safetensors.index.json: metadata is an empty list"),
    ("source", "the header of b.safetensors: __metadata__ is minus one"),
    ("run", "regauge/run.json: calibration.sizes.search is a path out"),
    ("run", "regauge/receipt.json: notes.0 is minus one"),
    ("run", "regauge/run.json is a link out"),
)
"""Faults that the walk found: seeds that are always tried."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[desks.Desk]:
    root = tmp_path_factory.mktemp("hostile")
    made = desks.make(root)
    sys.path.insert(0, str(desks.set_trap(root / "trap")))
    yield made
    sys.path.remove(str(root / "trap"))


@pytest.fixture(scope="module")
def every(desk: desks.Desk) -> list[tuple[str, Attack]]:
    """All attacks, with the kind of folder that each is made on."""
    return [
        (kind, attack)
        for kind, actions in desks.ACTIONS.items()
        for attack in attacks(desk.root / "pristine" / kind)
        if any(desks.touches(name, attack.file) for name in actions)
    ]


def tried(desk: desks.Desk, some: list[tuple[str, Attack]]) -> list[str]:
    return [told for kind, attack in some if (told := desk.fault(kind, attack))]


def test_faults_that_were_found_stay_away(desk: desks.Desk, every: Attacks) -> None:
    known = {(kind, attack.name): (kind, attack) for kind, attack in every}
    gone = [name for name in FOUND if name not in known]
    assert not gone, "an attack has another name now"
    assert tried(desk, [known[name] for name in FOUND]) == []


def test_a_few_of_all_attacks(desk: desks.Desk, every: Attacks) -> None:
    """Another few each day, so that the suite walks on; the day is told where one fails."""
    day = os.environ.get("ATTACKS_SEED", time.strftime("%Y-%m-%d"))
    some = random.Random(day).sample(every, 24)
    assert tried(desk, some) == [], f"ATTACKS_SEED={day}"


@pytest.mark.slow
def test_many_attacks(desk: desks.Desk, every: Attacks) -> None:
    """`ATTACKS=0` tries all of them, `ATTACKS=1/8` every eighth (which: `ATTACKS_SEED`)."""
    everything = list(every)
    random.Random(os.environ.get("ATTACKS_SEED", "0")).shuffle(everything)
    count = int(os.environ.get("ATTACKS", "600")) or len(everything)
    wrong = tried(desk, everything[:count])
    assert wrong == [], "\n".join([f"{len(wrong)} of {count}", *wrong])


def test_every_file_of_ours_is_walked(every: Attacks) -> None:
    """What the folders of the test hold, and that fields of each are changed: no file is passed over."""
    walked = {(kind, attack.file) for kind, attack in every}
    fields = {(kind, attack.file) for kind, attack in every if "is half a character" in attack.name}
    for kind, files in {
        "source": ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
        "packed": ("config.json", "regauge/anatomy.json", "regauge/receipt.json", "regauge/manifest.json"),
        "compressed": ("config.json", "model.safetensors.index.json", "generation_config.json"),
        "run": ("regauge/run.json", "regauge/receipt.json"),
    }.items():
        for file in files:
            assert (kind, file) in fields, f"no field of {file} of the {kind} is attacked"
    assert ("packed", "regauge/recipe.yaml") in walked
    places = {attack.name.split(" is ")[0] for kind, attack in every if kind == "packed"}
    for field in (
        "weights.0.grid.part",
        "weights.0.compensator.rank",
        "inputs.0.grid",
        "inputs.0.at.0",
        "anatomy.tied",
    ):
        assert f"config.json: quantization_config.{field}" in places, field


def test_the_watch_sees_what_it_should(tmp_path: Path, desk: desks.Desk) -> None:
    """Each thing that no file may bring about is told, where a call does it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "x").write_text("x")

    def hang() -> None:
        while True:
            pass

    def foreign() -> None:
        raise KeyError("x")

    def refused() -> None:
        raise ArtifactError("a sentence of ours")

    calls = {
        "open of": lambda: (outside / "x").read_text(),
        "os.listdir of": lambda: os.listdir(outside),
        "os.remove of": lambda: (outside / "x").unlink(),
        "os.mkdir of": lambda: (outside / "y").mkdir(),
        "os.system": lambda: os.system("true"),
        "subprocess.Popen": lambda: subprocess.run(["true"], check=True),
        f"imports {TRAP}": lambda: __import__(TRAP),
        "MemoryError": lambda: bytearray(1 << 32),
        "KeyError": foreign,
    }
    for told, call in calls.items():
        try:
            found = fault(call, inside)
        except SystemExit:  # the trap's own
            with pytest.raises(SystemExit), watched(inside) as seen:
                call()
            found = seen[0]
        assert found is not None, told
        assert told in found
    assert fault(refused, inside) is None
    assert fault(lambda: (inside / "x").write_text("x"), inside) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.watched.SECONDS", 0.05)
        assert "Hang" in str(fault(hang, inside))
