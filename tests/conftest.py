"""Shared fixtures: where the real models lie, and no network. Annotations of regauge are checked from here on."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import typecheck

typecheck.install()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first: those that two workers began last would have one of them wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays, so that no collection of garbage need look at its million objects again."""
    import hypothesis  # looks for those who hold a source of randomness, which is not seen of what is frozen

    assert hypothesis
    if any(hypothesis.is_hypothesis_test(getattr(item, "obj", None)) for item in session.items):
        read_constants()
    gc.collect()
    gc.freeze()


def read_constants() -> None:
    """Hypothesis tries numbers that the code itself names, and parses all modules for them in the middle of a draw:
    longer than the second that it lets a draw take (2.5 s of CPU time). So that is done before any test."""
    from hypothesis.internal.conjecture import providers

    providers._get_local_constants()


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """Only what happens when the power fails would show whether a disk has written; each wait is milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # a handle that is closed is still an error
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and data beside the checkout; the test skips where they are absent."""
    path = ROOT.parent / "shared"
    if not (path / "ASSETS.md").exists():
        pytest.skip("real models and data (../shared) are not on this machine")
    return path


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled code model."""
    path = ROOT / "bundled" / "code-llama-5m"
    if not (path / "config.json").exists():
        pytest.skip("the bundled model is not in this checkout")
    return path
