"""The C++ library is found, forced, refused and missed as its environment variables say; one process a case."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regauge.kernels.cpu.library import ABI, FILE, LEVELS, available, library

CXX = shutil.which(os.environ.get("CXX", "c++"))

REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import regauge
    from regauge.kernels.cpu import library
    quiet = not library._opened and not seen
    try:
        answer = [library.level(), library.available(), library.level()]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
print(json.dumps({"quiet": quiet, "answer": answer, "warned": [[w.category.__name__, str(w.message)] for w in seen]}))
"""


def report(code: str = REPORT, **environment: str) -> dict[str, object]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REGAUGE_")}
    run = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(run, env=kept | environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> str:
    """REPORT, in a copy of the package without its library, in an environment where it was not installed."""
    folder = tmp_path_factory.mktemp("pure")
    source = Path(__file__).parents[2] / "src" / "regauge"
    shutil.copytree(source, folder / "regauge", ignore=shutil.ignore_patterns("native", "__pycache__", FILE))
    away = f"import sys, sysconfig; sys.path.insert(0, {str(folder)!r}); sys.meta_path[:] = sys.meta_path[-3:]\n"
    return away + f"sysconfig.get_path = lambda name: {str(folder / 'nowhere')!r}\n" + REPORT


@pytest.fixture(scope="module")
def missing(elsewhere: str) -> str:
    """The same, where no other folder is looked in."""
    found = "    from regauge.kernels.cpu import library\n"
    return elsewhere.replace(found, f"{found}    library._folders = lambda: []\n")


def compiled(folder: Path, body: str) -> str:
    """A library with `body` as its source."""
    if CXX is None:
        pytest.skip("needs a C++ compiler")
    (folder / "other.cpp").write_text(f'extern "C" {{ {body} }}')
    subprocess.run([CXX, "-shared", "-fPIC", "-o", str(folder / "other.so"), str(folder / "other.cpp")], check=True)
    return str(folder / "other.so")


@pytest.mark.skipif(CXX is None, reason="no C++ compiler: the library is not built")
def test_the_library_is_built_where_there_is_a_compiler() -> None:
    assert available() is (os.environ.get("REGAUGE_KERNELS") != "reference")


def test_it_opens_when_it_is_asked_for_and_not_before() -> None:
    found = report()
    assert found["quiet"] is True
    if available():
        level, here, again = found["answer"]  # type: ignore[misc]  # three values, or the case fails here
        assert level in LEVELS
        assert here is True
        assert again == level
        assert found["warned"] == []


def test_reference_leaves_the_library_alone_without_a_warning(missing: str) -> None:
    wanted = {"quiet": True, "answer": ["reference", False, "reference"], "warned": []}
    assert report(REGAUGE_KERNELS="reference") == wanted
    assert report(missing, REGAUGE_KERNELS="reference") == wanted


def test_a_missing_library_warns_once_and_says_what_to_do(missing: str) -> None:
    found = report(missing)
    assert found["answer"] == ["reference", False, "reference"]
    assert found["warned"] == [
        [
            "FallbackWarning",
            f"regauge computes with its slower reference in torch: {FILE} lies neither beside the package nor in a "
            "folder of sys.path: it was installed without a compiler, or into another environment. Install a C++17 "
            "compiler and install regauge again, or set REGAUGE_KERNELS=reference where this is meant.",
        ]
    ]


def test_a_library_in_another_environment_is_found(elsewhere: str) -> None:
    """An editable install that a .pth file shows to a second environment."""
    if not available():
        pytest.skip("the C++ kernels were not built here")
    found = report(elsewhere)
    assert found["warned"] == []
    assert found["answer"][1] is True  # type: ignore[index]


def test_a_level_cannot_be_forced_on_a_missing_library(missing: str) -> None:
    kind, message = report(missing, REGAUGE_KERNELS="portable")["answer"]  # type: ignore[misc]
    assert kind == "SettingError"
    assert message == (
        f"REGAUGE_KERNELS=portable cannot be had: {FILE} lies neither beside the package nor in a folder of sys.path: "
        "it was installed without a compiler, or into another environment; unset it, or set it to reference"
    )


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_known_to_the_library_and_forced_or_refused(level: str) -> None:
    kernels = library()
    if kernels is None:
        pytest.skip("no library here")
    answer = report(REGAUGE_KERNELS=level)["answer"]
    if answer[0] == "SettingError":  # type: ignore[index]
        best = report()["answer"][0]  # type: ignore[index]
        assert answer[1] == f"REGAUGE_KERNELS={level} cannot be had: this CPU lacks it; its best level is {best}"  # type: ignore[index]
        assert kernels.rg_set_level(level.encode()) == 2  # known, and not here: the level stays as it is
    else:
        assert answer == [level, True, level]
    assert kernels.rg_set_level(b"avx3") == 1


def test_the_portable_level_is_on_every_cpu() -> None:
    if library() is None:
        pytest.skip("no library here")
    assert report(REGAUGE_KERNELS="portable")["answer"] == ["portable", True, "portable"]


def test_an_unknown_level_gets_a_suggestion() -> None:
    kind, message = report(REGAUGE_KERNELS="avx521")["answer"]  # type: ignore[misc]
    assert kind == "SettingError"
    assert message == (
        "REGAUGE_KERNELS=avx521 is no level of the CPU kernels (did you mean 'avx512'?); unset, the best is taken"
    )


def test_a_named_library_is_opened_or_it_is_an_error(tmp_path: Path) -> None:
    nothing = str(tmp_path / "none.so")
    kind, message = report(REGAUGE_LIBRARY=nothing)["answer"]  # type: ignore[misc]
    assert kind == "SettingError"
    assert message.startswith(f"REGAUGE_LIBRARY={nothing} cannot be used: {nothing} does not open as the C++ kernels (")


def test_a_library_of_another_interface_is_refused(tmp_path: Path) -> None:
    other = compiled(tmp_path, f"int rg_abi() {{ return {ABI + 1}; }}")
    assert report(REGAUGE_LIBRARY=other)["answer"] == [
        "SettingError",
        f"REGAUGE_LIBRARY={other} cannot be used: {other} has interface {ABI + 1} where this version of regauge "
        f"needs {ABI}",
    ]


def test_a_library_without_the_interface_is_refused(tmp_path: Path) -> None:
    other = compiled(tmp_path, "int something() { return 1; }")
    kind, message = report(REGAUGE_LIBRARY=other)["answer"]  # type: ignore[misc]
    assert kind == "SettingError"
    assert f"{other} does not open as the C++ kernels (" in message
    assert "rg_abi" in message
