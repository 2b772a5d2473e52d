"""Draws images scale by scale, guided by their class (arXiv 2404.02905, section 4).

With guidance the model runs twice, with the class and without, and logits are (1 + t) cond − t uncond, where t grows
from 0 at the first scale to the guidance at the last.
Legend: B batch, L tokens of a scale, C channels, Z latent channels, V codes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regauge.cache.scheme import CachePlan
from regauge.errors import SettingError
from regauge.hosts.regauge.pasts import Past
from regauge.hosts.regauge.stages import Layers, Stages
from regauge.tokens.maps import Passed


@dataclass(frozen=True)
class Taste:
    """How tokens are drawn.

    Attributes:
        guidance: how much more an image should look like its class; 0: the class alone, at half the cost.
        top_k: so many of the likeliest tokens may be drawn; 0: all.
        top_p: of the likeliest, as many as have this share of the probability; 0: all.
    """

    guidance: float = 1.5
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < 100:
            raise SettingError(f"guidance must be from 0 to 100; you wrote {self.guidance}")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise SettingError(f"top_k must be 0 or more and top_p from 0 to 1; you wrote {self.top_k}, {self.top_p}")


@dataclass(frozen=True, eq=False)
class Sampled:
    """Images and what they took.

    Attributes:
        images: (B, channels, side, side) from 0 to 1.
        tokens: (B, L) of all scales.
        layers: that ran on each scale.
        cache_bytes: of keys and values after each scale, and of what tokens that were passed by are filled with.
        most_cache_bytes: the most at one time.
        seconds: of each scale, then of the decoder.
    """

    images: Tensor
    tokens: Tensor
    layers: Layers
    cache_bytes: tuple[int, ...]
    most_cache_bytes: int
    seconds: tuple[float, ...]


def sample(
    model: Any, labels_B: Tensor, seed: int, taste: Taste, subnet: Stages, plan: CachePlan | None = None
) -> Sampled:
    """See `VarForImageGeneration.sample`."""
    config, count = model.config, len(labels_B)
    _check(labels_B, config.num_classes)
    layers: Layers = model.layers(subnet)
    generator = torch.Generator(device=labels_B.device).manual_seed(seed)
    none_B = torch.full_like(labels_B, config.num_classes)
    labels = torch.cat([labels_B, none_B]) if taste.guidance else labels_B
    cond_BC, cond = model.condition(labels)
    made = [block.modulation(cond) for block in model.blocks]
    past = Past(layers, plan, model.blocks[0].attn.scale)
    passed = None if model.regauge_tokens is None else Passed(model.regauge_tokens, len(layers))
    places = torch.split(model.places(), config.areas, 1)
    x_BLC, total_BZhw = model.start(cond_BC) + places[0], None
    tokens, held, seconds = [], [], []
    for scale, some in enumerate(layers):
        began = time.perf_counter()
        past.begin(scale)
        if passed is not None:
            passed.begin(scale)
        for index in some:
            x_BLC = model.blocks[index](x_BLC, cond, None, past, made[index], passed)
        held.append(past.bytes + (0 if passed is None else passed.bytes))
        logits = model.logits(x_BLC, cond_BC)
        if taste.guidance:
            t = taste.guidance * scale / (len(layers) - 1)
            logits = (1 + t) * logits[:count] - t * logits[count:]
        ids_BL = draw(logits, taste, generator)
        tokens.append(ids_BL)
        part_BZhw = model.vae.quantize.part(scale, ids_BL)
        total_BZhw = part_BZhw if total_BZhw is None else total_BZhw + part_BZhw
        if scale < len(layers) - 1:
            rows = model.vae.quantize.down(total_BZhw, scale + 1).to(cond_BC.dtype)
            x_BLC = (model.word_embed(rows) + places[scale + 1]).repeat(len(labels) // count, 1, 1)
        seconds.append(time.perf_counter() - began)
    most = past.most + (0 if passed is None else passed.bytes)
    began = time.perf_counter()
    images = (model.vae.pixels(total_BZhw).clamp(-1, 1) + 1) / 2
    seconds.append(time.perf_counter() - began)
    return Sampled(images, torch.cat(tokens, 1), layers, tuple(held), most, tuple(seconds))


def draw(logits_BLV: Tensor, taste: Taste, generator: torch.Generator) -> Tensor:
    """One token for each place, of those that may be drawn."""
    if taste.top_k:
        least = logits_BLV.topk(min(taste.top_k, logits_BLV.shape[-1]), dim=-1).values[..., -1:]
        logits_BLV = logits_BLV.masked_fill(logits_BLV < least, -torch.inf)
    if taste.top_p:
        ordered, order = logits_BLV.sort(dim=-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - taste.top_p
        out[..., -1] = False
        logits_BLV = logits_BLV.masked_fill(out.scatter(-1, order, out), -torch.inf)
    chances = logits_BLV.softmax(-1).flatten(0, 1)
    return torch.multinomial(chances, 1, replacement=True, generator=generator).view(logits_BLV.shape[:2])


def _check(labels_B: Tensor, classes: int) -> None:
    if not len(labels_B):
        raise SettingError("no labels were given; name a class for each image")
    if labels_B.dim() != 1 or not bool(((labels_B >= 0) & (labels_B <= classes)).all()):
        raise SettingError(f"labels must be numbers from 0 to {classes - 1}, or {classes} for no class")
