"""Linear layers of torch: bf16, its packed int8 and int4, torchao's."""

from __future__ import annotations

import torch
from packed_torch import packed
from passes import copies, facts, passing
from serve import Loaded, Options, serve


def load(options: Options) -> Loaded:
    rows, columns, variant, group = options["rows"], options["columns"], options["variant"], options.get("group", 32)
    torch.manual_seed(0)
    base_OI = torch.randn(rows, columns).mul_(columns**-0.5)
    layers, size, count = [], 0, copies(rows, columns, options["about"], options["least"])
    for number in range(count):  # rows in another order and of another size: unique, and quick to draw
        weight_OI = base_OI.roll(number, 0) * (0.5 + torch.rand(rows, 1))
        layer, held = packed(weight_OI.bfloat16(), variant, group)
        layers.append(layer)
        size += held
    x_TI = torch.randn(options["batch"], columns).bfloat16()

    def once() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(x_TI)

    return Loaded(passing(once), facts(options, size, count, "bf16"))


if __name__ == "__main__":
    serve(load)
