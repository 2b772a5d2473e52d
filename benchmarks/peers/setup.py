"""Installs the peers that are not dependencies of the project, each in an environment of its own.

    python benchmarks/peers/setup.py                # all: about twenty minutes, most of them compiling llama.cpp
    python benchmarks/peers/setup.py runtimes

`llama` stands alone and is compiled for this machine; so are llama-imatrix and llama-quantize of `imatrix`, built from
the source of llama.cpp that the same package carries. The others see the packages of the environment that runs this
(torch above all) and add their own, in other versions where they want those; pip says then what regauge itself would
want, which does not run there. A peer that is not installed is a row of the tables that says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / "out" / "bench" / "venvs"


@dataclass(frozen=True)
class Venv:
    """An environment: what is installed, whether it sees the packages of the one that makes it, what is built."""

    packages: tuple[str, ...]
    shares: bool = False
    tools: tuple[str, ...] = ()


LLAMA = "llama-cpp-python==0.3.36"
KNOWN = {
    "llama": Venv((LLAMA, "gguf==0.19.0")),
    "imatrix": Venv(("gguf==0.19.0", "tokenizers==0.23.3"), True, tools=("imatrix", "quantize")),
    "llmcompressor": Venv(("llmcompressor==0.14.0.1", "transformers==5.17.0", "torch==2.13.0"), True),
    "autoround": Venv(("auto-round==0.16.1", "transformers==5.23.0", "torch==2.13.0"), True),
    "runtimes": Venv(("torchao==0.18.0", "onnx==1.21.0", "onnxruntime==1.31.0", "openvino==2026.4.0"), True),
    "caches": Venv(("optimum-quanto==0.2.7", "hqq==0.2.8.post1", "transformers==5.23.0", "torch==2.13.0"), True),
    "grids": Venv(
        (
            "optimum-quanto==0.2.7",
            "hqq==0.2.8.post1",
            "torchao==0.18.0",
            "bitsandbytes==0.50.2",
            "transformers==5.23.0",
            "torch==2.13.0",
        ),
        True,
    ),
    "kvpress": Venv(("kvpress==0.5.5", "transformers==5.2.0", "torch==2.13.0"), True),
    "openvino": Venv(("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "numpy==2.4.6")),
    "suite": Venv(
        ("parameterized==0.9.0", "httpx==0.28.1", "timeout-decorator==0.5.0"), True
    ),  # what transformers' own tests import
}


def python(name: str) -> Path:
    """The interpreter of an environment, whether it is there or not."""
    return VENVS / name / "bin" / "python"


def tool(name: str) -> Path:
    """A program of llama.cpp, whether it is there or not."""
    return VENVS / "imatrix" / "build" / "bin" / f"llama-{name}"


def build(names: tuple[str, ...]) -> None:
    """Builds programs of llama.cpp from the source in llama-cpp-python's own archive, for this machine."""
    settings = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "GGML_NATIVE": "ON"}
    settings |= {f"LLAMA_{word}": "OFF" for word in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP")}
    settings |= {"LLAMA_BUILD_TOOLS": "ON", "LLAMA_OPENSSL": "OFF"}
    where = VENVS / "imatrix" / "build"
    with tempfile.TemporaryDirectory() as scratch:
        download = [str(python("imatrix")), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*download, "--no-binary", LLAMA.partition("=")[0], LLAMA], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source = next(Path(scratch).glob("*/vendor/llama.cpp"))
        options = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", str(source), "-B", str(where), *options], check=True)
        targets = [f"llama-{name}" for name in names]
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(where), "--parallel", jobs, "--target", *targets], check=True)


def make(name: str) -> None:
    """Makes one environment; what is installed already stays."""
    venv, where = KNOWN[name], VENVS / name
    if not python(name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
    if venv.shares:
        inside = where / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        line = f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n"
        (inside / "shared.pth").write_text(line, encoding="utf-8")
    environment = {"DISABLE_CUDA": "1", "CMAKE_ARGS": "-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-mno-amx-int8", **os.environ}
    command = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *venv.packages]
    subprocess.run(command, check=True, env=environment)
    if not all(tool(wanted).exists() for wanted in venv.tools):
        build(venv.tools)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("names", nargs="*", choices=[*KNOWN, []], help="all where none is named")
    for name in words.parse_args().names or KNOWN:
        print(f"{name}: {', '.join(KNOWN[name].packages)}", flush=True)
        make(name)


if __name__ == "__main__":
    main()
