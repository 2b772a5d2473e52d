"""Resident memory of packed weights: what tensors hold, and what the process does."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from artifacts import choice, encode, make
from regauge import parts
from regauge.artifact.files import weight_bytes
from regauge.formats.base import Format
from regauge.hosts.transformers import install
from regauge.measure.cost import memory
from regauge.runtime.matrices import arena as arenas
from regauge.runtime.matrices.arena import ALIGNED, HUGE, Arena
from regauge.runtime.matrices.modules import PackedMatrix
from tests.pico import pico, save
from tests.units.test_packed import FORMS

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident memory is read from Linux's /proc")


@pytest.mark.parametrize("form", FORMS)
def test_tensors_hold_no_more_than_the_artifact_does(form: str) -> None:
    how, shape = FORMS[form], (256, 768)
    codes, fmt = (
        encode(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), how),
        parts.format_of(how.point),
    )
    held = sum(buffer.nbytes for buffer in PackedMatrix(codes, fmt, torch.bfloat16).buffers())
    stored = fmt.bytes(shape) + sum(term.bytes for term in codes.terms)
    assert held <= 1.03 * stored + 64 + wider(fmt, *shape)


def wider(fmt: Format, rows: int, columns: int) -> int:
    """Bytes by which two-level steps grow to float16, and values of code 0 to float32."""
    (groups, _), scale = fmt.grain.groups((rows, columns)), fmt.scale
    steps = groups * torch.float16.itemsize - scale.bytes(groups, rows) if scale.name.startswith("super") else 0
    lows = groups * torch.float32.itemsize - scale.low.bytes(groups, rows) if scale.low is not None else 0
    return steps + lows


def resident(tensor: torch.Tensor) -> dict[str, int]:
    """Bytes of the mapping that a tensor lies in, as the kernel counts them."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, _, stop = name.partition("-")
            inside = int(start, 16) <= tensor.data_ptr() < int(stop, 16)
            found = found | {"private": rest.split()[0][-1] == "p"} if inside else found
        elif inside and rest.split()[-1] == "kB":
            found[name[:-1]] = int(rest.split()[-2]) * 1024
    return found


def test_matrices_share_chunks_and_overlap_nowhere() -> None:
    arena = Arena()
    sizes = [1, 64, 65, 4097, 3 << 20, 0, 100]
    tensors = [arena.allocate(size) for size in sizes]
    for number, tensor in enumerate(tensors):
        assert len(tensor) == sizes[number]
        assert tensor.data_ptr() % ALIGNED == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert tensors[-1].data_ptr() - tensors[0].data_ptr() < (4 << 20)  # one chunk
    assert tensors[3].untyped_storage().nbytes() == 4097  # so that a copy is of the matrix, not of the chunk


def test_what_no_chunk_holds_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "CHUNK", 4096)
    arena = Arena()
    small, large, last = arena.allocate(4000), arena.allocate(10_000), arena.allocate(4000)
    for number, tensor in enumerate((small, large, last)):
        tensor.fill_(number + 1)
    assert [int(tensor.sum()) for tensor in (small, large, last)] == [4000, 20_000, 12_000]


@LINUX
def test_memory_is_private_trimmed_and_freed() -> None:
    """Shared memory, which Python maps unless it is told otherwise, has no huge pages."""
    arena = Arena()
    tensor = arena.allocate(HUGE + 5 * mmap.PAGESIZE).fill_(1)
    arena.trim()
    seen = resident(tensor)
    assert seen["private"]
    assert len(tensor) <= seen["Rss"] <= len(tensor) + 2 * mmap.PAGESIZE
    assert int(tensor.sum()) == len(tensor)
    address = tensor.data_ptr()
    del arena, tensor
    gc.collect()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, _, stop = line.partition(" ")[0].partition("-")
        assert not int(start, 16) <= address < int(stop, 16)


def test_a_loaded_model_keeps_nothing_of_its_loading(tmp_path: Path) -> None:
    from regauge.hosts.transformers.load import load

    made = make(save(pico("llama"), tmp_path / "source"), tmp_path / "out", lambda site: choice("int4"), "regauge")
    model = load(made.path)
    assert model not in install._loading


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_process_grows_by_the_packed_bytes(bits: int, tmp_path: Path) -> None:
    """200M weights; the kernel's count of a fresh process, less that of the same one without the model."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    model = pico("llama", **sizes, intermediate_size=4096, num_hidden_layers=10, vocab_size=16384)
    how = choice(f"int{bits}", "group:64", "bf16")
    source = save(model.to(torch.bfloat16), tmp_path / "source")
    made = make(source, tmp_path / "out", lambda site: how, "regauge")
    packed = weight_bytes(made.path)
    assert 0.99 * packed <= memory(made.path).anonymous <= 1.03 * packed
