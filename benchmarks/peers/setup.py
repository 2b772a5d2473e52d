"""Installs the peers that are not dependencies of the project, each in an environment of its own.

    python benchmarks/peers/setup.py                # all: about ten minutes, most of them compiling llama.cpp
    python benchmarks/peers/setup.py runtimes

`llama` stands alone and is compiled for this machine. `runtimes` sees the packages of the environment that runs this
(torch above all) and adds its own. A peer that is not installed is a row of the tables that says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / "out" / "bench" / "venvs"


@dataclass(frozen=True)
class Venv:
    """An environment: what is installed, and whether it sees the packages of the one that makes it."""

    packages: tuple[str, ...]
    shares: bool = False


KNOWN = {
    "llama": Venv(("llama-cpp-python==0.3.36", "gguf==0.19.0")),
    "runtimes": Venv(("torchao==0.18.0", "onnx==1.21.0", "onnxruntime==1.31.0", "openvino==2026.4.0"), True),
    "suite": Venv(
        ("parameterized==0.9.0", "httpx==0.28.1", "timeout-decorator==0.5.0"), True
    ),  # what transformers' own tests import
}


def python(name: str) -> Path:
    """The interpreter of an environment, whether it is there or not."""
    return VENVS / name / "bin" / "python"


def make(name: str) -> None:
    """Makes one environment; what is installed already stays."""
    venv, where = KNOWN[name], VENVS / name
    if not python(name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
    if venv.shares:
        inside = where / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (inside / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = os.environ | {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON")}
    command = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *venv.packages]
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("names", nargs="*", choices=[*KNOWN, []], help="all where none is named")
    for name in words.parse_args().names or KNOWN:
        print(f"{name}: {', '.join(KNOWN[name].packages)}", flush=True)
        make(name)


if __name__ == "__main__":
    main()
