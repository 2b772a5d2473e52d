"""Artifacts of format version 1 load, and compute to the bit what they computed when they were written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regauge.artifact.receipt import Receipt
from regauge.kernels.cpu.library import available, level

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "fixtures" / "v1"
NAMES = sorted(path.name for path in OLD.iterdir() if path.is_dir())
SAME = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
"""torch and its libraries choose kernels by CPU: these hold them to one choice, that of when the logits were kept."""
ANOTHER_ORDER = ".decode"
"""Attention of the native step adds up by pieces of time since it reads packed caches, and some of these were decoded
by transformers' modules then: sums run in another order now, and inputs on an edge between two codes fall otherwise."""

SAME_MAKER = "GenuineIntel"
"""Whose CPU kept the logits: torch's own products add up in another order on another maker's."""
MISREAD = "w4g32-fused-compressed.decode"
"""The step of then turned another share of each head than the model's own code does: what was kept is wrong by 2.0."""


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_logits_are_those_of_then(kernels: str, tmp_path: Path) -> None:
    if (
        "AVX2" not in torch.backends.cpu.get_cpu_capability()
        and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    ):
        pytest.skip("the logits were kept on a CPU with AVX2")
    if kernels == "native" and not available():
        pytest.skip("the C++ kernels were not built here")
    chosen = kernels if kernels == "reference" else "vnni" if level() == "vnni" else "avx2"
    env = os.environ | SAME | {"REGAUGE_KERNELS": chosen, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    out = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, str(ROOT / "tests" / "compute_old.py"), str(OLD), str(out)], check=True, env=env)
    kept, found = load_file(OLD / f"logits-{chosen}.safetensors"), load_file(out)
    assert sorted(found) == sorted(kept) == sorted(f"{name}.{how}" for name in NAMES for how in ("decode", "prefill"))
    for name, logits in kept.items():
        if name == MISREAD and kernels == "native":
            prefill = kept[name.replace("decode", "prefill")][:1]
            torch.testing.assert_close(found[name], prefill, rtol=2e-3, atol=2e-3, msg=name)
        elif name.endswith(ANOTHER_ORDER) and kernels == "native":
            # a small float that falls to the other side of a tie is another by an eighth
            near = 6e-3 if name.startswith("zeroquant-fp") else 3e-3
            assert (found[name] - logits).norm() < near * logits.norm(), name
        elif maker() == SAME_MAKER:
            assert torch.equal(found[name], logits), f"{name}: {(found[name] - logits).abs().max()}"
        else:
            assert (found[name] - logits).norm() < 1e-5 * logits.norm(), name


def maker() -> str:
    """Who made this CPU, as Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


@pytest.mark.parametrize("name", NAMES)
def test_receipts_of_then_are_read(name: str) -> None:
    found = Receipt.model_validate_json((OLD / name / "regauge" / "receipt.json").read_text())
    assert found.sites
    assert found.sites[0].name == "embed"
