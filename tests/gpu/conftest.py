"""Where these tests run: on a CUDA device, or on the CPU under triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install regauge[gpu]")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where operands lie."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs these kernels on a CPU")
    return torch.device("cuda")
