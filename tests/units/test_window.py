"""A window of blocks computes what the whole model computes, reads what the plan says, and ends as it should."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import choice, make, outputs
from pico import batches, pico, save
from regauge import amounts
from regauge.errors import ArtifactError, BudgetError, CorruptWeights, OutputError
from regauge.hosts.transformers.load import load
from regauge.runtime.window import disk as disks
from regauge.runtime.window import figure as figures
from regauge.runtime.window import reader as readers
from regauge.runtime.window.figure import machine_memory, read_figure
from regauge.runtime.window.plan import make_plan, spread

INT4 = choice("int4-asym", "channel", "f32", "minmax")
BLOCKS = 7


@pytest.fixture(autouse=True)
def _no_thread_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(readers, "IDLE", 0.2)
    yield
    if threads():
        gc.collect()
    ended()


def ended() -> None:
    """Every reader ends within a moment."""
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.02)
    assert not threads()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "regauge-window"]


def deep(folder: Path, name: str = "llama", **changes: Any) -> tuple[Any, Path]:
    if name == "mixtral":  # its grouped kernel wants rows of whole 16 bytes
        changes = {"hidden_size": 28, "intermediate_size": 36} | changes
    model = pico(name, **({"num_hidden_layers": BLOCKS} | changes))
    return model, save(model, folder / "source")


def least(path: Path, memory: str | int = 1, **options: Any) -> int:
    """The least figure, as the refusal names it."""
    with pytest.raises(BudgetError) as told:
        load(path, memory=memory, **options)
    assert "\n" not in str(told.value)
    number, unit = amounts.amount(str(told.value).rpartition("memory='")[2].rstrip("'."), "")
    return int(number * amounts.factor(unit, ""))


# -- the plan


def test_streamed_blocks_stand_evenly_among_the_pinned() -> None:
    assert spread(3, 8) == (2, 5, 7)
    assert spread(0, 5) == ()
    assert spread(5, 5) == (0, 1, 2, 3, 4)
    assert spread(4, 6) == (1, 2, 4, 5)


def test_the_plan_by_hand() -> None:
    """10 outside and 5 of workspace leave 45 of 60: four blocks of 10, two of them slots."""
    plan = make_plan(60, 10, 5, [10] * 8)
    assert (plan.streamed, plan.pinned, plan.slots) == ((1, 2, 3, 5, 6, 7), (0, 4), 2)
    assert (plan.weights, plan.bytes_per_token) == (50, 60)
    assert make_plan(95, 10, 5, [10] * 8).streamed == ()
    assert make_plan(94, 10, 5, [10] * 8).streamed == (2, 5, 7)


def test_unequal_blocks_pay_for_the_largest_slot() -> None:
    plan = make_plan(100, 0, 0, [10, 10, 40, 10, 10, 40])
    assert plan.slot_bytes == 40
    assert plan.weights <= 100 < sum([10, 10, 40, 10, 10, 40])


def test_the_least_figure_is_named_and_works() -> None:
    with pytest.raises(BudgetError, match=r"memory='1\.24MB'") as told:
        make_plan(1000, 1_000_001, 34_000, [100_000] * 9, "memory=1kB")
    assert str(told.value).startswith("memory=1kB is too little")
    assert make_plan(1_240_000, 1_000_001, 34_000, [100_000] * 9).pinned == ()
    with pytest.raises(BudgetError, match=r"2\.00MB"):
        make_plan(1_240_000, 1_000_001, 34_000, [100_000] * 9, loading=2_000_000)


def loads(order: Sequence[int], room: int, lru: bool) -> int:
    """Loads of a cache of `room` blocks: LRU, or Belady's (drop what is needed last)."""
    held: OrderedDict[int, None] = OrderedDict()
    count = 0
    for at, block in enumerate(order):
        if block in held:
            held.move_to_end(block)
            continue
        count += 1
        if len(held) == room:
            rest = list(order[at + 1 :])
            last = max(held, key=lambda b: rest.index(b) if b in rest else len(rest))
            del held[next(iter(held)) if lru else last]
        held[block] = None
    return count


@pytest.mark.parametrize(("total", "room"), [(8, 5), (22, 12), (7, 2), (9, 8)])
def test_lru_reads_everything_and_the_plan_less_than_one_block_more_than_the_best(total: int, room: int) -> None:
    turns = 60
    order = list(range(total)) * turns
    assert loads(order, room - 1, lru=True) == loads(order, room, lru=True) == total * turns
    best = loads(order, room - 1, lru=False) / turns  # one slot is always being filled
    assert best == pytest.approx(total * (total - room + 1) / (total - 1), abs=0.2)
    plan = make_plan(room * 10, 0, 0, [10] * total)
    assert best - 0.2 <= len(plan.streamed) < best + 1


# -- the same model


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "mixtral"]
)
def test_a_checkpoint_computes_the_same(name: str, tmp_path: Path) -> None:
    model, path = deep(tmp_path, name)
    windowed = load(path, memory=least(path))
    assert len(windowed.regauge_window.plan.streamed) >= BLOCKS - 1
    for ids in batches(model):
        assert outputs(windowed, ids).equal(outputs(model, ids))
    assert windowed.device == torch.device("cpu")
    assert windowed.dtype == torch.float32


@pytest.mark.parametrize(("name", "wire"), [("llama", "regauge"), ("llama", None), ("phi3", "regauge"), ("gpt2", None)])
def test_an_artifact_computes_the_same(name: str, wire: str | None, tmp_path: Path) -> None:
    model, path = deep(tmp_path, name)
    inside = make(path, tmp_path / "out", lambda site: INT4 if site.block is not None else None, prefer=wire).path
    whole, windowed = load(inside), load(inside, memory=least(inside))
    assert len(windowed.regauge_window.plan.streamed) == BLOCKS
    for ids in batches(model):
        assert outputs(windowed, ids).equal(outputs(whole, ids))


def test_packed_embeddings_and_a_stack_of_experts(tmp_path: Path) -> None:
    for name in ("llama-tied", "mixtral", "opt"):
        model, path = deep(tmp_path / name, name)
        made = make(path, tmp_path / name / "out", lambda site: INT4, prefer="regauge").path
        ids = batches(model)[0]
        windowed = load(made, memory=least(made))
        assert windowed.regauge_window.plan.streamed
        assert windowed.device == torch.device("cpu")
        assert outputs(windowed, ids).equal(outputs(load(made), ids))


def test_another_dtype_is_converted_once(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    before = set(path.iterdir())
    windowed = load(path, dtype=torch.bfloat16, memory=least(path, dtype=torch.bfloat16))
    assert windowed.dtype == torch.bfloat16
    assert windowed.regauge_window.plan.streamed
    ids = batches(model)[0]
    assert outputs(windowed, ids).equal(outputs(load(path, dtype=torch.bfloat16), ids))
    assert set(path.iterdir()) == before


def test_it_generates_the_same_and_reports(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    figure = least(path) * 13 // 10
    windowed = load(path, memory=figure)
    plan = windowed.regauge_window.plan
    assert 0 < len(plan.streamed) < BLOCKS
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for way in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        wanted = model.generate(prompt, max_new_tokens=9, pad_token_id=0, **way)
        assert windowed.generate(prompt, max_new_tokens=9, pad_token_id=0, **way).equal(wanted)
    report = windowed.regauge_window.report()
    assert (report.pinned, report.streamed, report.tokens) == (len(plan.pinned), len(plan.streamed), 8)
    assert report.first_token_seconds is not None
    assert report.token_seconds is not None
    assert report.figure == figure
    assert f"{len(plan.streamed)} stream" in str(report)
    assert "tokens/s" in str(report)


def test_each_token_reads_the_streamed_blocks_once(tmp_path: Path) -> None:
    """Counted at the disk: 200 tokens read 200 times the streamed blocks, and the two read ahead."""
    _, path = deep(tmp_path)
    windowed = load(path, memory=least(path) * 13 // 10)
    window, plan = windowed.regauge_window, windowed.regauge_window.plan
    start = window._disk.read
    with torch.inference_mode():
        for _ in range(200):
            windowed(input_ids=torch.ones(1, 1, dtype=torch.int64))
    sizes = {sum(extent.size for extent in block.extents) for block in window._reader._blocks}
    read = (window._disk.read - start) / sizes.pop()
    assert not sizes
    assert 200 * len(plan.streamed) - 2 <= read <= 200 * len(plan.streamed) + 2


def test_what_fits_is_an_ordinary_model(tmp_path: Path) -> None:
    _, path = deep(tmp_path)
    made = make(path, tmp_path / "out", lambda site: INT4, prefer="regauge").path
    for found in (load(path, memory="1GB"), load(made, memory="1GB")):
        assert not hasattr(found, "regauge_window")
        assert found.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=2, pad_token_id=0).shape == (1, 4)


def test_blocks_out_of_memory_hold_nothing(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    outputs(windowed, batches(model)[0])
    for number in windowed.regauge_window.plan.streamed:
        layer = windowed.model.layers[number]
        assert layer.mlp.up_proj.weight.is_meta
        assert not layer.input_layernorm.weight.is_meta


# -- threads, interruptions, wrong use


def test_a_forward_that_is_cut_short_and_a_block_out_of_turn(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves no thread for long, nothing borrowed, and the model as it was."""
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    ids = batches(model)[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for number in (1, 3, 6):
        handle = windowed.model.layers[number].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            windowed(input_ids=ids)
        handle.remove()
        assert windowed.model.layers[number].mlp.up_proj.weight.is_meta
        if number == 3:
            ended()
        assert outputs(windowed, ids).equal(outputs(model, ids))


def test_two_models_and_two_threads_do_not_meddle(tmp_path: Path) -> None:
    first, one = deep(tmp_path / "1")
    second, two = deep(tmp_path / "2", seed=3)
    pairs = [(load(path, memory=least(path)), model) for path, model in ((one, first), (two, second))]
    found: list[bool] = []

    def run(windowed: Any, model: Any) -> None:
        for ids in batches(model) * 3:
            found.append(outputs(windowed, ids).equal(outputs(model, ids)))

    workers = [threading.Thread(target=run, args=pair) for pair in (*pairs, pairs[0])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == [True] * 18


def test_a_model_that_goes_takes_its_thread_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "IDLE", 1000.0)
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    outputs(windowed, batches(model)[0])
    assert len(threads()) == 1
    gc.collect()  # what other tests left open is let go first
    handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    del windowed
    gc.collect()
    assert not threads()
    assert not handles or len(os.listdir("/proc/self/fd")) == handles - 1


@pytest.mark.long
def test_a_process_that_ends_does_not_wait(tmp_path: Path) -> None:
    _, path = deep(tmp_path)
    code = (
        "import sys, torch, regauge as rg\n"
        "m = rg.load(sys.argv[1], memory=int(sys.argv[2])); m(input_ids=torch.ones(1, 2, dtype=torch.int64))\n"
        "raise KeyboardInterrupt"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(least(path))],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stderr.strip().endswith("KeyboardInterrupt")


def test_a_file_cut_off_while_the_model_runs_is_one_sentence(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    ids = batches(model)[0]
    outputs(windowed, ids)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 3)
    with pytest.raises(ArtifactError, match=r"model\.safetensors was cut off while the model ran") as told:
        [outputs(windowed, ids) for _ in range(3)]
    assert "\n" not in str(told.value)
    ended()
    weights.write_bytes(whole)
    assert outputs(windowed, ids).equal(outputs(model, ids))


def test_a_file_that_is_removed_stays_readable(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    (path / "model.safetensors").unlink()
    ids = batches(model)[0]
    assert outputs(windowed, ids).equal(outputs(model, ids))


def test_a_truncated_file_is_found_before_anything_is_read(tmp_path: Path) -> None:
    _, path = deep(tmp_path)
    made = make(path, tmp_path / "out", lambda site: INT4, prefer="regauge").path
    for folder in (path, made):
        last = sorted(folder.glob("*.safetensors"))[-1]
        os.truncate(last, last.stat().st_size - 3)
        with pytest.raises((ArtifactError, CorruptWeights), match="truncated"):
            load(folder, memory="1GB")


def test_a_tensor_that_an_artifact_lacks_is_one_sentence(tmp_path: Path) -> None:
    from regauge.artifact import files

    _, path = deep(tmp_path)
    made = make(path, tmp_path / "out", lambda site: INT4 if site.kind == "up" else None, prefer="regauge").path
    figure = least(made)
    for key, match in (
        ("blocks.2.mlp.up.codes", r"lacks the codes of blocks\.2\.mlp\.up"),
        ("model.layers.2.mlp.down_proj.weight", r"lacks the tensor model\.layers\.2\.mlp\.down_proj\.weight"),
        ("model.norm.weight", r"lacks the tensor model\.norm\.weight"),
    ):
        shard = next(p for p in made.glob("*.safetensors") if key in files.header(p))
        tensors = files.read(shard)
        files.write(shard, {name: tensor for name, tensor in tensors.items() if name != key})
        with pytest.raises(ArtifactError, match=match):
            load(made, memory=figure)
        files.write(shard, tensors)


def test_what_needs_all_weights_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model, path = deep(tmp_path)
    windowed = load(path, memory=least(path))
    tries = {
        "saved": lambda: windowed.save_pretrained(tmp_path / "saved"),
        "listed as a state_dict": windowed.state_dict,
        "moved": windowed.half,
        "copied": lambda: copy.deepcopy(windowed),
    }
    for word, attempt in tries.items():
        with pytest.raises(BudgetError, match=word):
            attempt()
    assert not (tmp_path / "saved").exists()
    assert windowed.to("cpu") is windowed
    ids = batches(model)[0]
    assert outputs(windowed.eval().float(), ids).equal(outputs(model, ids))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("lots", "'lots' in 'memory=lots' is not an amount"),
        ("2", "has no unit"),
        ("2Gb", "did you mean 'GB'"),
        ("-2GB", "is negative"),
        ("0GB", "is zero"),
        ("2GB@", "is not a context"),
        ("", "is not an amount"),
        (0, "positive integer"),
        (-5, "positive integer"),
        (True, "positive integer"),
        ("900TB", "is more than the"),
        ("99999999x", "is more than the"),
        ("1B", "is too little"),
        ("0.0001x", "is too little"),
    ],
)
def test_a_bad_figure_is_one_sentence(memory: str | int, message: str, tmp_path: Path) -> None:
    _, path = deep(tmp_path)
    with pytest.raises(BudgetError) as told:
        load(path, memory=memory)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_window_is_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"device='cuda' was asked for\."):
        load(tmp_path, device="cuda", memory="1GB")


def test_figures_by_hand() -> None:
    assert read_figure("1.5GB").bytes(7) == 1_500_000_000
    assert read_figure("0.5x@4k").bytes(7) == 3
    assert read_figure("0.5x@4k").context == 4096
    assert read_figure(12345).bytes(7) == 12345


def test_a_longer_context_needs_more(tmp_path: Path) -> None:
    _, path = deep(tmp_path, max_position_embeddings=4096)
    assert least(path, "1B@4k") > 2 * least(path, "1B@64")


def test_more_than_is_available_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = deep(tmp_path)
    made = make(path, tmp_path / "out", lambda site: INT4, prefer="regauge").path
    figure = least(path)
    monkeypatch.setattr(figures, "machine_memory", lambda: (10**9, 30_000))
    for folder in (path, made):
        with pytest.raises(BudgetError, match=r"30\.0 kB are available; give memory='24\.0kB' to keep only a window"):
            load(folder)
    with pytest.raises(BudgetError, match=r"30\.0 kB are available; give less"):
        load(path, memory=figure)


def test_a_scratch_file_needs_a_disk_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = deep(tmp_path)
    made = make(path, tmp_path / "out", lambda site: INT4, prefer="regauge").path
    figure = least(made)
    place = type("Place", (), {"mountpoint": str(tmp_path), "fstype": "tmpfs"})
    with monkeypatch.context() as patched:
        patched.setattr(disks.psutil, "disk_partitions", lambda all: [place])
        with pytest.raises(OutputError, match="kept in memory"):
            load(made, memory=figure)
    stat = type("Stat", (), {"f_bavail": 1, "f_frsize": 4096})
    with monkeypatch.context() as patched:
        patched.setattr(disks.os, "statvfs", lambda folder: stat)
        with pytest.raises(OutputError, match=r"needs .* of scratch space in .*, which has 4\.10 kB"):
            load(made, memory=figure)


def test_cgroups_of_both_versions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    monkeypatch.setattr(figures, "CGROUPS", root)
    monkeypatch.setattr(figures, "OWN", own)
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5000000")
    (inner / "memory.stat").write_text("inactive_file 0\n")
    (root / "a" / "memory.max").write_text("9000000\n")
    (root / "a" / "memory.current").write_text("5000000")
    (root / "a" / "memory.stat").write_text("inactive_file 1000000\nactive_file 500000\n")
    assert machine_memory() == (9_000_000, 5_500_000)
    old = root / "memory" / "c"
    old.mkdir(parents=True)
    own.write_text("4:cpu,memory:/c\n")
    (old / "memory.limit_in_bytes").write_text("8000000")
    (old / "memory.usage_in_bytes").write_text("9000000")
    (old / "memory.stat").write_text("total_inactive_file 2000000\n")
    assert machine_memory() == (8_000_000, 1_000_000)
    own.unlink()
    assert machine_memory()[0] > 8_000_000


# -- the figure, measured

MEASURED = """
import json, sys, threading, time
from pathlib import Path
import torch
from regauge.hosts.transformers.load import load

def resident():
    _, pages, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(pages) - int(shared)) * 4096

def run(model):
    prompt = torch.arange(200).remainder(251).view(1, -1)
    model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)

small, path, memory = sys.argv[1:]
run(load(small))  # libraries and thread pools are not the model's
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load(path, memory=int(memory))
run(model)
done.set()
watcher.join()
print(json.dumps([peak - before, model.regauge_window.report().resident_peak]))
"""


def measured(small: Path, path: Path, memory: int) -> list[int]:
    command = [sys.executable, "-c", MEASURED, str(small), str(path), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the kernel's count of anonymous pages")
@pytest.mark.parametrize("packed", [False, True])
def test_the_figure_is_never_passed(packed: bool, tmp_path: Path) -> None:
    """119M parameters in bf16, and the same with 4-bit blocks, in a bit more than the least figure."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048}
    changes = {**sizes, "head_dim": 64, "num_hidden_layers": 16, "vocab_size": 4000, "max_position_embeddings": 512}
    path = save(pico("llama", dtype=torch.bfloat16, **changes), tmp_path / "large")
    small = save(pico("llama", dtype=torch.bfloat16, vocab_size=251, max_position_embeddings=512), tmp_path / "small")
    if packed:
        small, path = (
            make(folder, tmp_path / f"{folder.name}-4", lambda site: INT4 if site.block is not None else None).path
            for folder in (small, path)
        )
    figure = least(path) * 11 // 10
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > figure * 1.2
    peak, told = measured(small, path, figure)
    assert 0.5 * figure < peak <= figure
    assert told <= peak + (1 << 20)
