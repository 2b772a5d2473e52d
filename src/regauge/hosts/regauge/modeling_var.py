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
from regauge.errors import SettingError
from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.pasts import Past, check
from regauge.hosts.regauge.sampling import Sampled, Taste, sample
from regauge.hosts.regauge.stages import Layers, Stages, layers_of, mask_of
from regauge.hosts.regauge.tokenizer import Tokenizer

LOUDEST = math.log(100)  # of the learnt scale of attention's scores


class Modulation(nn.Linear):
    """What a class makes of all blocks: (B, 1, 6, C)."""

    def forward(self, cond_BC: Tensor) -> Tensor:
        return super().forward(cond_BC).view(len(cond_BC), 1, 6, -1)


class Attention(nn.Module):
    """Attention over the scales so far."""

    def __init__(self, config: VarConfig, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, config.num_attention_heads
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(config.hidden_size // self.heads)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(_like((1, self.heads, 1, 1)).fill_(math.log(4)))
        self.normed = config.attn_l2_norm
        self.mat_qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None, past: Past | None) -> Tensor:
        made = self.mat_qkv(x_BLC)
        q, k, v = made.view(*made.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.normed:
            q = functional.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=LOUDEST).exp()
            k = functional.normalize(k, dim=-1)
        if past is not None:
            read = past.append(self.index, q, k, v)
            k, v = read.keys_BHTD, read.values_BHTD
            mask_LL = None if read.held_BHT is None else read.held_BHT.unsqueeze(2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two layers."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x_BLC), approximate="tanh"))
        return out


class Block(nn.Module):
    """A layer; its norms have no numbers of their own, the class gives them."""

    def __init__(self, config: VarConfig, index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn, self.ffn = Attention(config, index), FeedForward(config)
        self.shared = config.shared_aln
        if self.shared:
            self.ada_gss = nn.Parameter(_like((1, 1, 6, config.hidden_size)).normal_(std=config.hidden_size**-0.5))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def modulation(self, cond: Tensor) -> Tensor:
        """(B, 1, 6, C) of a class (B, C), or of what all blocks share."""
        if self.shared:
            added: Tensor = self.ada_gss + cond
            return added
        made: Tensor = self.ada_lin(cond).view(len(cond), 1, 6, -1)
        return made

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        mask_LL: Tensor | None = None,
        past: Past | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Args:
        modulation: where the caller has made it already, which it may once an image.
        """
        made = self.modulation(cond) if modulation is None else modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = made.unbind(2)
        x_BLC = x_BLC + gamma1 * self.attn(self.norm1(x_BLC) * (scale1 + 1) + shift1, mask_LL, past)
        out: Tensor = x_BLC + gamma2 * self.ffn(self.norm2(x_BLC) * (scale2 + 1) + shift2)
        return out


class HeadNorm(nn.Module):
    """The norm before the head, which the class modulates too."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BC).view(len(cond_BC), 1, 2, -1).unbind(2)
        made: Tensor = self.norm(x_BLC) * (scale + 1) + shift
        return made


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

    def __init__(self, config: VarConfig) -> None:
        super().__init__(config)
        width, first = config.hidden_size, config.areas[0]
        self.vae = Tokenizer(config)
        self.word_embed = nn.Linear(config.latent_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(_like((1, first, width)).normal_(std=_deviation(width)))
        self.pos_1LC = nn.Parameter(_like((1, config.tokens, width)).normal_(std=_deviation(width)))
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

    def layers(self, stages: Stages = None) -> Layers:
        """The layers that run on each scale of a subnet, or of one for each scale."""
        return layers_of(stages, self.config.num_hidden_layers, len(self.config.areas))

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


def _like(shape: tuple[int, ...]) -> Tensor:
    """Numbers yet to be set, where modules that are being built put theirs."""
    return torch.empty(shape, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def _norm(config: VarConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)


def _deviation(width: int) -> float:
    return math.sqrt(1 / width / 3)


MODEL = VarForImageGeneration
