"""The GPU kernels where there is no GPU: the cases of tests/gpu under triton's interpreter, and compiled for GPUs.

Whether triton interprets is settled when it is first imported, so each runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install regauge[gpu]"
)
KERNELS = {"attend", "bytes", "combine", "dequantise", "fp8", "linear", "packed", "vectors"}


SOME = "generation or plain_checkpoint or nf4 or w8a8 or simulated"
"""Enough of the loaded models for every day; the others take half a minute."""
SLOWEST = "decodes_by_the_codes"
"""A model whose attention the interpreter computes."""
KERNELS_ALONE = ("linear", "refusals", "integers", "floats", "cached")
EVERY_DAY = f"({' or '.join((*(f'test_triton_{name}' for name in KERNELS_ALONE), SOME))}) and not {SLOWEST}"
GROUPS = [  # one process a group: most of a short group is its imports
    pytest.param(
        (*KERNELS_ALONE, "capabilities", "load"), EVERY_DAY, id="every kernel, some models", marks=pytest.mark.long
    ),
    pytest.param(
        ("cached", "capabilities", "load"),
        f"not ({EVERY_DAY})",
        id="all other models",
        marks=[pytest.mark.slow, pytest.mark.telling],
    ),
]


def child(root: Path, cache: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs python; kernels compiled there are kept in `cache`, not in the user's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    paths = os.pathsep.join((str(root), str(root / "tests")))
    settings = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=inherited | settings | environment, cwd=root, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.parametrize(("group", "some"), GROUPS)
def test_under_the_interpreter(group: tuple[str, ...], some: str, root: Path, tmp_path: Path) -> None:
    files = [f"tests/gpu/test_triton_{name}.py" for name in group]
    options = ("-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "--tb=short", "-rs", "-k", some)
    done = child(root, tmp_path, "-m", "pytest", *files, *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" not in done.stdout


@needs_triton
@pytest.mark.long
def test_every_kernel_compiles(root: Path, tmp_path: Path) -> None:
    done = child(root, tmp_path, "-m", "gpu.compiling", "--brief", "sm_90")
    assert done.returncode == 0, done.stderr
    assert {line.split()[1].rstrip(":") for line in done.stdout.splitlines()} == KERNELS


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_compiles(target: str, root: Path, tmp_path: Path) -> None:
    done = child(root, tmp_path, "-m", "gpu.compiling", target)
    assert done.returncode == 0, done.stderr
    assert {line.split()[1].rstrip(":") for line in done.stdout.splitlines()} == KERNELS


@needs_triton
def test_a_cpu_is_told_what_to_use(root: Path, tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from regauge.errors import RegaugeError\n"
        "from regauge.kernels import triton\n"
        "w = torch.zeros(5, 32, dtype=torch.uint8)\n"
        "try:\n"
        "    triton.linear(torch.ones(2, 64), w, 4, torch.ones(5, 1))\n"
        "except RegaugeError as error:\n"
        "    print(error)\n"
    )
    done = child(root, tmp_path, "-c", code)
    told = "the GPU kernels take CUDA tensors, not cpu ones; on a CPU use regauge.kernels.reference"
    assert done.stdout.strip() == told, done.stderr


def test_without_triton(root: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import regauge.kernels.triton"
    done = child(root, tmp_path, "-c", code)
    told = "ImportError: regauge.kernels.triton needs triton; install it with: pip install 'regauge[gpu]'"
    assert done.stderr.strip().splitlines()[-1] == told


def test_triton_is_imported_only_when_asked_for(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, regauge, regauge.kernels\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
        "import regauge.kernels.reference, regauge.runtime.matrices.modules\n"
        "assert 'triton' not in sys.modules\n"
        "import torch\n"
        "assert not hasattr(torch.ops.regauge_triton, 'linear')\n"
    )
    done = child(root, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_benchmark_without_a_gpu(root: Path, tmp_path: Path) -> None:
    done = child(root, tmp_path, "benchmarks/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not done.stdout


@needs_triton
@pytest.mark.long
def test_the_contests_of_the_benchmark_are_fair(root: Path, tmp_path: Path) -> None:
    """Small shapes under the interpreter: our products, and those peers that run on a CPU, are right."""
    shapes = ("--rows", "48", "--columns", "256", "--tokens", "3", "--context", "64", "--batch", "2")
    done = child(root, tmp_path, "benchmarks/gpu.py", "--check", *shapes, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong" not in done.stdout
    ours = [line for line in done.stdout.splitlines() if " regauge " in line]
    assert len(ours) == 14
    assert all(line.endswith(" right") for line in ours)
