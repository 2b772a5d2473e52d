"""Models of the list in architectures.yaml: tiny, random, seeded, in shapes that no kernel was written for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

LIST = Path(__file__).with_suffix(".yaml")


@cache
def listed() -> dict[str, dict[str, Any]]:
    """Name → what the list says of it."""
    raw = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return {name: {"type": name, "sizes": raw["sizes"]} | row for name, row in raw["architectures"].items()}


def opened(slow: bool) -> list[str]:
    """Names of those that regauge opens: tested with the quick tests, or with the slow ones."""
    return [name for name, row in listed().items() if not row.get("refused") and bool(row.get("slow")) == slow]


def every() -> list[Any]:
    """Parameters of a test that is for each of them: those that are slow are marked so."""
    return [*opened(slow=False), *(pytest.param(name, marks=pytest.mark.slow) for name in opened(slow=True))]


def _settings(config_class: Any, row: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config has, and what the list says; of the configs inside it too."""
    from transformers import CONFIG_MAPPING

    default = config_class()
    names = {
        name: value for name, value in sizes.items() if name in default.to_dict() or name in config_class.attribute_map
    }
    found = names | row
    for part, inner in config_class.sub_configs.items():
        given = row.get(part)
        if not isinstance(given, dict):
            if part.startswith("audio"):
                found[part] = None
            continue
        kind = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else inner
        found[part] = _settings(kind, given, sizes if part.startswith("text") else {})
    return found


def config_of(name: str, other: dict[str, Any] | None = None, **sizes: int) -> Any:
    """The config of one of the list, with other sizes than all have, and other settings than are listed."""
    from transformers import CONFIG_MAPPING

    from regauge.hosts.regauge import register

    row = listed()[name]
    register(row["type"])
    kind = CONFIG_MAPPING[row["type"]]
    config = kind(**_settings(kind, row.get("config", {}) | (other or {}), row["sizes"] | sizes))
    config.architectures = [row["class"]]
    return config


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, other: dict[str, Any] | None = None, **sizes: int
) -> Any:
    """The model of one of the list, random, in eval mode."""
    from regauge.hosts.transformers.skeleton import model_class

    config = config_of(name, other, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config._experts_implementation = "eager"
        model = model_class(config)(config)
        randomise(model)
    model = model.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def randomise(model: Any) -> None:
    """Noise on every parameter, of a size that keeps signals alive."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float32, device="cpu")
        if parameter.dim() <= 1:
            parameter.data.add_(0.2 * noise)
        elif parameter.dim() == 2 and parameter.shape[-1] > 1:
            big = "emb" in name or "wte" in name or "wpe" in name or "shared" in name
            parameter.data.copy_(noise if big else noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.data.add_(0.1 * noise)


def inputs(model: Any, seed: int = 1, length: int = 11, batch: int = 2) -> dict[str, Any]:
    """What a model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    ids = torch.randint(9, getattr(text, "vocab_size", 97), (batch, length), generator=generator)

    def pixels() -> torch.Tensor:
        shape = (batch, vision.num_channels, vision.image_size, vision.image_size)
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    if config.model_type in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": pixels()}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels()}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn((batch, 96), generator=generator, dtype=torch.float32)}
    if model.main_input_name == "input_features":
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {
            "input_features": torch.randn(shape, generator=generator, dtype=torch.float32),
            "decoder_input_ids": ids,
        }
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :7].flip(0)}
    return {"input_ids": ids}


def in_float64(name: str, folder: Path) -> tuple[Any, dict[str, Any], dict[int | None, Any]]:
    """One of the list in float64, saved and opened: its source, what it is given, and the tensors of each block."""
    from regauge.hosts.transformers.source import Source

    model = build(name, dtype=torch.float64)
    model.save_pretrained(folder)
    given = {key: x.double() if x.is_floating_point() else x for key, x in inputs(model, length=7).items()}
    source = Source.open(folder)
    return source, given, {block: source.block(block) for block in (None, *range(source.anatomy.blocks))}
