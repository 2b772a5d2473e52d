"""Staging: what a kill, a full disk, another run or another identity leaves behind."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regauge.artifact import files
from regauge.artifact.disk import check_disk, one_sentence
from regauge.artifact.identity import differences
from regauge.artifact.ownership import LOCK, search_folder
from regauge.artifact.staging import Staging
from regauge.errors import ArtifactError, ModelError, OutputError, ResumeError, TextError

IDENTITY = {"plan": "a" * 64, "seed": 0, "versions": {"torch": "2.13"}}
SHARD = "model-00001-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(7, dtype=torch.uint8),
        "a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "c": torch.tensor([[1.5], [2.5]]).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def test_the_library_reads_what_we_write_and_we_read_it_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = files.write(path, tensors())
    assert files.sha256(path) == digest
    for found in (load_file(path), files.read(path)):
        assert found.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
    assert files.write(tmp_path / "y", dict(reversed(tensors().items()))) == digest  # the order given changes nothing


def test_a_truncated_or_corrupt_file_is_found_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, tensors())
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match=r"truncated|safetensors"):
            files.header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ArtifactError, match="not what was written"):
        files.header(path)
    path.write_bytes(whole.replace(b'"shape":[7]', b'"shape":[8]'))
    with pytest.raises(ArtifactError, match="contradict"):
        files.header(path)


def test_a_finished_run_leaves_the_artifact_and_nothing_else(tmp_path: Path) -> None:
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    with Staging(tmp_path / "out", IDENTITY) as staging:
        assert not staging.resumed
        assert staging.write(SHARD, tensors(), note={"sites": 1}) == 7 + 30 + 2 + 0 + 24
        staging.keep("states", {"h": torch.ones(2)})
        assert staging.notes[SHARD] == {"sites": 1}
        assert staging.index()["metadata"] == {"total_size": 63}
        staging.finish({"config.json": "{}", "regauge/receipt.json": b"{}", "tokenizer.json": extra})
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["config.json", SHARD, "regauge/manifest.json", "regauge/receipt.json", "tokenizer.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer.json"]


def hopeless(out: Path) -> None:
    with Staging(out, IDENTITY) as staging:
        staging.write(SHARD, tensors())
        (staging.root / LOCK).unlink()  # by somebody else
        raise ModelError("hopeless")


def test_a_hopeless_run_leaves_nothing_though_somebody_took_its_lock(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hopeless"):
        hopeless(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as first:
        first.write(SHARD, tensors(), note={"sites": 1})
        first.keep("states", {"h": torch.ones(2)})
        (first.root / ".tmp-half").write_bytes(b"half a shard")
    with Staging(tmp_path / "out", IDENTITY) as second:
        assert second.resumed
        assert second.has(SHARD)
        assert not second.has("model-00002-of-00002.safetensors")
        assert second.notes[SHARD] == {"sites": 1}
        kept = second.kept("states")
        assert kept is not None
        assert kept["h"].equal(torch.ones(2))
        assert second.kept("other") is None
        assert not (second.root / ".tmp-half").exists()
        assert second.read(SHARD)["b"].equal(tensors()["b"])
        second.drop("states")
        assert second.kept("states") is None


def test_a_shard_that_changed_on_disk_is_written_again(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as first:
        first.write(SHARD, tensors())
    path = tmp_path / "out.partial" / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with Staging(tmp_path / "out", IDENTITY) as second:
        assert not second.has(SHARD)
        second.write(SHARD, tensors())
        assert second.has(SHARD)


def test_another_identity_is_refused_and_named(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as first:
        first.write(SHARD, tensors())
    other = {"plan": "b" * 64, "seed": 0, "versions": {"torch": "2.14"}}
    with pytest.raises(ResumeError, match=r"plan \(was aaaaaaaaaaaa…, now bbbbbbbbbbbb…\), versions.torch"):
        Staging(tmp_path / "out", other)
    assert (tmp_path / "out.partial" / SHARD).exists()  # nothing lost
    with Staging(tmp_path / "out", other, force=True) as begun:
        assert not begun.resumed
        assert not begun.has(SHARD)
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "d": 3}) == [
        "c (was 2, now None)",
        "d (was None, now 3)",
    ]


def test_an_unreadable_manifest_is_no_licence_to_go_on(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as first:
        first.write(SHARD, tensors())
    (tmp_path / "out.partial" / "manifest.json").write_text("{")
    with pytest.raises(ResumeError, match="manifest"):
        Staging(tmp_path / "out", IDENTITY)


def test_an_output_that_exists_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="exists"):
        Staging(tmp_path / "out", IDENTITY)
    with pytest.raises(OutputError, match="not made by regauge"):
        Staging(tmp_path / "out", IDENTITY, force=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert not (tmp_path / "out.partial").exists()


def test_force_keeps_the_old_artifact_until_the_new_one_is_whole(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as first:
        first.finish({"regauge/receipt.json": "old"})
    with Staging(tmp_path / "out", {**IDENTITY, "seed": 1}, force=True) as second:
        second.write(SHARD, tensors())
        assert (tmp_path / "out" / "regauge" / "receipt.json").read_text() == "old"
        second.finish({"regauge/receipt.json": "new"})
    assert (tmp_path / "out" / "regauge" / "receipt.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as staging:
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputError, match="exists"):
            staging.finish({"config.json": "{}"})
    assert (tmp_path / "out.partial" / "manifest.json").exists()


def test_two_runs_at_once_on_one_output(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY):
        with pytest.raises(OutputError, match="another run"):
            Staging(tmp_path / "out", IDENTITY)
        with pytest.raises(OutputError, match="another run"):
            Staging(tmp_path / "out", IDENTITY, force=True)
    Staging(tmp_path / "out", IDENTITY).close()


def test_a_full_disk_is_one_sentence_and_the_output_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.write(SHARD, tensors())
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"the disk is full.*run the same command again"):
            staging.write("model-00002-of-00002.safetensors", tensors())
        monkeypatch.undo()
        assert not list(staging.root.glob(".tmp*"))
    with Staging(tmp_path / "out", IDENTITY) as staging:
        assert staging.has(SHARD)
        assert not staging.has("model-00002-of-00002.safetensors")


def test_a_really_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is a Linux device")
    with pytest.raises(OutputError, match="the disk is full"), one_sentence("writing", tmp_path / "x"):
        files.write(Path("/dev/full"), {"a": torch.zeros(1 << 16)})


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/regauge-cannot-write-here/out")
    else:
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
        target = locked / "out"
    with pytest.raises(OutputError, match=r"making .* failed"):
        Staging(target, IDENTITY)


def test_the_disk_is_checked_against_the_estimate(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(OutputError, match="free some space"):
        check_disk(tmp_path / "out", 1 << 60)


def test_the_manifest_is_json_with_every_hash(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.write(SHARD, tensors())
        manifest = json.loads((staging.root / "manifest.json").read_text())
        assert manifest["identity"] == IDENTITY
        assert manifest["shards"][SHARD]["sha256"] == files.sha256(staging.root / SHARD)


def theirs(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    return path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("beside", ["out.partial/thesis.txt", "out.partial/regauge/thesis.txt", "out.partial/a/b/c"])
def test_a_partial_output_that_is_not_ours_is_left_alone(beside: str, force: bool, tmp_path: Path) -> None:
    path = theirs(tmp_path / beside)
    with pytest.raises(OutputError, match="no output of regauge in the making"):
        Staging(tmp_path / "out", IDENTITY, force)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_link_in_place_of_a_partial_output_is_not_followed(tmp_path: Path) -> None:
    path = theirs(tmp_path / "home" / "thesis.txt")
    (tmp_path / "out.partial").symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match="no output of regauge in the making"):
        Staging(tmp_path / "out", IDENTITY)
    assert path.exists()


@pytest.mark.parametrize("holds", ["regauge/notes", "regauge/receipt.json", "thesis.txt"])
def test_force_replaces_nothing_that_regauge_did_not_make(holds: str, tmp_path: Path) -> None:
    path = theirs(tmp_path / "out" / holds)
    with pytest.raises(OutputError, match="was not made by regauge"):
        Staging(tmp_path / "out", IDENTITY, force=True)
    assert path.read_text(encoding="utf-8") == "mine"


def test_force_keeps_a_users_file_inside_an_artifact(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.finish({"regauge/receipt.json": "{}"})
    (tmp_path / "out" / "regauge" / "report.html").write_text("ours", encoding="utf-8")
    with Staging(tmp_path / "out", IDENTITY, force=True) as staging:
        staging.finish({"regauge/receipt.json": "{}"})
    path = theirs(tmp_path / "out" / "notes.txt")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which regauge did not write"):
        Staging(tmp_path / "out", IDENTITY, force=True)
    assert path.exists()


def test_a_directory_of_the_name_that_the_old_one_gets_is_left_alone(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.finish({"regauge/receipt.json": "{}"})
    path = theirs(tmp_path / "out.replaced" / "thesis.txt")
    with pytest.raises(OutputError, match="was not made by regauge"):
        Staging(tmp_path / "out", IDENTITY, force=True)
    assert path.exists()


def test_a_partial_output_of_ours_with_a_users_file_is_not_emptied(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.write(SHARD, tensors())
    path = theirs(tmp_path / "out.partial" / "thesis.txt")
    with pytest.raises(OutputError, match=r"holds thesis\.txt, which regauge did not write, so it is not emptied"):
        Staging(tmp_path / "out", {**IDENTITY, "seed": 1}, force=True)
    assert path.exists()
    with (
        Staging(tmp_path / "out", IDENTITY) as staging,
        pytest.raises(OutputError, match=r"thesis\.txt is not regauge's"),
    ):
        staging.finish({"config.json": "{}"})
    assert path.exists()
    with pytest.raises(TextError), Staging(tmp_path / "out", IDENTITY):
        raise TextError("hopeless")
    assert path.exists()


def test_killed_between_the_two_renames_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old OUT lies aside and the new one is whole: the same command puts it in its place."""
    with Staging(tmp_path / "out", IDENTITY) as staging:
        staging.finish({"regauge/receipt.json": "old"})
    real = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(source).name == "out.partial":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("os.replace", die)
    with Staging(tmp_path / "out", {"seed": 1}, force=True) as staging:
        staging.write(SHARD, tensors())
        with pytest.raises(KeyboardInterrupt):
            staging.finish({"regauge/receipt.json": "new"})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.replaced"]
    with Staging(tmp_path / "out", {"seed": 1}, force=True) as staging:
        assert staging.has(SHARD)
        staging.finish({"regauge/receipt.json": "new"})
    assert (tmp_path / "out" / "regauge" / "receipt.json").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_is_made_by_one_run_whichever_way(tmp_path: Path) -> None:
    with search_folder(tmp_path / "out"):
        with pytest.raises(OutputError, match="another run is making"):
            Staging(tmp_path / "out", IDENTITY)
        with pytest.raises(OutputError, match="another run is writing"), search_folder(tmp_path / "out"):
            pass
    assert not (tmp_path / "out.search").exists()
    with (
        Staging(tmp_path / "out", IDENTITY),
        pytest.raises(OutputError, match="another run is making"),
        search_folder(tmp_path / "out"),
    ):
        pass
    path = theirs(tmp_path / "new.search" / "thesis.txt")
    with pytest.raises(OutputError, match="not a search of ours"), search_folder(tmp_path / "new"):
        pass
    assert path.exists()
