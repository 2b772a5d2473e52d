"""transformers as a `Host`: where each thing that the engine asks for is in this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy
from regauge.artifact.caches import FILE
from regauge.artifact.reader import open_artifact
from regauge.attention.rotary import Turning
from regauge.cache.scheme import CachePlan
from regauge.errors import ModelError
from regauge.hosts import base
from regauge.hosts.latent import LatentSizes
from regauge.hosts.loaded import Sized, Ways
from regauge.hosts.precise import precise
from regauge.hosts.teaching import Beside, Trainee
from regauge.hosts.transformers import (
    adapting,
    apart,
    attending,
    dividing,
    door,
    forms,
    hub,
    latent,
    laws,
    load,
    packed,
    probe,
    sampling,
    serve,
    sharded,
    stream,
    tables,
    tracing,
    trainee,
    ways,
)
from regauge.hosts.transformers.coded import method
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source, read_tokenizer
from regauge.measure.products import Product
from regauge.measure.subject import Batch, Facts, Outputs
from regauge.plan.caches import Asked


@dataclass(frozen=True)
class TransformersHost:
    """Hugging Face transformers."""

    name: str = "transformers"

    def folder(self, model: str, revision: str | None = None) -> Path:
        return hub.model_folder(model, revision)

    def open(self, model: str | Path, revision: str | None = None) -> base.Source:
        return Source.open(model, revision)

    def runner(
        self,
        source: base.Source,
        anatomy: Anatomy | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        matrices: torch.dtype | None = None,
    ) -> base.Runner:
        return Runner(_own(source), anatomy, dtype, attention, matrices)

    def maps(self, see: Callable[[Tensor, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        return forms.watching(see)

    def turning(self, source: base.Source) -> Turning | None:
        found = attending.rotary_of(_own(source).model)
        if found is None or not found.radians:
            return None
        return Turning(torch.tensor(found.radians, dtype=torch.float32, device="cpu"), found.halves)

    def medium(self, source: base.Source) -> str:
        return probe.medium(_own(source))

    def why_not_fed(self, source: base.Source) -> str:
        return probe.why_not_fed(_own(source))

    def sound_shape(self, source: base.Source, frames: int) -> tuple[int, int, int]:
        return probe.sound_shape(_own(source), frames)

    def image_shape(self, source: base.Source) -> tuple[int, int]:
        return probe.image_shape(_own(source))

    def image_scale(self, source: base.Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return probe.image_scale(_own(source))

    def context(self, source: base.Source) -> int | None:
        return probe.context(_own(source))

    def probe(self, source: base.Source, seed: int = 0) -> base.Inputs:
        return probe.probe(_own(source), seed)

    def precise(self) -> AbstractContextManager[None]:
        return precise()

    def latent_refusal(self, source: base.Source) -> str:
        return latent.why_not(_own(source))

    def latent_numbers(self, source: base.Source, sizes: LatentSizes) -> tuple[int, int]:
        return latent.numbers(_own(source), sizes)

    def write_latent(
        self, source: base.Source, folder: Path, moments: Sequence[Tensor], sizes: LatentSizes
    ) -> Sequence[str]:
        return latent.write(_own(source), folder, moments, sizes)

    def latent_plan(self, source: base.Source, sizes: LatentSizes) -> base.Source:
        return latent.planned(_own(source), sizes)

    def sample(
        self,
        source: base.Source,
        tokenizer: Any,
        count: int,
        length: int,
        seed: int = 0,
        tick: base.Tick = lambda done, total: None,
    ) -> tuple[Tensor, str]:
        return sampling.sample(_own(source), tokenizer, count, length, seed, tick)

    def tokenizer(self, folder: Path) -> Any:
        return read_tokenizer(folder)

    def load(self, path: str | Path, **options: Any) -> Any:
        return load.load(path, **options)

    def undivided(self, source: base.Source, experts: int) -> str:
        return dividing.why_not(_own(source), experts)

    def divided(self, source: base.Source, experts: int, folder: Path | None = None, seed: int = 0) -> base.Source:
        if folder is None:
            return dividing.planned(_own(source), experts)
        dividing.write(_own(source), folder, experts, seed)
        return Source.open(folder)

    def trainee(self, path: str | Path, device: str = "cpu", held: Sequence[str] = (), shard: bool = False) -> Trainee:
        return sharded.sharded(path, device) if shard else trainee.trainee(path, device, held)

    def ids_of_images(self, path: str | Path, x_NChw: Tensor, y_N: Tensor, seed: int | None = None) -> Tensor:
        return trainee.coded(path, x_NChw, y_N, seed)

    def adapting(self, path: str | Path, original: str | Path, how: Beside) -> Trainee:
        return adapting.adapting(path, original, how)

    def from_pretrained(self, auto: str, path: str | Path, **options: Any) -> Any:
        return door.from_pretrained(auto, path, **options)

    def whole(self, source: base.Source) -> Any:
        return sampling.whole_model(_own(source))

    def sized(self, folder: Path, member: Member) -> Sized:
        return apart.sized_as(folder, member)

    def cache(self, model: Any, plan: CachePlan) -> Any:
        return packed.cache_of(plan, model)

    def ways(self, model: Any) -> Ways:
        return ways.ways_of(model)

    def ways_of_source(self, source: base.Source, dtype: torch.dtype = torch.bfloat16) -> Ways:
        return ways.ways_of_source(_own(source), dtype)

    def packed(self, path: str | Path) -> bool:
        return _packed(path)

    def facts(self, path: str | Path, cache: Asked | None = None) -> Facts:
        whole = _packed(path) or _kept(path, cache)
        model = load.load(path, cache=cache) if whole else Source.open(path).model
        return ways.facts(model, hub.model_folder(str(path)))

    def outputs(
        self, path: str | Path, batches: Sequence[Batch], cache: Asked | None = None, prompt: int | None = None
    ) -> Outputs:
        if _packed(path) or _kept(path, cache):
            opened = partial(load.load, path, dtype=torch.float32, cache=cache)
            return ways.outputs_of_model(opened, batches, prompt)
        return ways.outputs_of_source(Source.open(path), batches)

    def trace(self, path: str | Path, tokens: int, seed: int = 0) -> tuple[tuple[Product, ...], tuple[str, ...]]:
        anatomy = open_artifact(self.folder(str(path))).layout.anatomy if _packed(path) else Source.open(path).anatomy
        if "embed" not in {site.name for site in anatomy.sites}:
            raise ModelError(f"{path} reads no tokens, and what is traced is a pass over some.")
        drawn = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(
            anatomy.site("embed").shape[0], (1, tokens), generator=drawn, dtype=torch.int64, device="cpu"
        )
        return tracing.traced(load.load(path, dtype=torch.float32), anatomy, ids_BT)

    def unsaid(self) -> AbstractContextManager[None]:
        return ways.unsaid()

    def speak(
        self, model: Any, tokenizer: Any, ids: Sequence[int], tokens: int, choose: Callable[[Tensor], int] | None = None
    ) -> Iterator[str]:
        return stream.pieces(stream.stream(model, ids, tokens, choose), tokenizer)

    def family(self, path: str | Path | None) -> AbstractContextManager[None]:
        return tables.family(path)

    def check_family(self, table: Path, model: str) -> Any:
        return laws.check_family(table, model)

    def serve(self, model: str, address: str, port: int, device: str, cache: str | None = None) -> None:
        serve.serve(model, address, port, device, cache)


def _packed(path: str | Path) -> bool:
    """Whether a model is stored in codes: an artifact, or another tool's checkpoint."""
    config = hub.model_folder(str(path)) / "config.json"
    try:
        quantised = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
        return bool(quantised) and not method(quantised)
    except (OSError, ValueError, AttributeError):
        return False  # whoever opens it says what is wrong


def _kept(path: str | Path, cache: Asked | None) -> bool:
    """Whether a model keeps its past by a plan, as its directory says or as it is asked to."""
    return cache is not None or (hub.model_folder(str(path)) / FILE).is_file()


def _own(source: base.Source) -> Source:
    """A source that this host opened, which it knows more of than the engine does."""
    return cast(Source, source)


HOST = TransformersHost()
