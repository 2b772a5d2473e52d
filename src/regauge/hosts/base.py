"""What the engine, the search and the report ask of a model library: four protocols, and nothing of any library.

A `Host` stands for one library. It opens a `Source` (a checkpoint that is read tensor by tensor), gives a `Runner` (it
streams it block by block), and loads artifacts; a `Skeleton` is a module tree, empty. Tensors go by canonical names.

Legend: B batch, T tokens, D hidden, V vocabulary, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.anatomy.members import Member
from regauge.anatomy.model import Anatomy, Weights
from regauge.attention.rotary import Turning
from regauge.cache.scheme import CachePlan
from regauge.hosts.heads import Attend
from regauge.hosts.latent import LatentSizes
from regauge.hosts.loaded import Sized, Ways
from regauge.hosts.states import States
from regauge.hosts.teaching import Beside, Trainee
from regauge.measure.products import Product
from regauge.measure.subject import Batch, Facts, Outputs
from regauge.plan.caches import Asked

Inputs = Sequence[Tensor | Mapping[str, Any]]  # token ids (B, T), pixels (B, C, H, W), or arguments of the forward
Watch = Mapping[str, Callable[[Tensor], None]]
"""Site → is shown its inputs (tokens, I), padding left out."""
Change = Mapping[str, Callable[[Tensor], Tensor]]
"""Site → replaces its input (…, I) or output (…, O)."""
Rows = Callable[[Tensor | slice], Tensor]
"""Which rows of a matrix, a slice or indices (R,) → those rows (R, I)."""
Tick = Callable[[int, int], None]  # is told (done, total)


@runtime_checkable
class Skeleton(Protocol):
    """A module tree without memory for weights."""

    def named_modules(self) -> Iterator[tuple[str, Any]]: ...
    def get_submodule(self, path: str) -> Any: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Source(Protocol):
    """A checked checkpoint, read on demand. Read-only."""

    @property
    def path(self) -> Path: ...
    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def dtype(self) -> torch.dtype: ...  # that most weights are stored in
    @property
    def files(self) -> Sequence[Path]: ...  # of weights
    @property
    def model(self) -> Any: ...  # its skeleton; not to be changed
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # parameter key → shape

    def read(self, names: Iterable[str]) -> Weights:
        """Canonical tensors by name, in the stored dtype."""

    def block(self, index: int | None) -> Weights:
        """Every canonical tensor of a block (None: embeddings, last norm and head)."""

    def extras(self, index: int | None) -> dict[str, Tensor]:
        """Parameters that are in no site or norm, by module key."""

    def scatter(self, anatomy: Anatomy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors → parameters by module key."""

    def config_changes(self, anatomy: Anatomy) -> tuple[Mapping[str, int], str]:
        """What the library's config must say so that it builds these sizes, or why it cannot say them."""

    @property
    def beside(self) -> Mapping[str, str]: ...  # files that an artifact must hold so that the host can load it

    def digest(self) -> str:
        """sha256 over config and weights."""

    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""

    def bytes_bf16(self) -> int:
        """Bytes of all parameters as bf16, tied ones once."""

    def tokenizer(self) -> Any:
        """The tokenizer, or the `ModelError` that says there is none."""


@runtime_checkable
class Runner(Protocol):
    """Streams a source, in its own anatomy or a rewritten one; gradients flow where weights or states ask for them."""

    @property
    def anatomy(self) -> Anatomy: ...  # what the weights are given in

    def begin(
        self,
        inputs: Inputs,
        weights: Weights,
        watch: Watch | None = None,
        inputs_at: Change | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> States:
        """Runs what lies before the blocks; `rows` of `embed` stand in place of its weight."""

    def block(
        self,
        index: int,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
    ) -> States:
        """Runs one block on every batch; the states given stay as they are."""

    def bind(
        self,
        index: int,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
    ) -> Callable[[Tensor, int], Tensor]:
        """One block as a function of (hidden (B, T, D), number of the batch)."""

    def show(self, index: int, weights: Weights, states: States, watch: Watch) -> None:
        """Shows sites their inputs on every batch; what comes after the last of them need not be computed."""

    def tail(
        self,
        weights: Weights,
        states: States,
        watch: Watch | None = None,
        inputs: Change | None = None,
        outputs: Change | None = None,
        rows: Mapping[str, Rows] | None = None,
    ) -> Iterator[Tensor]:
        """The model's output for each batch; `rows` of `head` stand in place of its weight."""

    def attending(self, change: Attend) -> AbstractContextManager[None]:
        """While it lasts, attention of the blocks that this runner runs is computed by `change`; of a family whose
        attention has no such door, as always."""

    def logits(self, inputs: Inputs, weights: Callable[[int | None], Weights] | None = None) -> Iterator[Tensor]:
        """The whole model on some batches, streamed; `weights` gives the tensors of a block, None reads the source."""


MAPS = "regauge_forms"
"""The attention of a runner whose maps are looked at, within `host.maps(see)`."""


@runtime_checkable
class Host(Protocol):
    """One model library."""

    @property
    def name(self) -> str: ...

    def folder(self, model: str, revision: str | None = None) -> Path:
        """The directory of a model; one that is on a hub is fetched."""

    def open(self, model: str | Path, revision: str | None = None) -> Source:
        """Opens a directory or hub id, or raises the `ModelError` that says what is wrong with it."""

    def runner(
        self,
        source: Source,
        anatomy: Anatomy | None = None,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        matrices: torch.dtype | None = None,
    ) -> Runner:
        """A runner of a source that this host opened; `anatomy` is what the weights will be given in, `matrices` a
        narrower dtype for products alone."""

    def maps(self, see: Callable[[Tensor, Tensor, Tensor], None]) -> AbstractContextManager[None]:
        """While it lasts, blocks of a runner with `MAPS` show their attention probabilities (B, H, Q, T), and the
        queries (B, H, Q, D) and keys (B, K, T, D) behind them, as they run."""

    def turning(self, source: Source) -> Turning | None:
        """How a source turns queries and keys by their position; None where it does not, or nobody knows how."""

    def medium(self, source: Source) -> str:
        """What the model reads first: `text` (token ids), `images` (pixels) or `sound` (samples)."""

    def why_not_fed(self, source: Source) -> str:
        """Why regauge cannot read calibration data through the model, block by block; "" where it can."""

    def image_shape(self, source: Source) -> tuple[int, int]:
        """(channels, side) of the images that a vision model reads."""

    def image_scale(self, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and spread of each channel that pixels from 0 to 1 are normalised by."""

    def sound_shape(self, source: Source, frames: int) -> tuple[int, int, int]:
        """Of a model of sound: samples that make so many frames, samples between two frames, samples a second."""

    def context(self, source: Source) -> int | None:
        """The most tokens that the model reads at once, where it says so."""

    def probe(self, source: Source, seed: int = 0) -> Inputs:
        """One small batch of random inputs, the same for the same seed: what moves are proved on."""

    def precise(self) -> AbstractContextManager[None]: ...  # while it lasts the library computes in float64 throughout

    def latent_refusal(self, source: Source) -> str:
        """Why a model's attention cannot be written anew as latent, in a sentence; "" where it can."""

    def latent_numbers(self, source: Source, sizes: LatentSizes) -> tuple[int, int]:
        """(turned channels, numbers of the latent) that a token leaves in a block's cache, or the `RecipeError`."""

    def write_latent(
        self, source: Source, folder: Path, moments: Sequence[Tensor], sizes: LatentSizes
    ) -> Sequence[str]:
        """Writes a source anew with latent attention, as a checkpoint in `folder`; what was done, a sentence each.
        `moments` are E[x xᵀ] of what each block's attention reads, a 1 behind x."""

    def latent_plan(self, source: Source, sizes: LatentSizes) -> Source: ...  # as `write_latent` makes it, no weights
    def undivided(self, source: Source, experts: int) -> str: ...  # why it has no such feed-forward layers; "": it has

    def divided(self, source: Source, experts: int, folder: Path | None = None, seed: int = 0) -> Source:
        """A source as a mixture of so many experts behind a random router; without weights where no folder is given."""

    def sample(
        self, source: Source, tokenizer: Any, count: int, length: int, seed: int = 0, tick: Tick = lambda *_: None
    ) -> tuple[Tensor, str]:
        """(N, T) token ids that the model draws from itself, and how they begin."""

    def tokenizer(self, folder: Path) -> Any: ...  # of a model's directory

    def load(self, path: str | Path, **options: Any) -> Any: ...  # of an artifact or checkpoint, as `regauge.load` does

    def trainee(self, path: str | Path, device: str = "cpu", held: Sequence[str] = (), shard: bool = False) -> Trainee:
        """A family of a directory, trained where `device` says, in one process or divided; `held`: sites that stay."""

    def ids_of_images(self, path: str | Path, x_NChw: Tensor, y_N: Tensor, seed: int | None = None) -> Tensor:
        """(N, T): class, some hidden by `seed`, and tokens, scale by scale, of images from −1 to 1."""

    def adapting(self, path: str | Path, original: str | Path, how: Beside) -> Trainee:
        """A family in codes, whose adapters are trained towards the model that it was made of."""

    def from_pretrained(self, auto: str, path: str | Path, **options: Any) -> Any:
        """An artifact opened through the library's own door, as the class of that name."""

    def whole(self, source: Source) -> Any: ...  # the library's model of a source, with its weights

    def sized(self, folder: Path, member: Member) -> Sized:
        """What the library's config must say of a member of a family."""

    def cache(self, model: Any, plan: CachePlan) -> Any:
        """An empty cache of a loaded model by a plan, as the library's forward takes it."""

    def ways(self, model: Any) -> Ways:
        """How a loaded model can be run."""

    def ways_of_source(self, source: Source, dtype: torch.dtype = torch.bfloat16) -> Ways:
        """How the uncompressed source can be run, in the dtype in which speeds are counted."""

    def packed(self, path: str | Path) -> bool:
        """Whether a model is stored in codes: an artifact, or another tool's checkpoint."""

    def facts(self, path: str | Path, cache: Asked | None = None) -> Facts:
        """What measuring needs to know of a model, from its files."""

    def outputs(
        self, path: str | Path, batches: Sequence[Batch], cache: Asked | None = None, prompt: int | None = None
    ) -> Outputs:
        """What a model gives in float32 for some batches, with as little of it in memory as will do."""

    def trace(self, path: str | Path, tokens: int, seed: int = 0) -> tuple[tuple[Product, ...], tuple[str, ...]]:
        """Every product of matrices of one pass over some tokens, and the sites that it did not reach."""

    def unsaid(self) -> AbstractContextManager[None]:
        """While a model is timed, what falls back is not said."""

    def speak(
        self, model: Any, tokenizer: Any, ids: Sequence[int], tokens: int, choose: Callable[[Tensor], int] | None = None
    ) -> Iterator[str]:
        """Pieces of text that a loaded model goes on with, as they come; `choose` takes logits (V,)."""

    def serve(self, model: str, address: str, port: int, device: str, cache: str | None = None) -> None:
        """Serves a model over HTTP until it is interrupted."""

    def family(self, path: str | Path | None) -> AbstractContextManager[None]:
        """While it lasts, what a user's own file says of an architecture comes before all else; None: nothing."""

    def check_family(self, table: Path, model: str) -> Any:
        """Runs the laws on a user's own file: what it describes, and which moves that it admits keep the function."""
