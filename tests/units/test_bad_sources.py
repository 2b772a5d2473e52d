"""Bad models: each gives one clear sentence, found before weights are read wherever that can be."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from regauge.errors import CorruptWeights, ModelError, UnknownArchitecture, UnsafeWeights
from regauge.hosts.transformers.checkpoint import read_header
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.source import Source
from tests.checkpoints import WEIGHTS, edit, rewrite, shard
from tests.pico import FAMILIES, pico, save


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(pico("llama"), tmp_path / "llama")


@pytest.mark.parametrize("spelling", ["/nowhere/at/all", "./models/nothing", "no/such/model/here"])
def test_no_such_directory(spelling: str) -> None:
    with pytest.raises(ModelError, match="there is no directory"):
        Source.open(spelling)


def test_a_mistyped_directory_gets_a_hint(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'llama'\?"):
        Source.open(llama.parent / "lama")


def test_a_hub_id_without_a_network_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"no directory some-org/some-model; .* not in the local cache"):
        Source.open("some-org/some-model")
    assert time.monotonic() - start < 5


def hub_error(kind: str) -> Exception:
    import httpx2
    from huggingface_hub import errors

    request = httpx2.Request("GET", "https://hub.test/x")
    return getattr(errors, kind)("refused", response=httpx2.Response(403, request=request))  # type: ignore[no-any-return]  # an error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", r"is gated: accept its licence on its page, then log in"),
        ("RepositoryNotFoundError", r"no model 'some/model' on the hub, or it is private: then log in"),
        ("RevisionNotFoundError", r"has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=said):
        model_folder("some/model", "v2")


def test_a_hub_model_of_pickles_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (llama / WEIGHTS).unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(llama))
    with pytest.raises(UnsafeWeights, match=r"no weights in safetensors; pickled ones \(\.bin\) can run code"):
        model_folder("some/model")


def test_weights_that_are_a_link_to_nothing(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    (llama / WEIGHTS).symlink_to("nowhere.safetensors")
    with pytest.raises(ModelError, match=r"is a link that leads nowhere \(nowhere\.safetensors\)"):
        Source.open(llama)


def test_a_file_in_place_of_a_directory(llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the directory"):
        Source.open(llama / WEIGHTS)


def test_a_directory_without_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Source.open(llama)
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge it into its base model"):
        Source.open(llama)


def test_a_config_that_is_not_json_or_names_no_type(llama: Path) -> None:
    edit(llama, model_type=None)
    with pytest.raises(ModelError, match="names no model_type"):
        Source.open(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Source.open(llama)


def test_a_config_that_contradicts_itself(llama: Path) -> None:
    edit(llama, num_attention_heads=5)
    with pytest.raises(ModelError, match="transformers cannot read"):
        Source.open(llama)


def test_a_config_that_transformers_cannot_build(llama: Path) -> None:
    edit(llama, hidden_act="silo")
    with pytest.raises(ModelError, match=r"cannot build the model of .*config\.json \(KeyError"):
        Source.open(llama)


def test_an_unknown_architecture(llama: Path) -> None:
    edit(llama, model_type="mambo_of_a_kind")
    with pytest.raises(UnknownArchitecture, match=r"'mambo_of_a_kind'; to add one, copy llama\.yaml"):
        Source.open(llama)
    edit(llama, model_type="llama", architectures=["LlamaForCausalML"])
    with pytest.raises(UnknownArchitecture, match="did you mean 'LlamaForCausalLM'"):
        Source.open(llama)


def test_a_config_that_names_no_class_gets_a_language_model_or_an_encoder(tmp_path: Path) -> None:
    for name, wanted in (("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        folder = save(pico(name), tmp_path / name)
        edit(folder, architectures=None)
        assert type(Source.open(folder).model).__name__ == wanted


def test_a_file_that_may_not_be_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Permission denied"):
        Source.open(llama)


def test_pickle_weights_only(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    with pytest.raises(UnsafeWeights, match=r"only pytorch_model\.bin.*save_pretrained"):
        Source.open(llama)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="no weights"):
        Source.open(llama)


def test_remote_code(llama: Path) -> None:
    edit(llama, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(UnsafeWeights, match="code of its own"):
        Source.open(llama)


def test_a_source_that_is_quantised_already(llama: Path) -> None:
    edit(llama, quantization_config={"quant_method": "gptq", "bits": 4}, auto_map={"AutoConfig": "x.X"})
    with pytest.raises(ModelError, match=r"quantised already \(by gptq\)"):
        Source.open(llama)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file(llama: Path, left: int) -> None:
    whole = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(whole[:left])
    with pytest.raises(CorruptWeights, match="cut off in its header" if 0 <= left < 200 else "truncated.*promises"):
        Source.open(llama)


def test_a_file_with_a_tail(llama: Path) -> None:
    with (llama / WEIGHTS).open("ab") as file:
        file.write(b"tail")
    with pytest.raises(CorruptWeights, match="too long"):
        Source.open(llama)


@pytest.mark.parametrize("header", [b"[1, 2]  ", b"\xff\xfe{}    ", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_corrupt_header(llama: Path, header: bytes) -> None:
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CorruptWeights, match=r"header of .* is corrupt"):
        Source.open(llama)


def test_an_index_that_names_missing_files_or_tensors(llama: Path) -> None:
    index = shard(llama)
    (llama / "b.safetensors").rename(llama / "c.safetensors")
    with pytest.raises(CorruptWeights, match=r"names 2 files, and 1 of them are not there: b\.safetensors"):
        Source.open(llama)
    (llama / "c.safetensors").rename(llama / "b.safetensors")
    path = llama / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index | {"ghost": "a.safetensors"}}))
    with pytest.raises(CorruptWeights, match=r"ghost \(a\.safetensors\)"):
        Source.open(llama)
    for text, told in (
        ("[]", "is no mapping"),
        ("{}", "not an index of weights"),
        ('{"weight_map": 7}', "not an index"),
    ):
        path.write_text(text)
        with pytest.raises(CorruptWeights, match=told):
            Source.open(llama)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    folder = save(pico(name), tmp_path)
    lost = next(key for key in read_header(folder / WEIGHTS) if "1" in key and "weight" in key)
    rewrite(folder, lambda t: t.__delitem__(lost))
    with pytest.raises(CorruptWeights, match="do not belong together"):
        Source.open(folder)


def test_a_tensor_of_another_shape(llama: Path) -> None:
    edit(llama, intermediate_size=41)
    with pytest.raises(CorruptWeights, match=r"shape \[42, 37\], and the config asks for \[42, 41\]"):
        Source.open(llama)


def test_a_tokenizer_is_missing_only_when_it_is_asked_for(llama: Path) -> None:
    source = Source.open(llama)
    with pytest.raises(ModelError, match=r"has no tokenizer .*copy the tokenizer files"):
        source.tokenizer()
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        source.tokenizer()
