"""VAR's tokenizer: encoder, quantiser and decoder (arXiv 2404.02905).

Legend: B batch, Z latent channels, h w sides.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from regauge.hosts.regauge.codec import Decoder, Encoder
from regauge.hosts.regauge.configuration_var import VarConfig
from regauge.hosts.regauge.quantiser import Quantiser


class Tokenizer(nn.Module):
    """Images ↔ tokens of each scale."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        widths = [config.codec_width * times for times in config.codec_multipliers]
        sizes = (config.num_channels, config.latent_channels, widths, config.codec_depth, config.codec_groups)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quantize = Quantiser(
            config.patch_nums,
            config.vocab_size,
            config.latent_channels,
            (config.phi_count, config.phi_share),
            config.commitment,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 3, padding=1)

    def map(self, pixels_BChw: Tensor) -> Tensor:
        """Pixels from −1 to 1 → the map that is quantised."""
        made: Tensor = self.quant_conv(self.encoder(pixels_BChw))
        return made

    def encode(self, pixels_BChw: Tensor) -> list[Tensor]:
        """Pixels from −1 to 1 → tokens (B, side²) of each scale."""
        return self.quantize.encode(self.map(pixels_BChw))

    def pixels(self, map_BZhw: Tensor) -> Tensor:
        """A quantised map → pixels, about −1 to 1."""
        made: Tensor = self.decoder(self.post_quant_conv(map_BZhw))
        return made

    def decode(self, ids: Sequence[Tensor]) -> Tensor:
        """Tokens of some first scales → pixels from −1 to 1."""
        return self.pixels(self.quantize.decode(ids)).clamp(-1, 1)
