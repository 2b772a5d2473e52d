"""The one reader of safetensors headers: whatever a file holds, it is read right or refused by an `ArtifactError`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as stock

from regauge.artifact import files
from regauge.errors import ArtifactError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.scale": torch.ones(2, 1, dtype=torch.bfloat16),
    "codes": torch.arange(7, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "alone": torch.tensor(3, dtype=torch.int64),
}
QUIET = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int(struct.unpack("<Q", data[:8])[0])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, head: object, tail: bytes) -> None:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + tail)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    files.write(tmp_path / "x.safetensors", TENSORS)
    return tmp_path / "x.safetensors"


def read_or_refuse(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return files.read(path)
    except ArtifactError as error:
        told = str(error)
    assert str(path) in told
    return None


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-8, 64), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@QUIET
@given(
    st.sampled_from(sorted(TENSORS)),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.one_of(JSON, st.lists(NUMBERS, max_size=4)),
)
def test_any_field_of_any_tensor(path: Path, name: str, field: str, value: object) -> None:
    files.write(path, TENSORS)
    head, tail = parts(path)
    was = head[name][field]
    head[name][field] = value
    put(path, head, tail)
    found = read_or_refuse(path)
    if found is not None and value != was:  # another shape of as many numbers, or another dtype as wide
        assert found[name].numel() * found[name].element_size() == TENSORS[name].numel() * TENSORS[name].element_size()
        assert all(torch.equal(found[other], TENSORS[other]) for other in TENSORS if other != name)


@QUIET
@given(JSON)
def test_any_json_for_a_header(path: Path, head: object) -> None:
    put(path, head, b"")
    assert read_or_refuse(path) in (None, {})


@QUIET
@given(st.data())
def test_any_byte_changed_cut_or_added(path: Path, data: st.DataObject) -> None:
    """Wherever our reader takes a file, the stock one takes it too, and both read the same."""
    files.write(path, TENSORS)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "add"]))
        if kind == "change":
            whole[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del whole[at : at + data.draw(st.integers(1, 9))]
        else:
            whole[at:at] = data.draw(st.binary(max_size=9))
        if not whole:
            whole = bytearray(b"\0")
    path.write_bytes(bytes(whole))
    found = read_or_refuse(path)
    if found is not None:
        other = stock(bytes(whole))
        assert found.keys() == other.keys()
        for name, tensor in found.items():
            assert tensor.dtype == other[name].dtype
            assert (
                tensor.contiguous()
                .view(-1)
                .view(torch.uint8)
                .equal(other[name].contiguous().view(-1).view(torch.uint8))
            )


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "it is a list, not a mapping"),
    "no entry": ({"x": 3}, "is not dtype, shape and data_offsets"),
    "a field too many": ({"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1], "more": 1}}, "is not dtype"),
    "an unknown dtype": ({"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}}, "dtype 'F3', which is not read"),
    "a negative shape": ({"x": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, "no short list of counts"),
    "a true shape": ({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, "no short list of counts"),
    "a shape of axes": ({"x": {"dtype": "U8", "shape": [1] * 17, "data_offsets": [0, 1]}}, "no short list of counts"),
    "negative offsets": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, "no short list of counts"),
    "one offset": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1]}}, "has 1 data_offsets"),
    "offsets that turn back": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, "contradict"),
    "a gap": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "begins at 1 where the tensor before"),
    "shared bytes": (
        {n: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for n in ("x", "y")},
        "begins at 0 where the tensor before it ends at 1",
    ),
    "a name twice": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "something twice",
    ),
    "nesting without end": (b"[" * 100_000, "is corrupt"),
}


STRICTER = ("a field too many", "a shape of axes", "a name twice")
"""What the stock reader takes and ours does not."""


@pytest.mark.parametrize("what", BAD)
def test_each_known_way_to_be_wrong(what: str, path: Path) -> None:
    head, message = BAD[what]
    put(path, head, b"\0")
    with pytest.raises(ArtifactError) as caught:
        files.header(path)
    assert message in str(caught.value)
    if what not in STRICTER:
        with pytest.raises(SafetensorError):
            stock(path.read_bytes())


def test_a_header_longer_than_the_format_allows(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", files.MOST + 1) + b"{}")
    with open(path, "r+b") as file:
        file.truncate(files.MOST + 100)
    with pytest.raises(ArtifactError, match="cut off in its header"):
        files.header(path)
