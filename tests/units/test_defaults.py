"""No default of the process decides what we compute: every tensor names its dtype and device, and none is set."""

from __future__ import annotations

import ast
import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import regauge as rg
from pico import pico, save
from regauge.hosts.precise import precise

SOURCE = Path(rg.__file__).parent
MAKING = {
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
    "arange",
    "linspace",
    "eye",
}
SETTING = {"set_default_dtype", "set_default_device", "set_default_tensor_type", "manual_seed", "seed", "set_rng_state"}


@functools.cache
def calls() -> list[tuple[str, str, set[str | None]]]:
    """Where torch is called in src, by what name and with which keywords."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "torch":
                    where = f"{path.relative_to(SOURCE)}:{node.lineno}"
                    found.append((where, node.func.attr, {keyword.arg for keyword in node.keywords}))
    return found


def test_every_tensor_names_its_dtype_and_its_device() -> None:
    seen = [(where, name, words) for where, name, words in calls() if name in MAKING]
    assert len(seen) > 80
    assert not [where for where, _, words in seen if not {"dtype", "device"} <= words]


def test_nothing_of_the_process_is_set() -> None:
    assert not [where for where, name, _ in calls() if name in SETTING]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defaults")
    rg.apply("nf4", save(pico("llama"), folder / "source"), folder / "out")
    return folder


@pytest.fixture
def default() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


IDS = torch.arange(7)[None]


def tokens(model: object) -> list[int]:
    found = model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[attr-defined]
    return found[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_changes_no_byte_and_no_token(
    dtype: torch.dtype, artifact: Path, tmp_path: Path, default: None
) -> None:
    wanted = tokens(rg.load(artifact / "out"))
    loaded = rg.load(artifact / "out")
    torch.set_default_dtype(dtype)
    assert tokens(loaded) == wanted
    assert tokens(rg.load(artifact / "out")) == wanted
    rg.apply("nf4", artifact / "source", tmp_path / "out")
    shards = [sorted(folder.glob("*.safetensors")) for folder in (artifact / "out", tmp_path / "out")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


def test_another_default_device_changes_no_token(artifact: Path, default: None) -> None:
    wanted = tokens(rg.load(artifact / "out"))
    with torch.device("meta"):
        loaded = rg.load(artifact / "out")
    assert tokens(loaded) == wanted


def test_float64_is_of_one_thread_and_of_what_nobody_asked_for(default: None) -> None:
    other: list[torch.dtype] = []
    with precise():
        thread = threading.Thread(target=lambda: other.append(torch.ones(1).dtype))
        thread.start()
        thread.join()
        assert torch.ones(2).dtype == torch.tensor([0.1]).dtype == torch.arange(0.0, 1.0, 0.5).dtype == torch.float64
        assert torch.tensor([0.1]).item() == 0.1
        assert (torch.arange(3) / 3)[1].item() == 1 / 3
        assert torch.ones(1, dtype=torch.float32).dtype == torch.randn(1).dtype == torch.float64
        assert torch.arange(3).dtype == (torch.arange(3) * 2).dtype == torch.int64
    assert other == [torch.float32]
    assert torch.ones(1).dtype == torch.float32
