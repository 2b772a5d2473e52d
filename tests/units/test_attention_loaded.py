"""Models whose blocks share attention maps or whose heads see a window: what is left out, and that all else holds."""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import regauge
from regauge.attention import forms
from regauge.attention.base import Local
from regauge.engine import apply
from regauge.errors import ArtifactError, FallbackWarning, RecipeError, SettingError
from regauge.hosts.transformers.forms import windowed
from regauge.plan import load
from regauge.plan.text import parse
from tests.pico import pico, save

IDS = torch.arange(3, 23)[None]
SHARED = "blocks.2.attention: {share: 'of:1'}"


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """What falls back to transformers' modules says so, which is not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def made(where: Path, rules: str, name: str = "llama", change: Callable[[Any], None] | None = None, **more: Any) -> Any:
    """A pico model, its float32 checkpoint's folder, and that of an artifact of it with these rules of attention."""
    model = pico(name, 0, **more)
    if change is not None:
        with torch.no_grad():
            change(model)
    source = save(model, where / "source")
    apply(parse(f"attention: {{{rules}}}"), source, where / "out")
    return model, where / "out"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    found: tuple[Any, Path] = made(tmp_path_factory.mktemp("shared"), SHARED, num_hidden_layers=4)
    return found


def greedy(model: Any, ids: Tensor, **how: Any) -> Tensor:
    found: Tensor = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **how)
    return found


def test_a_block_attends_by_the_probabilities_of_its_leader(shared: tuple[Any, Path]) -> None:
    stock, out = shared
    model = regauge.load(out)
    seen: list[Any] = []
    block = model.model.layers[2].self_attn
    block.register_forward_hook(lambda module, args, kwargs, made: seen.append((kwargs, made)), with_kwargs=True)
    model(IDS)
    stock.set_attn_implementation("eager")
    p_BHQT = stock(IDS, output_attentions=True).attentions[1]  # softmaxed, masked
    (kwargs, (found, _)), own = seen[0], stock.model.layers[2].self_attn
    value = own.v_proj(kwargs["hidden_states"]).view(1, 20, 3, 10).transpose(1, 2).repeat_interleave(2, 1)
    expected = own.o_proj((p_BHQT @ value).transpose(1, 2).reshape(1, 20, -1))
    assert torch.allclose(found, expected, atol=1e-5)


def test_with_the_leaders_queries_keys_and_input_sharing_is_the_model_itself(tmp_path: Path) -> None:
    def alike(model: Any) -> None:
        one, two = model.model.layers[1], model.model.layers[2]
        for name in ("q_proj", "k_proj"):
            getattr(two.self_attn, name).weight.copy_(getattr(one.self_attn, name).weight)
        two.input_layernorm.weight.copy_(one.input_layernorm.weight)
        one.self_attn.o_proj.weight.zero_()  # so that both read the same
        one.mlp.down_proj.weight.zero_()

    stock, out = made(tmp_path, SHARED, change=alike, num_hidden_layers=4)
    assert torch.allclose(regauge.load(out)(IDS).logits, stock(IDS).logits, atol=1e-4)


def test_queries_and_keys_are_not_in_the_files_and_the_cache_keeps_values_only(shared: tuple[Any, Path]) -> None:
    stock, out = shared
    names: list[str] = []
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    kept = {name for name in stock.state_dict() if "layers.2.self_attn.q" not in name and ".2.self_attn.k" not in name}
    assert set(names) == kept
    model = regauge.load(out)
    cache = model(IDS, use_cache=True).past_key_values
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert sizes == [4800, 4800, 2400, 4800]  # 20 tokens, 3 heads, 10 channels, 4 bytes; twice
    receipt = json.loads((out / "regauge" / "receipt.json").read_text(encoding="utf-8"))
    assert not [site for site in receipt["sites"] if site["name"] in ("blocks.2.attn.q", "blocks.2.attn.k")]
    assert "blocks take the attention map of another and have no queries and keys: 2 of 1" in receipt["notes"]


def test_generation_is_as_without_a_cache(shared: tuple[Any, Path]) -> None:
    model = regauge.load(shared[1])
    whole = greedy(model, IDS, use_cache=False)
    assert torch.equal(greedy(model, IDS), whole)
    assert torch.equal(greedy(copy.deepcopy(model), IDS), whole)
    assert torch.equal(greedy(model, IDS, prompt_lookup_num_tokens=2), whole)  # which crops
    beams = {"num_beams": 3}
    assert torch.equal(greedy(model, IDS, **beams), greedy(model, IDS, use_cache=False, **beams))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), IDS), 1)
    mask = torch.tensor([[0] * 4 + [1] * 20])
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 4:], whole)


def test_two_threads_keep_their_maps_apart(shared: tuple[Any, Path]) -> None:
    model = regauge.load(shared[1])
    texts = [IDS, IDS.flip(1)[:, :13]]
    alone = [greedy(model, ids) for ids in texts]
    found: dict[int, Tensor] = {}

    def speak(which: int) -> None:
        for _ in range(3):
            found[which] = greedy(model, texts[which])

    threads = [threading.Thread(target=speak, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[which], alone[which]) for which in (0, 1))


@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_norms_and_biases_of_queries_and_keys_go_with_them(name: str, tmp_path: Path) -> None:
    stock, out = made(tmp_path, SHARED, name, num_hidden_layers=4)
    model = regauge.load(out)
    lost = sum(p.numel() for p in stock.parameters()) - sum(p.numel() for p in model.parameters())
    sizes = {"qwen3": 29 * (60 + 30) + 2 * 10, "opt": 2 * (33 * 33 + 33)}
    assert lost == sizes[name]
    assert torch.equal(greedy(model, IDS), greedy(model, IDS, use_cache=False))


def test_a_head_with_a_window_attends_as_full_attention_under_a_band() -> None:
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 11, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    mask = windowed(None, Local("1", 3, 1), query, key)
    band = forms.by_head(torch.tensor([99, 99, 3, 3]), torch.tensor([0, 0, 1, 1]))
    dense = forms.dense(band, 1, 4, 11, 11)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    found, expected = (
        torch.nn.functional.scaled_dot_product_attention(query, key, value, seen) for seen in (mask, dense)
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_windows_of_heads_hold_when_text_is_generated_and_padded(tmp_path: Path) -> None:
    stock, out = made(tmp_path, "blocks.*: {window: {part: local, heads: 0+2, tokens: 3, sinks: 1}}")
    model = regauge.load(out)
    whole = greedy(model, IDS, use_cache=False)
    assert torch.equal(greedy(model, IDS), whole)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), IDS), 1)
    mask = torch.tensor([[0] * 4 + [1] * 20])
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 4:], whole)
    assert not torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-2)
    assert torch.allclose(model(IDS[:, :3]).logits, stock(IDS[:, :3]).logits, atol=1e-5)  # all in sight


def test_the_step_says_why_it_does_not_decode_such_a_model(shared: tuple[Any, Path]) -> None:
    with pytest.warns(FallbackWarning, match="blocks take another's attention map, or their heads see a window"):
        greedy(regauge.load(shared[1]), IDS)


@pytest.mark.parametrize(
    ("rules", "name", "said"),
    [
        ("blocks.*: {share: 'alike:0.4'}", "llama", "of 2 blocks, 0 can be in a group"),
        ("blocks.1.attention: {share: 'of:0'}", "gpt2", "no queries and keys, and here they are fused with values"),
        ("blocks.1.attention: {share: 'of:1'}", "llama", "takes the map of an earlier block, and 1 is none"),
        ("blocks.*: {window: 0}", "llama", "a window counts the last tokens, 1 or more of them, and 0 is no such"),
        ("blocks.*: {window: 4}", "bert", "this bert model has no blocks' attention"),
        ("blocks.*: {share: 'lik:0.4'}", "llama", "there is no share 'lik'.*did you mean"),
        ("blocks.1.attention: {share: 'of:0'}", "mistral", "slides over a window shares no map"),
    ],
)
def test_what_cannot_be_had_is_refused(rules: str, name: str, said: str, tmp_path: Path) -> None:
    source = save(pico(name), tmp_path / "source")
    with pytest.raises(RecipeError, match=said):
        apply(parse(f"attention: {{{rules}}}"), source, tmp_path / "out", calibration=None)
    assert not (tmp_path / "out").exists()


def test_a_store_of_formats_and_shared_maps_are_refused_together(tmp_path: Path) -> None:
    source = save(pico("llama", num_hidden_layers=4), tmp_path / "source")
    plan = parse(f"{{attention: {{{SHARED}}}, cache: {{'*': {{keys: int4-asym/token, window: 8}}}}}}")
    with pytest.raises(RecipeError, match="keeps values and no keys, which no store of a cache's recipe does"):
        apply(plan, source, tmp_path / "out")


def test_a_window_of_blocks_in_memory_is_refused(shared: tuple[Any, Path]) -> None:
    with pytest.raises(SettingError, match="leave memory= out"):
        regauge.load(shared[1], memory="2GB")


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"share": {"part": "of", "block": 3}}, "takes the map of an earlier block, and 3 is none"),
        ({"share": {"part": "alike", "amount": 0.4}}, "how its blocks attend is not settled"),
        ({"window": {"part": "local", "heads": "7"}}, "heads 7 are not all different heads of 3"),
        ({"window": {"part": "some.module:Name"}}, "of another package"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(shared: tuple[Any, Path], point: Any, said: str, tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(shared[1], tmp_path / "out"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["attention"] = [{"at": ["blocks.2.attention"], **point}]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match=said):
        regauge.load(out)


def test_presets_of_attention_can_be_read() -> None:
    for name in ("echoatt-23", "echoatt-41", "ls-attention-w64", "windowed-128"):
        assert load(name).of("attention")
