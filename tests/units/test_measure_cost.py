"""Speeds, verdicts, memory and the machine's cache of costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from regauge.artifact.files import weight_bytes
from regauge.kernels.cpu.machine import anonymous_bytes, bandwidth
from regauge.measure.cost import cache_bytes, cache_bytes_a_token, interleave, speed, verdict
from regauge.measure.machine import FRESH, believed, cost, machine, read_costs, write_costs


def test_speed_by_hand() -> None:
    found = speed([10.0, 30.0, 20.0, 50.0, 40.0])
    assert (found.median, found.low, found.high, found.rounds) == (30.0, 20.0, 40.0, 5)
    assert (speed([7.0]).low, speed([7.0]).high) == (7.0, 7.0)


def test_no_faster_where_spreads_overlap() -> None:
    slow, fast, blurred = speed([10, 11, 12]), speed([20, 21, 22]), speed([9, 14, 25])
    assert verdict(fast, slow) == "1.91x"
    assert verdict(slow, fast) == "0.52x, slower"
    assert verdict(blurred, slow) == "no faster"
    assert verdict(slow, blurred) == "no faster"


def test_runs_are_interleaved_and_warmed() -> None:
    seen: list[str] = []

    def run(name: str, rate: float) -> float:
        seen.append(name)
        return rate if len(seen) > 2 else 1e9  # the warm round must not count

    found = interleave({"a": lambda: run("a", 2.0), "b": lambda: run("b", 3.0)}, rounds=3)
    assert seen == ["a", "b"] * 4
    assert (found["a"].median, found["b"].median, found["a"].rounds) == (2.0, 3.0, 3)


class Caching(torch.nn.Module):
    """Keeps 6 float32 a token and a fixed table of 100 bytes."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        keys = torch.zeros(*input_ids.shape, 4)
        layer = SimpleNamespace(
            keys=keys, view=keys[:, :1], values=[torch.zeros(*input_ids.shape, 2)], table=torch.zeros(25), size=3
        )
        return SimpleNamespace(past_key_values=SimpleNamespace(layers=[layer, layer]))


def test_cache_is_read_from_its_tensors() -> None:
    model = Caching()
    out = model(torch.zeros(1, 10, dtype=torch.int64), use_cache=True)
    assert cache_bytes(out.past_key_values) == 10 * 24 + 100  # a view and a layer listed twice count once
    assert cache_bytes_a_token(model, torch.zeros(1, 10, dtype=torch.int64)) == 24.0


def test_weight_bytes_are_those_that_loading_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(5, dtype=torch.int8)}
    for name in ("consolidated", "small/model", "model-00001-of-00002", "model-00002-of-00002"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    assert weight_bytes(tmp_path) == 10
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert weight_bytes(tmp_path) == 5
    save_file({"a": torch.zeros(7, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path) == 7
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "regauge-00001-of-00001.safetensors")
    assert weight_bytes(tmp_path) == 3


def test_weight_bytes_count_tensors_not_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path) == 67


def test_costs_are_kept_by_fingerprint_and_a_corrupt_cache_is_measured_again(tmp_path: Path) -> None:
    here = machine()
    assert here.cores >= 1
    assert here.memory > 2**28
    assert read_costs(here, tmp_path) == {}
    path = write_costs(here, {"linear:3x5": 0.5}, tmp_path, 0.0)
    assert path is not None
    write_costs(here, {"linear:7x5": 0.25}, tmp_path, 0.0)
    assert read_costs(here, tmp_path) == {"linear:3x5": 0.5, "linear:7x5": 0.25}
    other = here.model_copy(update={"threads": here.threads + 1})
    assert other.fingerprint() != here.fingerprint()
    assert read_costs(other, tmp_path) == {}
    whole = json.loads(path.read_text())
    for broken in ("", "{", path.read_text()[:40], json.dumps({**whole, "version": 1}), "\x00\xff",
                   json.dumps({**whole, "costs": {"a": {"seconds": -1, "at": 0}}})):  # fmt: skip
        path.write_text(broken)
        assert read_costs(here, tmp_path) == {}
    write_costs(here, {"again": 1.0}, tmp_path, 0.0)
    assert read_costs(here, tmp_path) == {"again": 1.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


def test_costs_are_not_believed_for_ever_nor_what_a_busy_machine_said(tmp_path: Path) -> None:
    """Each is kept with its time and the load; what is old, of the future or taken on a busy machine does not count."""
    here = machine()
    before = time.time()
    path = write_costs(here, {"a": 0.5}, tmp_path, busy=0.25)
    assert path is not None
    kept = json.loads(path.read_text())["costs"]["a"]
    assert before <= kept["at"] <= time.time()
    assert (kept["seconds"], kept["load"]) == (0.5, 0.25)
    assert read_costs(here, tmp_path, now=before + FRESH - 60) == {"a": 0.5}
    assert read_costs(here, tmp_path, now=before + FRESH + 60) == {}
    assert read_costs(here, tmp_path, now=before - 60) == {}
    assert write_costs(here, {"b": 0.5}, tmp_path, busy=2.0 * here.cpus) is None
    assert read_costs(here, tmp_path) == {"a": 0.5}


def test_costs_of_a_machine_that_has_changed_are_measured_again() -> None:
    known = {"a": 1.0, "b": 2.0}
    for now, kept in ((1.4, known), (0.7, known), (1.6, {"a": 1.6}), (0.6, {"a": 0.6})):
        assert believed(known, "a", lambda now=now: now) == kept  # type: ignore[misc]  # the default binds the loop's
    assert believed(known, "other", lambda: pytest.fail("not one that was kept")) == known


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert write_costs(machine(), {"a": 1.0}, tmp_path / "file" / "below", 0.0) is None


def test_a_known_cost_is_not_measured_again() -> None:
    known = {"a": 2.0}
    assert cost("a", known, lambda: pytest.fail("measured again")) == 2.0
    assert cost("b", known, lambda: 3.0) == 3.0
    assert known == {"a": 2.0, "b": 3.0}


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < bandwidth(seconds=0.001, size=2**22) < 1e13


def test_bandwidth_is_read_from_a_file_where_no_memory_is_to_be_taken(tmp_path: Path) -> None:
    seen: list[int] = []
    before = anonymous_bytes()
    real = torch.Tensor.sum

    def summed(x: torch.Tensor) -> torch.Tensor:
        found = real(x)
        seen.append(anonymous_bytes() - before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", summed)
        found = bandwidth(seconds=0.001, size=2**26, folder=tmp_path)
    assert 1e8 < found < 1e13
    assert max(seen) < 2**24
    assert not list(tmp_path.iterdir())
