"""The benchmarks' own arithmetic: turns, probes, fractions, tables and pictures. No timing is judged here."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import write_speed  # noqa: E402
from common import artifacts, models, plots, records, rounds, sections, shapes, table  # noqa: E402

from regauge.parts import bytes_of  # noqa: E402
from regauge.plan import parse  # noqa: E402


def row(runner: str, variant: str, seconds: list[float], **more: Any) -> records.Row:
    told = {"bytes": 2_000_000_000, "bits": 4.5, "operations": 8e9, "probes": [40.0] * len(seconds)} | more
    return records.Row(model="tinyllama-1.1b", runner=runner, variant=variant, seconds=seconds, **told)


def result(*rows: records.Row, bench: str = "decode") -> records.Result:
    peaks = records.Peaks(bf16=1e12, int8=2e12)
    told: dict[str, Any] = {"profile": "quick", "started": "2026-01-02T03:04:05", "command": "x", "machine": {}}
    return records.Result(bench=bench, peaks=peaks, rows=list(rows), **told)


def test_spread_is_median_and_quartiles() -> None:
    found = records.spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert records.spread([7.0]).high == 7.0


def test_fraction_pairs_each_sample_with_its_own_probe() -> None:
    # 2 GB in 0.1 s is 20 GB/s: half of 40; in 0.05 s it is 40 GB/s: half of 80. Medians first would give 0.44.
    found = row("a", "", [0.1, 0.05], probes=[40.0, 80.0]).fractions()
    assert (found.low, found.median, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_versus_goes_round_by_round() -> None:
    ours, theirs = row("a", "", [0.1, 0.2, 0.4]), row("b", "", [0.2, 0.4, 0.8])
    assert table.versus(ours, theirs).median == pytest.approx(2.0)
    assert table.versus(theirs, ours).median == pytest.approx(0.5)


def test_asked_says_reached_or_missed() -> None:
    ours = row("regauge", "int4 g32", [0.02, 0.02], route="generate", bytes=600_000_000)
    text = table.asked(result(ours, row("llama.cpp", "Q4_0", [0.024, 0.024]), row("transformers", "bf16", [0.2, 0.2])))
    assert "int4 g32 generate / llama.cpp Q4_0 | ≥ 1.3× | 1.20 [1.20, 1.20] | **missed** |" in text
    assert "int4 g32 generate / transformers bf16 | ≥ 6× | 10.0 [10.0, 10.0] | reached |" in text
    assert "int4 g32 generate, of the probe | ≥ 0.65 | 0.75 [0.75, 0.75] | reached |" in text
    assert len(text.splitlines()) == 5  # rows that did not run promise nothing


def test_a_peer_that_is_missing_is_a_row_with_its_reason() -> None:
    text = table.whole(result(row("openvino", "int4", [], skipped="not installed: do this")))
    assert "| openvino | int4 | | – | not installed: do this | | |" in text


def test_notes_mark_a_busy_machine_and_a_poor_probe() -> None:
    quiet, noisy = row("a", "x", [0.1], busy=[0.02]), row("b", "y", [0.1], busy=[0.6])
    found = result(quiet, noisy)
    found.probe = "torch"
    said = " ".join(table.notes(found))
    assert "0.1 cores busy" in said
    assert "fractions are too high" in said
    lines = table.rows("decode", found.rows).splitlines()
    assert "*" not in lines[2]
    assert "] * |" in lines[3]


def test_results_survive_the_disk(tmp_path: Path) -> None:
    found = result(row("a", "x", [0.1, 0.2]))
    assert records.read(records.write(found, tmp_path / "deep" / "r.json")) == found


def test_points_stop_at_the_waterline() -> None:
    # 8e9 operations on 2e9 bytes: 4 a byte; at 40 GB/s 160e9 a second; in 0.1 s 80e9 were done: half.
    low = plots.points([row("a", "x", [0.1], kind="int8")], records.Peaks(bf16=1e12, int8=2e12))[0]
    assert (low.intensity, low.attainable, low.achieved, low.efficiency) == pytest.approx((4.0, 160e9, 80e9, 0.5))
    # 400 operations a byte are beyond the ridge: the peak of its kind bounds it.
    high = plots.points([row("a", "x", [1.6], operations=8e11)], records.Peaks(bf16=1e12, int8=2e12))[0]
    assert (high.attainable, high.efficiency) == pytest.approx((1e12, 0.5))


def test_pictures_draw_every_row_that_ran() -> None:
    found = result(row("regauge", "a<b", [0.1]), row("llama.cpp", "Q4_0", [0.2]), row("torch", "x", [], skipped="no"))
    drawn = ET.fromstring(plots.waterline(found, "tinyllama-1.1b"))
    bars = [e for e in drawn.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") in plots.COLOURS.values()]
    assert [round(float(bar.get("width", 0))) for bar in bars] == [220, 110]  # 50 % and 25 % of 440
    roofs = plots.gaps(found, "tinyllama-1.1b").data
    assert [trace.name for trace in roofs[2:]] == ["regauge a<b", "llama.cpp Q4_0"]
    assert tuple(roofs[2].y) == pytest.approx((80e9, 160e9))


def test_shapes_count_what_the_models_have() -> None:
    # 1,100,048,384 parameters less a table of 32000 x 2048 and 45 norms; 134,515,008 less 61 norms, tied.
    assert shapes.SHAPES["tinyllama-1.1b"].weights() == 1_100_048_384 - 65_536_000 - 45 * 2048
    assert shapes.SHAPES["smollm-135m"].weights() == 134_515_008 - 61 * 576
    pico = shapes.SHAPES["pico"]
    assert pico.operations(10, 1) == 2 * (10 * (pico.weights() - 320 * 64) + 320 * 64)


@pytest.mark.parametrize("variant", artifacts.BODY)
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_recipes_parse_and_cover_head_and_table(variant: str, name: str) -> None:
    shape = shapes.SHAPES[name]
    plan = parse(artifacts.recipe(variant, shape))
    assert [rule.select for rule in plan.rules] == ["blocks.*", "embed", *(() if shape.tied else ("head",))]


def test_four_bits_take_what_q4_0_takes() -> None:
    choice = parse(artifacts.recipe("int4 g32", shapes.SHAPES["pico"])).rules[0].point
    assert choice is not None
    assert bytes_of(choice, (64, 128)) * 8 == 4.5 * 64 * 128


PEER = """
import sys
sys.path.insert(0, {peers!r})
from serve import Loaded, serve
def load(options):
    if options.get("fail"): raise ValueError("cannot load this")
    def run():
        print("noise that must not reach the answers")
        open({log!r}, "a").write(options["name"])
        return [options["seconds"]]
    return Loaded(run, {{"bytes": 3, "bits": 4.0, "ids": [1, 2]}})
serve(load)
"""


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[rounds.Rounds, Path]:
    """Rounds with two peers of a few lines, and a probe that counts 10, 20, 30, …"""
    log = tmp_path / "log"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(PEER.format(peers=str(ROOT / "benchmarks" / "peers"), log=str(log)))
    monkeypatch.setattr(rounds, "PEERS", tmp_path)
    monkeypatch.setattr(rounds, "REST", 0.0)
    made = rounds.Rounds(log=tmp_path / "stderr")
    count = iter(range(10, 1000, 10))
    made.probe = lambda: float(next(count))
    return made, log


def entry(peer: str, name: str, **options: Any) -> rounds.Entry:
    told = {"name": name, "seconds": 0.5, **options}
    return rounds.Entry(records.Row(model="m", runner=peer, variant=name), peer, lambda: told)


def test_rows_take_turns_with_a_probe_on_either_side(turns: tuple[rounds.Rounds, Path]) -> None:
    taking, log = turns
    found = [entry("one", "a"), entry("two", "b"), entry("one", "c")]
    taking.run(found, rounds=2, warm=1)
    taking.close()
    assert log.read_text() == "abc" * 3
    # Probes: 10 first, then one behind each of nine runs. The warm round (20, 30, 40) does not count.
    assert [e.row.probes for e in found] == [[45.0, 75.0], [55.0, 85.0], [65.0, 95.0]]
    assert found[0].row.seconds == [0.5, 0.5]
    assert (found[0].row.bytes, found[0].row.bits, found[0].ids) == (3, 4.0, [1, 2])


def test_what_cannot_run_is_skipped_with_its_reason(turns: tuple[rounds.Rounds, Path], tmp_path: Path) -> None:
    taking, log = turns
    missing = tmp_path / "venvs" / "two" / "bin" / "python"
    taking.interpreters = {"two": missing}
    huge = entry("one", "h")
    huge.memory = 1 << 60
    found = [entry("one", "a"), entry("two", "b"), entry("one", "c", fail=True), huge]
    told: list[str] = []
    taking.run(found, rounds=1, warm=0, tell=told.append)
    taking.close()
    assert log.read_text() == "a"
    assert found[1].row.skipped == "not installed: python benchmarks/peers/setup.py two"
    assert found[2].row.skipped == "ValueError: cannot load this"
    assert "of memory" in found[3].row.skipped
    assert len(told) == 3


def test_a_peer_that_dies_costs_its_rows_only(turns: tuple[rounds.Rounds, Path]) -> None:
    taking, _ = turns
    (rounds.PEERS / "two.py").write_text("import sys; sys.stdin.readline(); sys.exit(3)")
    found = [entry("one", "a"), entry("two", "b")]
    taking.run(found, rounds=1, warm=0, tell=lambda _: None)
    taking.close()
    assert found[1].row.skipped == "the peer ended with code 3"
    assert found[0].row.seconds == [0.5]


@pytest.mark.parametrize("form", ["int3-asym g128", "int8 channel", "nf4 g32", "nvfp4", "mxfp4", "fp8 channel"])
def test_random_codes_are_a_matrix_that_multiplies(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    linear, peer = importlib.import_module("linear"), importlib.import_module("linear_regauge")
    options = linear.quick()[form]
    columns = 320  # of which 128 is no divisor
    fmt = peer.format_of(options, columns)
    codes = peer.random_codes(fmt, 64, columns)
    w_OI = fmt.decode(codes)
    assert torch.isfinite(w_OI).all()
    assert w_OI.std() > 0
    x_TI = torch.randn(2, columns).bfloat16()
    y_TO = peer.PackedMatrix(codes, fmt, torch.bfloat16)(x_TI).float()
    expected_TO = x_TI.float() @ w_OI.t()
    assert (y_TO - expected_TO).norm() < 0.02 * expected_TO.norm()


def test_page_takes_tables_and_pictures_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), encoding="utf-8")
    records.write(result(row("regauge", "int4 g32", [0.1, 0.1], route="generate")), tmp_path / "r" / "decode.json")
    assert write_speed.main(["--results", str(tmp_path / "r"), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| regauge, generate | int4 g32 | 4.50 | 10.0 [10.0, 10.0] | 0.50 [0.50, 0.50] | 40 |" in text
    assert "(speed-decode-tinyllama-1.1b.svg)" in text
    assert (tmp_path / "speed-decode-tinyllama-1.1b.svg").exists()
    assert "<!-- benchmarks/linear.py -->" in text
    assert "plotly" in (tmp_path / "r" / "speed.html").read_text(encoding="utf-8")


def test_a_section_of_a_page_is_replaced_and_its_other_rows_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n## B\n\n| | c |\n|---|---|\n| a | b | 1 |\n| d | e | 2 |\n\n## BC\n\nz\n", encoding="utf-8")
    rows = sections.merged(sections.section(page, "B"), ["| a | b | 9 |", "| f | g | 3 |"], 2)
    assert rows == ["| a | b | 9 |", "| d | e | 2 |", "| f | g | 3 |"]
    sections.put(page, "B", "\n".join(rows))
    sections.put(page, "D", "new")
    told = "# A\n\n## B\n\n| a | b | 9 |\n| d | e | 2 |\n| f | g | 3 |\n\n## BC\n\nz\n\n## D\n\nnew\n"
    assert page.read_text(encoding="utf-8") == told


def test_every_peer_named_has_a_file() -> None:
    linear = importlib.import_module("linear")
    named = {peer for peer, _ in linear.PEERS.values()} | set(models.INTERPRETERS) | {"linear_regauge"}
    assert [name for name in sorted(named) if not (ROOT / "benchmarks" / "peers" / f"{name}.py").exists()] == []
    assert json.loads(json.dumps(linear.full(32)))  # what a peer is told is JSON


def test_suite_tells_design_from_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    suite, expected = importlib.import_module("transformers_suite"), importlib.import_module("suite_expected")
    designed = expected.Expected("test_(save|load)", "KeyError", "artifacts are other files", ("llama",))
    monkeypatch.setattr(suite, "EXPECTED", (designed, expected.Expected("test_gone", "", "nobody knows")))
    passed, failed, skipped = ("passed", ""), ("failed", "KeyError: 'w'"), ("skipped", "")
    names = ("save", "load", "save_twice", "greedy", "old", "odd", "lost")
    plain = {("llama", f"test_{name}"): passed for name in names} | {("opt", "test_save"): passed}
    plain |= {("llama", "test_old"): failed, ("llama", "test_odd"): skipped}
    ours = {**plain, ("llama", "test_save"): failed, ("llama", "test_save_twice"): failed, ("opt", "test_save"): failed}
    ours |= {("llama", "test_load"): ("failed", "RuntimeError: other words")}
    ours |= {("llama", "test_greedy"): skipped, ("llama", "test_old"): passed}
    del ours["llama", "test_lost"]
    rows = suite.compared(plain, ours)
    assert rows["llama"].designed == {"test_save": "artifacts are other files"}
    assert (rows["llama"].same, rows["llama"].skipped, rows["llama"].failing) == (0, 1, 1)
    assert set(rows["llama"].unexplained) == {"test_load", "test_save_twice", "test_greedy", "test_lost"}
    assert rows["opt"].unexplained == {"test_save": "passed plain, failed ours: KeyError: 'w'"}
    counted = {"llama": suite.Counter({"models loaded": 7, "generate": 3, "generate, native": 2})}
    assert suite.report(rows, counted, whole=True) == 1
    told = capsys.readouterr().out
    assert "| llama | 5 | 0 | 1 | 4 | 1 | 7 | 2 of 3 |" in told
    assert "| together | 6 | 0 | 1 | 5 | 1 | 7 | 2 of 3 |" in told
    assert "UNEXPLAINED opt test_save: passed plain, failed ours: KeyError: 'w'" in told
    assert "- STALE, nothing differs so: nobody knows (test_gone)" in told
    assert suite.report({"llama": suite.Row(same=3)}, counted, whole=False) == 0
    assert suite.report({"llama": suite.Row(same=3)}, {"llama": suite.Counter()}, whole=False) == 1  # nothing was ours


def test_the_frechet_distance_by_hand_and_images_as_they_are_read(tmp_path: Path) -> None:
    drawn = importlib.import_module("var")
    one = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert drawn.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert drawn.frechet(one, one + 3) == pytest.approx(18)
    assert drawn.frechet(one, one * 3 - 2) == pytest.approx(2 * (3 - 1) ** 2 * 4 / 3)  # equal means
    np.savez(tmp_path / "x.npz", x_test=np.full((2, 28, 28), 255, np.uint8), y_test=np.array([3, 4]))
    images, labels = drawn.images_of(tmp_path / "x.npz", 16, "test")
    assert images.shape == (2, 1, 16, 16)
    assert images[0, 0, 0].tolist() == [-1.0] * 16
    assert images[0, 0, 1, 1:15].tolist() == [1.0] * 14
    assert labels.tolist() == [3, 4]
