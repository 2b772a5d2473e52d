"""Units: what is taken out as one."""

from __future__ import annotations

from dataclasses import dataclass

from regauge.anatomy.model import Stream

INSTEAD = {
    "heads": "a group of heads is no neuron",
    "value": "the channels of a head are no neurons",
    "qk": "the channels of a head are no neurons",
    "residual": "the residual is shared by all blocks",
    "norm": "the channels of a norm stand in the order of the residual",
}


@dataclass(frozen=True)
class Neuron:
    """A neuron of a feed-forward layer: its row in up and gate, and its column in down.

    Cost: none at run time; what is left is a smaller layer of the same kind.
    """

    def refuses(self, stream: Stream) -> str | None:
        if stream.kind == "ffn":
            return stream.stops.get("select")
        why = INSTEAD.get(stream.kind, f"it is a stream of kind {stream.kind}")
        return f"unit 'neuron' cannot be taken out of {stream.name}: {why}; write blocks.*.ffn"
