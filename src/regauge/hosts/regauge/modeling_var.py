"""VAR: a transformer that predicts all tokens of an image's next scale at once (arXiv 2404.02905), with its tokenizer.

The tokens of scale k are read as the sum of the scales before, averaged to the side of k. A class modulates every
block: γ (what a branch's output is multiplied by), scale and shift of its norm. Names of parameters are those of the
reference's checkpoints, but for the biases of queries, keys and values, which are one vector: see `reference.py`.
Legend: B batch, L tokens of all scales, C channels, Z latent channels, H heads, D channels of a head, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from regauge.cache.scheme import CachePlan
from regauge.elastic.subnet import Subnet
from regauge.errors import SettingError
from regauge.hosts.regauge.blocks import Block, HeadNorm, Modulation, like
from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.pasts import check
from regauge.hosts.regauge.sampling import Sampled, Taste, sample
from regauge.hosts.regauge.stages import Layers, Stages, bridged, layers_of, mask_of
from regauge.hosts.regauge.tokenizer import Tokenizer
from regauge.tokens.maps import Passing


@dataclass
class VarOutput(ModelOutput):  # type: ignore[misc]
    """What the model gives: logits (B, L, V) of all tokens, and the loss where it was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class VarForImageGeneration(PreTrainedModel):  # type: ignore[misc]
    """VAR with its tokenizer: draws images of a class, `model.sample([3, 7], seed=0).images`."""

    config_class = VarConfig
    config: VarConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    taste = Taste
    regauge_cache: CachePlan | None = None  # what is kept of earlier scales; None: everything
    regauge_tokens: tuple[Passing | None, ...] | None = None  # what blocks pass by; None: nothing

    def __init__(self, config: VarConfig) -> None:
        super().__init__(config)
        width, first = config.hidden_size, config.areas[0]
        self.vae = Tokenizer(config)
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(like((1, first, width)).normal_(std=_deviation(width)))
        self.pos_1LC = nn.Parameter(like((1, config.tokens, width)).normal_(std=_deviation(width)))
        self.lvl_embed = nn.Embedding(len(config.areas), width)
        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), Modulation(width, 6 * width)) if config.shared_aln else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def keep_by(self, plan: CachePlan) -> None:
        """Lets images be drawn with what a plan keeps of earlier scales.

        Raises:
            SettingError: it asks for what a cache of scales cannot keep.
        """
        check(plan)
        self.regauge_cache = plan

    def pass_by(self, rules: tuple[Passing | None, ...]) -> None:
        """Lets images be drawn while each block passes by what its rule says."""
        self.regauge_tokens = rules

    def layers(self, stages: Stages = None) -> Layers:
        """The layers that run on each scale of a subnet, or of one for each scale."""
        return layers_of(stages, self.config.num_hidden_layers, len(self.config.areas))

    def late(self, blocks: tuple[int, ...]) -> Stages:
        """The whole on the first scales, some blocks on the others, as such a subnet is trained."""
        return bridged(len(self.config.areas), Subnet(depth=blocks))

    def places(self) -> Tensor:
        """What is added to each token for its place and its scale: (1, L, C)."""
        scale_L = torch.cat([self.lvl_embed.weight[s].expand(n, -1) for s, n in enumerate(self.config.areas)])
        return self.pos_1LC + scale_L

    def condition(self, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """What a class is for the head (B, C), and for the blocks."""
        cond_BC = self.class_emb(labels_B)
        return cond_BC, self.shared_ada_lin(cond_BC)

    def start(self, cond_BC: Tensor) -> Tensor:
        """The tokens of the first scale, but for their places."""
        return cond_BC[:, None] + self.pos_start

    def logits(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        """(B, L, V), in float32 however the model computes."""
        made: Tensor = self.head(self.head_nm(x_BLC, cond_BC)).float()
        return made

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
        latents: Tensor | None = None,
        subnet: Stages = None,
        **_: Any,
    ) -> VarOutput:
        """What the model thinks of each token of an image, given the scales before.

        Args:
            pixel_values: images (B, channels, side, side) from −1 to 1.
            labels: their classes (B); None: no class.
            tokens: theirs (B, L), where the caller has them already.
            latents: what the transformer reads from the second scale on (B, L − first, Z), likewise.
            subnet: what runs on the scales; None: the full model.
        """
        if tokens is None and latents is None:
            if pixel_values is None:
                raise SettingError("VAR reads pixel_values, tokens or latents; none was given")
            with torch.no_grad():
                tokens = torch.cat(self.vae.encode(pixel_values), 1)
        if latents is None:
            assert tokens is not None
            latents = self.vae.quantize.inputs(torch.split(tokens, list(self.config.areas), 1))
        if labels is None:
            labels = torch.full((len(latents),), self.config.num_classes, dtype=torch.int64, device=latents.device)
        cond_BC, cond = self.condition(labels)
        x_BLC = torch.cat([self.start(cond_BC), self.word_embed(latents.to(cond_BC.dtype))], 1) + self.places()
        x_BLC = self._taught(x_BLC, cond, subnet)
        logits_BLV = self.logits(x_BLC, cond_BC)
        loss = None if tokens is None else functional.cross_entropy(logits_BLV.flatten(0, 1), tokens.flatten())
        return VarOutput(loss=loss, logits=logits_BLV)

    def _taught(self, x_BLC: Tensor, cond: Tensor, subnet: Stages) -> Tensor:
        """All scales at once; a layer leaves the tokens of scales on which it does not run as they are."""
        areas = self.config.areas
        mask_LL = mask_of(areas, x_BLC.device)
        if subnet is None:
            for block in self.blocks:
                x_BLC = block(x_BLC, cond, mask_LL)
            return x_BLC
        layers = self.layers(subnet)
        parts = list(torch.split(x_BLC, list(areas), 1))
        for index, block in enumerate(self.blocks):
            runs = [scale for scale, some in enumerate(layers) if index in some]
            if runs:
                inner = [areas[scale] for scale in runs]
                made = block(torch.cat([parts[scale] for scale in runs], 1), cond, mask_of(inner, x_BLC.device))
                for scale, part in zip(runs, torch.split(made, inner, 1), strict=True):
                    parts[scale] = part
        return torch.cat(parts, 1)

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seed: int = 0,
        taste: Taste = Taste(),  # noqa: B008 (frozen)
        subnet: Stages = None,
        cache: CachePlan | None = None,
    ) -> Sampled:
        """Draws an image of each class.

        Args:
            labels: classes; `num_classes` stands for none.
            seed: the same seed and labels give the same images.
            taste: guidance, and which tokens may be drawn.
            subnet: what runs on the scales: one for all, or one for each; None: the full model.
            cache: what is kept of earlier scales; None: as the model was loaded.

        Raises:
            SettingError: a class or a subnet is none of the model's.
        """
        labels_B = torch.as_tensor(labels, dtype=torch.int64, device=self.device)
        return sample(self, labels_B, seed, taste, subnet, cache or self.regauge_cache)


def _deviation(width: int) -> float:
    return math.sqrt(1 / width / 3)


MODEL = VarForImageGeneration
