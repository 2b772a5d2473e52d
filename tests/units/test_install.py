"""What `pip` makes of the package with a compiler and without one, installed into an environment of its own.

The package index must be in reach: a build fetches its back end. That environment sees the dependencies of this one,
and nothing else of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from regauge.kernels.cpu.library import FILE, LEVELS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "c++"))

USE = """
import sys, warnings
import torch, regauge as rg
from regauge.kernels.cpu.library import level
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    rg.apply("rtn-w4g32", sys.argv[1], out="OUT")
    model = rg.load("OUT")
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()
    said = level()
assert sys.argv[2] in rg.__file__, rg.__file__
print(said, sum(w.category is rg.errors.FallbackWarning for w in seen))
"""


def wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of the sources, so that a build folder of the clone is neither used nor changed."""
    copy = folder / "copy"
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        copy.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", FILE))
    run = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def use(made: Path, folder: Path, bundled: Path) -> list[str]:
    """The level that computed, and how often it was said that it is the reference."""
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(made)], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    # a path only: its own .pth files do not run; without our own kernels, which would be found there
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("regauge"):
            (borrowed / entry.name).symlink_to(entry)
    Path(site, "borrowed.pth").write_text(str(borrowed), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REGAUGE_", "PYTHON"))}
    run = [python, "-c", USE, str(bundled), str(environment)]
    done = subprocess.run(run, env=kept, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-2:]


def compiled(made: Path) -> list[str]:
    """What is in it beside Python and data: libraries, and the sources that they are made of."""
    with ZipFile(made) as archive:
        return [name for name in archive.namelist() if name.endswith((".so", ".dylib", ".cpp", ".h"))]


@pytest.mark.telling
def test_without_a_compiler_it_installs_as_pure_python_and_works(tmp_path: Path, bundled: Path) -> None:
    made = wheel(tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert made.name.endswith("-py3-none-any.whl")
    assert compiled(made) == []
    assert use(made, tmp_path, bundled) == ["reference", "1"]


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_with_a_compiler_one_wheel_serves_every_python_of_the_platform(tmp_path: Path, bundled: Path) -> None:
    made = wheel(tmp_path, CMAKE_ARGS="-DREGAUGE_OPTIMISE=-O0")  # unoptimised: in a minute, not in three
    assert "-py3-none-" in made.name
    assert "-any" not in made.name
    assert compiled(made) == [f"regauge/kernels/cpu/{FILE}"]
    level, warned = use(made, tmp_path, bundled)
    assert level in LEVELS
    assert warned == "0"
