"""torch.compile over packed layers, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regauge.runtime.matrices.modules import PackedMatrix
from regauge.runtime.rows import CUDA
from units.test_capabilities import encoded, formatted, tokens

pytestmark = pytest.mark.gpu


def compile_whole() -> None:
    """In a process of its own: the checks that tests run under are nothing that torch.compile can trace."""
    fmt, codes = formatted("int4", "group:32"), encoded("int4", "group:32")
    packed = PackedMatrix(codes, fmt, torch.float32, CUDA).to("cuda")
    x_TI = tokens(2, torch.float32).to("cuda")
    torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x_TI), packed(x_TI))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; triton's interpreter compiles nothing")
def test_a_packed_layer_is_compiled_whole(root: Path) -> None:
    paths = os.pathsep.join(map(str, (root, root / "tests", root / "src")))
    code = "from gpu import test_compiled; test_compiled.compile_whole(); print('whole')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
    assert done.stdout.split() == ["whole"], done.stderr
