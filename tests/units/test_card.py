"""The model card: front matter that hubs read, the same bytes from the same run, and no markup of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from regauge.artifact.card import base_model, card, licence
from regauge.artifact.ownership import is_artifact, strangers
from regauge.engine import apply
from tests import tiny
from tests.units.test_report import NASTY, a_receipt, a_site

CAUSAL = {"architectures": ["LlamaForCausalLM"]}


def front(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_every_artifact_has_a_card_that_is_its_own(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "source", "llama")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# theirs\n", encoding="utf-8")
    receipt = apply("rtn-w8", source, tmp_path / "one")
    text = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert front(text) == {
        "base_model": "source",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["regauge", "quantized", "compressed-tensors"],
    }
    assert "vllm serve PATH" in text
    assert f"with the plan `{receipt.plan}`" in text
    assert "regauge/SOURCE_README.md" in text
    assert str(tmp_path) not in text
    assert "README.md" in json.loads((tmp_path / "one" / "regauge" / "manifest.json").read_text())["files"]
    assert strangers(tmp_path / "one") == []
    apply("rtn-w8", source, tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text(encoding="utf-8") == text
    apply("rtn-w4g32", source, tmp_path / "one", force=True)  # --force replaces it as its own
    assert is_artifact(tmp_path / "one")
    assert "rtn-w4g32" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")


def test_what_only_we_load_says_what_to_use_instead(tmp_path: Path) -> None:
    text = card(a_receipt(refusals=("it has no nf4 weights",)), tmp_path, CAUSAL)
    assert "| vLLM and others |  | no: it has no nf4 weights |" in text
    assert "trust_remote_code=True" in text
    assert "compressed-tensors" not in front(text)["tags"]  # type: ignore[operator]  # a list
    encoder = card(a_receipt(), tmp_path, {"architectures": ["BertModel"]})
    assert "pipeline_tag" not in front(encoder)
    assert "transformers.AutoModel.from_pretrained" in encoder


def test_names_of_others_are_no_markup(tmp_path: Path) -> None:
    name = f"`{NASTY}|\n---\ntags: [x]"
    site = a_site("blocks.0.attn.q", name, 4.0)
    text = card(a_receipt(source=name, plan=name, refusals=(name,), sites=(site,)), tmp_path, CAUSAL)
    assert "<" not in text
    assert front(text)["tags"] == ["regauge", "quantized"]
    assert text.count("\n---\n") == 1  # the front matter's own end


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/home/me/models/llama/", "llama"),
        ("/cache/hub/models--meta--Llama-3.2-1B/snapshots/abc", "meta/Llama-3.2-1B"),
        ("meta/Llama-3.2-1B", "meta/Llama-3.2-1B"),
    ],
)
def test_the_base_model_is_no_path_of_this_machine(source: str, said: str) -> None:
    assert base_model(source) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("# a card", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: 'a: b\n---\n", None),
        ('---\nlicense: "<b>"\n---\n', None),
    ],
)
def test_a_licence_is_repeated_where_it_is_a_name(text: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence(tmp_path) == said
