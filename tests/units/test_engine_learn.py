"""Learning inside `apply`: two streams, the objective, resuming in the middle of a block, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.anatomy.model import Anatomy
from regauge.artifact.receipt import Receipt
from regauge.engine import api, apply, dry_run
from regauge.engine import block as blocks
from regauge.engine.block import effective
from regauge.engine.job import Job, prepare
from regauge.engine.room import Room, room
from regauge.engine.taps import Looked
from regauge.engine.watchdog import Clock, Progress
from regauge.engine.work import Pass
from regauge.errors import BudgetError, RecipeError, TextError
from regauge.hosts.transformers.source import Source
from regauge.learn import loop
from regauge.plan import Plan, dump, parse
from regauge.rewrites.smoothing import GRID
from regauge.text.calibration import Calibration
from tests.pico import SMALL, pico, save
from tests.words import save_tokenizer, text

ROOT = Path(__file__).resolve().parents[2]
READ: dict[str, Any] = {"calibration": [text(2000)], "tokens": 256, "length": 32}
POINT = "grid: int2-asym, grain: group:16, ranger: {ranger}, scale: bf16, rounder: {rounder}"


def recipe(
    ranger: str = "learnt-clip:0.05",
    rounder: str = "nearest",
    steps: int = 24,
    more: str = "",
    select: str = "blocks.*",
) -> Plan:
    how = "optimiser: sign, schedule: linear, " if "offset" in rounder else ""
    learning = f"learning: {{{how}steps: {steps}, batch: 64, patience: 0}}\n" if "learnt" in ranger + rounder else ""
    point = POINT.format(ranger=f"'{ranger}'", rounder=rounder)
    return parse(f"name: taught\n{learning}{more}weights:\n  {select}: {{{point}}}\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SMALL), tmp_path_factory.mktemp("learn") / "model"))


def made(model: Path, out: Path, plan: Plan, **options: Any) -> Receipt:
    return apply(plan, model, out, **{**READ, **options})


def contents(out: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    files.pop("regauge/run-log.json")
    return files


def passing(model: Path, plan: Plan) -> tuple[Job, Pass]:
    """A pass at block 0, with both streams there."""
    job = prepare(plan, Source.open(model))
    assert job is not None
    ids_NT = torch.arange(8 * 32).reshape(8, 32) % 23
    work = Pass(job, Calibration(ids_NT, "counting"))
    outer = work.read(None)
    work.begin(outer.stored, outer.exact)
    return job, work


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Receipt, Path]:
    """What the recipe that says nothing more makes of it."""
    out = tmp_path_factory.mktemp("taught") / "out"
    return made(model, out, recipe()), out


def test_a_block_that_was_learnt_is_nearer_to_the_teacher(taught: tuple[Receipt, Path]) -> None:
    receipt, out = taught
    assert [entry["block"] for entry in receipt.learnt] == [0, 1]
    for entry in receipt.learnt:
        before, after = entry["before"], entry["after"]
        assert isinstance(before, float)
        assert isinstance(after, float)
        assert after < 0.95 * before
        assert entry["steps"] == 24
        assert entry["ended"] == "every step was taken"
    stored = json.loads((out / "regauge" / "receipt.json").read_text())
    assert len(stored["learnt"]) == 2


def test_nothing_learnt_leaves_no_word_in_the_receipt(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "out", recipe("minmax", "gptq"))
    assert "learnt" not in json.loads((tmp_path / "out" / "regauge" / "receipt.json").read_text())


def test_the_artifact_holds_what_was_learnt(model: Path, tmp_path: Path, taught: tuple[Receipt, Path]) -> None:
    """Its steps are others than those training began with, and the next block starts nearer to the teacher."""
    began = made(model, tmp_path / "a", recipe("learnt-clip:0.0"))
    ended, _ = taught
    assert float(str(ended.learnt[1]["before"])) < 0.98 * float(str(began.learnt[1]["before"]))
    pairs = zip(began.sites, ended.sites, strict=True)
    assert all(a.error != b.error for a, b in pairs if a.choice is not None)


@pytest.mark.parametrize("rounder", ["nearest", "gptq", "learnt-offset"])
def test_the_same_seed_gives_the_same_bytes(rounder: str, model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    made(model, tmp_path / "a", recipe(rounder=rounder, steps=12))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    made(model, tmp_path / "b", recipe(rounder=rounder, steps=12))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(("rounder", "least"), [("learnt-offset", 0.9), ("learnt-offset:gptq", 0.98)])
def test_rounding_is_learnt_too(rounder: str, least: float, model: Path, tmp_path: Path) -> None:
    receipt = made(model, tmp_path / "out", recipe("learnt-share", f"'{rounder}'", steps=40))
    for entry in receipt.learnt:
        assert float(str(entry["after"])) < least * float(str(entry["before"]))


def test_the_error_told_is_that_of_the_codes(model: Path) -> None:
    """The block with its codes, decoded, has the error that the last reading told, and other codes than nearest's."""
    job, work = passing(model, recipe("learnt-share", "learnt-offset", steps=20))
    moved, *_ = work.local(0, work.read(0))
    learnt = work.learn(0, Looked(moved, {}, {}, ()), moved, None, Clock())
    assert learnt is not None
    codes = work.round(job.sites(0), moved, {}, learnt.finished)
    built = effective(moved.stored, codes, job.choices)
    assert work.objective(0, moved).error(built) == pytest.approx(learnt.told["after"], rel=1e-5)
    assert learnt.finished.codes.keys() == learnt.finished.formats.keys() == job.learnt.keys() & codes.keys()
    plain = work.round(job.sites(0), moved, {})
    assert any(not torch.equal(codes[name].codes_OI, plain[name].codes_OI) for name in codes)


def test_learnt_codes_keep_their_compensator(model: Path, tmp_path: Path) -> None:
    point = "{grid: int2-asym, grain: channel, rounder: learnt-offset, compensator: 'lorc:2'}"
    plan = parse(f"name: taught\nlearning: {{steps: 4, batch: 64, optimiser: sign}}\nweights: {{blocks.*: {point}}}\n")
    receipt = made(model, tmp_path / "out", plan)
    plain = made(model, tmp_path / "plain", replace(plan, name="plain"))
    assert len(receipt.learnt) == 2
    assert receipt.sites[0].bytes_after == plain.sites[0].bytes_after


def test_with_a_rate_of_zero_it_is_the_range_it_begins_with(model: Path, tmp_path: Path) -> None:
    receipt = made(model, tmp_path / "out", recipe("learnt-clip:0.0", steps=6))
    assert all(entry["before"] == entry["after"] for entry in receipt.learnt)


def test_the_teachers_stream_is_the_uncompressed_models(model: Path) -> None:
    """The teacher's states behind each block are those of the source, whatever the compressed block made of it."""
    job, work = passing(model, recipe())
    source = Source.open(model)
    assert work.runner is not None
    states = work.runner.begin(work.batches, source.block(None))
    for block in range(2):
        moved, *_ = work.local(block, work.read(block))
        states = work.runner.block(block, source.block(block), states)
        assert work.target is not None
        for ours, theirs in zip(work.target.hidden, states.hidden, strict=True):
            torch.testing.assert_close(ours, theirs)
        work.advance(block, effective(moved.stored, work.round(job.sites(block), moved, {}), job.choices))
        assert work.teacher is not None
        assert work.states is not None
        torch.testing.assert_close(work.teacher.hidden[0], states.hidden[0])
        assert not torch.allclose(work.states.hidden[0], states.hidden[0])


def test_rotated_the_teacher_is_in_the_same_gauge(model: Path) -> None:
    """A block that is not rounded at all has no error, also after the residual was turned and both streams with it."""
    job, work = passing(model, recipe(more="rewrites: [fold-norm, rotate]\n"))
    assert job.taught
    moved, *_ = work.local(0, work.read(0))
    objective = work.objective(0, moved)
    assert objective.error(moved.exact) < 1e-10
    down = "blocks.0.mlp.down.weight"
    assert objective.error({**moved.exact, down: 0 * moved.exact[down]}) > 1e-3


def test_a_pass_without_an_objective_has_no_teacher(model: Path) -> None:
    _, work = passing(model, recipe("minmax", "gptq"))
    work.local(0, work.read(0))
    assert work.teacher is None
    assert work.target is None


def test_the_objective_by_hand(model: Path) -> None:
    """As a plain number it is Σ(y − t)²/Σt² of the block under rounded weights; its batches average to it."""
    job, work = passing(model, recipe("minmax", more=BY_BLOCK))
    assert work.states is not None
    work.states = work.states.with_hidden(
        [hidden * 1.1 for hidden in work.states.hidden]
    )  # what came before went wrong
    plain = replace(job, recasts=())
    work.job = plain
    moved = work.read(0)
    assert work.runner is not None
    assert work.teacher is not None
    work.target = work.runner.block(0, moved.exact, work.teacher)
    objective = work.objective(0, moved)
    rounded = effective(moved.stored, work.round(job.sites(0), moved, {}), job.choices)
    above = below = 0.0
    run = work.runner.bind(0, rounded, work.states)
    for batch, (hidden, target) in enumerate(zip(work.states.hidden, work.target.hidden, strict=True)):
        above += float((run(hidden, batch) - target).square().sum())
        below += float(target.square().sum())
    assert objective(moved.exact) == pytest.approx(above / below, rel=1e-5)
    assert objective.error(rounded) == pytest.approx(above / below, rel=1e-5)
    misses = [float(objective.miss(rounded, batch)) for batch in range(objective.batches)]
    assert sum(misses) / len(misses) == pytest.approx(above / below, rel=1e-5)


BY_BLOCK = "rewrites: [{part: smooth-streams, alpha: block}]\n"


def test_smoothing_asks_the_objective_for_every_strength(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regauge.engine import objective

    seen: list[float] = []
    call = objective.Objective.__call__

    def watched(self: objective.Objective, weights: dict[str, torch.Tensor]) -> float:
        seen.append(call(self, weights))
        return seen[-1]

    monkeypatch.setattr(objective.Objective, "__call__", watched)
    receipt = made(model, tmp_path / "out", recipe("minmax", more=BY_BLOCK))
    assert len(seen) == 2 * len(GRID)
    chosen = [note for note in receipt.notes if note.startswith("smooth-streams: alpha")]
    for block, note in enumerate(chosen):
        losses = seen[block * len(GRID) : (block + 1) * len(GRID)]
        assert f"alpha {GRID[losses.index(min(losses))]} in block {block}" in note
        assert min(losses) < losses[0]
    assert len(chosen) == 2


def test_a_rewrite_without_an_engine_says_what_is_missing() -> None:
    from regauge.rewrites import SmoothStreams
    from tests.toy import SHAPES, build

    anatomy, weights = build(SHAPES["llama"])
    assert isinstance(anatomy, Anatomy)
    with pytest.raises(RecipeError, match="chosen by a block's error, and nothing gives it here"):
        SmoothStreams(alpha="block")(anatomy, weights, {}, None, 0)


def test_a_time_limit_in_the_middle_of_a_block_keeps_what_was_learnt(
    model: Path, tmp_path: Path, taught: tuple[Receipt, Path]
) -> None:
    def out_of_time(event: Progress) -> None:
        if event.phase == "learning block 1" and event.done == 7:
            raise BudgetError("time is up")

    with pytest.raises(BudgetError):
        made(model, tmp_path / "cut", recipe(), progress=out_of_time)
    begun: list[int] = []

    def first(event: Progress) -> None:
        if event.phase == "learning block 1":
            begun.append(event.done)
        assert event.phase != "learning block 0", "block 0 was finished"

    made(model, tmp_path / "cut", recipe(), progress=first)
    assert begun[:2] == [7, 8]
    assert contents(tmp_path / "cut") == contents(taught[1])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_other_families_learn_too(name: str, tmp_path: Path) -> None:
    folder = save_tokenizer(save(pico(name), tmp_path / "model"))
    plan = recipe("learnt-clip:0.05", steps=6)
    plan = parse(
        "name: taught\nlearning: {steps: 6, batch: 64}\nweights: {blocks.*: {grid: int2-asym, grain: channel, "
        "ranger: 'learnt-clip:0.05'}}\n"
    )
    receipt = apply(plan, folder, tmp_path / "out", calibration=[text(2000)], tokens=128, length=16)
    assert len(receipt.learnt) == 2
    assert all(float(str(entry["after"])) <= float(str(entry["before"])) for entry in receipt.learnt)


def test_progress_of_the_blocks_goes_on_around_that_of_learning(model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    made(model, tmp_path / "out", recipe(steps=5), progress=seen.append)
    blocks = [(event.done, event.eta) for event in seen if event.phase == "blocks"]
    assert [done for done, _ in blocks] == [0, 1, 2]
    assert all(eta is not None and eta >= 0 for _, eta in blocks[1:])
    assert [e.done for e in seen if e.phase == "learning block 0"] == [0, 1, 2, 3, 4, 5]


def test_a_dry_run_says_what_learning_costs(model: Path) -> None:
    found = dry_run(recipe(steps=300), model, **READ)
    assert not found.refusals
    [line] = [told for told in found.passes if "training steps" in told]
    assert "up to 300 training steps of 64 tokens, for 14 sites in all: about" in line
    assert "MB of memory" in line
    assert any("uncompressed model's states" in told for told in found.passes)
    shorter = dry_run(recipe(steps=3), model, **READ)
    assert found.seconds is not None
    assert shorter.seconds is not None
    assert found.seconds > shorter.seconds


def test_a_loss_that_is_not_finite_is_a_note_and_the_best_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop._gradients

    def broken(problem: Any, parameters: Any, batch: int, progress: float) -> Any:
        loss, gradients = whole(problem, parameters, batch, progress)
        return (loss * float("nan") if progress >= 0.5 else loss), gradients

    monkeypatch.setattr(loop, "_gradients", broken)
    receipt = made(model, tmp_path / "out", recipe())
    assert "learning block 0 ended at step 12: the loss or its gradient was not finite; the best so far was kept" in (
        receipt.notes
    )
    assert all(float(str(entry["after"])) < float(str(entry["before"])) for entry in receipt.learnt)


def test_what_cannot_be_learnt_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        made(model, tmp_path / "out", recipe(select="embed"))
    assert "ranger 'learnt-clip' is learnt by the error of a block's output" in str(caught.value)
    assert "embed" in str(caught.value)
    plan = replace(recipe("minmax"), learning={"steps": 3})
    with pytest.raises(RecipeError, match="'learning' says how to train, and nothing in this recipe is learnt"):
        made(model, tmp_path / "out", plan)
    plan = recipe(rounder="importance")
    with pytest.raises(RecipeError, match="rounder 'importance' works through ranger search"):
        made(model, tmp_path / "out", plan)


def test_without_text_it_says_so(tmp_path: Path) -> None:
    folder = save_tokenizer(save(pico("bert"), tmp_path / "model"))
    plan = parse("name: taught\nweights: {blocks.*: {grid: int2-asym, grain: channel, ranger: learnt-clip}}\n")
    with pytest.raises(TextError, match="reads calibration text"):
        apply(plan, folder, tmp_path / "out")


def test_pruning_and_choosing_by_block_do_not_go_together(model: Path, tmp_path: Path) -> None:
    more = f"{BY_BLOCK}shape:\n  blocks.*.ffn: {{unit: neuron, score: magnitude, allocation: 'uniform:0.5'}}\n"
    plan = recipe("minmax", more=more)
    plan = parse(dump(plan).replace("group:16", "channel"))
    with pytest.raises(RecipeError, match="cannot where the same recipe takes units out of blocks"):
        made(model, tmp_path / "out", plan)


@pytest.mark.telling
@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "ranger: 'learnt-clip:0.05'",
        "ranger: learnt-share, rounder: learnt-offset",
        "ranger: learnt-share, rounder: 'learnt-offset:gptq'",
        "ranger: 'learnt-clip:0.05'}}\n"
        "rewrites: [{part: learnt-equivalence, streams: norm+value+ffn+qk, matrix: true}]\n"
        "inputs: {blocks.*: {transform: kronecker, grid: int4, grain: token, ranger: learnt-reach",
    ],
    ids=["clip", "share and offset", "from gptq", "all that moves"],
)
def test_killed_while_it_learns_it_ends_with_the_same_bytes(how: str, tmp_path: Path) -> None:
    """SIGKILL at random moments of a run that spends nearly all its time in the loop."""
    folder = save_tokenizer(save(pico("llama", **SMALL), tmp_path / "model"))
    (tmp_path / "text.txt").write_text(text(2000), encoding="utf-8")
    (tmp_path / "taught.yaml").write_text(
        f"name: taught\nlearning: {{steps: 60, batch: 64, patience: 0{', optimiser: sign' * ('offset' in how)}}}\n"
        f"weights: {{blocks.*: {{grid: int2-asym, grain: 'group:16', {how}}}}}\n",
        encoding="utf-8",
    )
    arguments = [str(folder), str(tmp_path / "text.txt"), str(tmp_path), str(tmp_path / "taught.yaml"), "4", "3"]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "KEEP": "0"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["different"] in ([], ["regauge/run-log.json"])
    assert found["rewritten"] is False
    assert found["in a loop"] >= 2


def test_a_bound_on_memory_leaves_the_bytes_of_what_is_learnt(
    model: Path, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model, tmp_path / "plain", recipe(steps=6))
    asked: list[int | None] = []
    real = blocks.named
    monkeypatch.setattr(blocks, "named", lambda jobs, at_once=None: (asked.append(at_once), real(jobs, at_once))[1])
    monkeypatch.setattr(api, "room", lambda *_: Room(0, 0, (1, 1)))
    made(model, tmp_path / "bound", recipe(steps=6), max_memory=1)
    assert 1 in asked
    assert contents(tmp_path / "bound") == contents(tmp_path / "plain")


def test_what_learning_takes_is_told_and_refused(model: Path, tmp_path: Path) -> None:
    source = Source.open(model)
    jobs = [prepare(recipe(ranger), source) for ranger in ("minmax", "learnt-clip:0.05")]
    plain, taught = (room(job, 256) for job in jobs if job is not None)
    assert taught.block > plain.block
    with pytest.raises(BudgetError, match="bytes of memory at the least"):
        made(model, tmp_path / "out", recipe(), max_memory=plain.peak(1) // 2)
    assert not (tmp_path / "out").exists()


DRIFTING = (
    "name: drifting\nweights: {blocks.*: {grid: int2-asym, grain: channel, rounder: {part: retargeted, share: 1.0}}}\n"
)


def test_the_drift_of_inputs_is_that_of_the_two_streams(model: Path) -> None:
    """E[(x − x̂) x̂ᵀ] of each tap by hand, from a block run on either stream's states; nothing in the first block."""
    job, work = passing(model, parse(DRIFTING))
    assert job.taught
    for block in range(2):
        moved, *_ = work.local(block, work.read(block))
        looked = work.look(block, moved)
        name = f"blocks.{block}.mlp.down"
        drift_II = looked.stats[name]["drift"]
        assert work.runner is not None
        assert work.teacher is not None
        assert work.states is not None
        theirs, ours = list[torch.Tensor](), list[torch.Tensor]()
        for states, seen in ((work.teacher, theirs), (work.states, ours)):
            work.runner.show(block, moved.exact, states, {name: seen.append})
        x_TI, own_TI = torch.cat(theirs).double(), torch.cat(ours).double()
        torch.testing.assert_close(drift_II, (x_TI - own_TI).T @ own_TI / len(x_TI), rtol=1e-4, atol=1e-7)
        assert bool(drift_II.any()) is (block > 0)
        work.advance(block, effective(moved.stored, work.round(job.sites(block), moved, looked.stats), job.choices))


def test_feedback_for_the_inputs_that_are_there_brings_the_last_block_nearer(model: Path, tmp_path: Path) -> None:
    plain = made(model, tmp_path / "plain", parse(DRIFTING.replace("share: 1.0", "share: 0.0")))
    there = made(model, tmp_path / "there", parse(DRIFTING))
    same = [(a.error == b.error, a.name) for a, b in zip(plain.sites, there.sites, strict=True) if a.choice is not None]
    assert all(alike is name.startswith("blocks.0.") for alike, name in same)
    assert not [note for note in there.notes if "nothing is known" in note]


def test_sets_of_readers_are_rounded_apart_on_the_teachers_states(model: Path) -> None:
    """The error of rounding one site alone: the block on the uncompressed model's states, all else exact."""
    plan = parse(
        "name: readers\nrewrites: [smooth-readers]\nweights: {blocks.*: {grid: int2-asym, grain: channel, "
        "rounder: clip}}\n"
    )
    job, work = passing(model, plan)
    assert work.states is not None
    work.states = work.states.with_hidden([hidden * 1.1 for hidden in work.states.hidden])
    moved = work.read(0)
    assert work.runner is not None
    assert work.teacher is not None
    work.target = work.runner.block(0, moved.exact, work.teacher)
    objective = work.objective(0, moved)
    assert objective(moved.exact, []) < 1e-10
    down = "blocks.0.mlp.down"
    near = moved.exact[f"{down}.weight"].float()
    fmt = job.format(down)
    rounded = {**moved.exact, f"{down}.weight": fmt.decode(fmt.encode(near))}
    found = work.runner.block(0, rounded, work.teacher)
    above = sum(float((a - b).square().sum()) for a, b in zip(found.hidden, work.target.hidden, strict=True))
    below = sum(float(b.square().sum()) for b in work.target.hidden)
    assert objective(moved.exact, [down]) == pytest.approx(above / below, rel=1e-4)
