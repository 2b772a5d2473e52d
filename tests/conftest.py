"""Shared fixtures: where the real models lie, and no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


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
