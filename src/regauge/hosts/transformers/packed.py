"""The packed stores of `runtime/store` as layers of transformers' dynamic cache, and a cache of them by a plan.

    cache = cache_of(plan, model)
    model.generate(**inputs, past_key_values=cache)

What transformers' modules read of a layer is all of its history in full precision, made anew at each call; the native
step reads the blocks. The first tokens of a text are attended to as they came, as KIVI has it.

Legend: B sequences, H KV heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regauge.cache.scheme import CachePlan, Scheme
from regauge.errors import ModelError
from regauge.hosts.transformers.attending import marked, watch
from regauge.hosts.transformers.cache import GrowingLayer, OwnLayer, SlidingLayer
from regauge.hosts.transformers.coding import reads
from regauge.runtime.store.choosing import Chooser
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.sharing import Sharer


class PackedLayer(Packed, OwnLayer):
    """A packed store as transformers' dynamic layer.

    Attributes:
        keys, values: all that is held, in full precision, new memory at each reading; they cannot be set.
        chooser: what lets tokens go or merges them; None: nothing does.
        on_gpu: attention of a few new tokens reads the codes, and keys and values are made of them for nobody.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.chooser: Chooser | Sharer | None = None
        self.on_gpu = False

    @property
    def keys(self) -> Tensor | None:
        return None if self.keys_BHTD is None else self.read()[0]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._set(tensor)

    @property
    def values(self) -> Tensor | None:
        return None if self.keys_BHTD is None else self.read()[1]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._set(tensor)

    def _set(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            raise ModelError(
                "keys and values of a packed cache are read from its blocks and cannot be set; build the cache with "
                "`update`, or load the model with cache='none'"
            )

    @property
    def is_croppable(self) -> bool:
        """Whether a rollback leaves no trace: not where tokens were let go."""
        return not self.chosen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) of new tokens, and gives what they look back to, and theirs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.chooser is not None:
            self.chooser.asking()
        if self.on_gpu and reads(self, key_states.shape[-2]):
            self.reserve(key_states.shape[-2], key_states, value_states)
            self._write(*self._turned(key_states, value_states))
            return marked(key_states, self, None, 0), value_states
        keys, values = self.extend(key_states, value_states)
        keys = marked(keys, self, self.held, self.rows)
        self.settle()
        return keys, values

    def activate_past_recording(self) -> None:
        """Until the next `crop` everything from here on can be taken back."""
        self.record()

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        if self.chooser is not None:
            self.chooser.begin(self)

    def offload(self) -> None:
        """
        Raises:
            ModelError: always.
        """
        raise ModelError("a packed cache stays where it is: leave offloading out, or load the model with cache='none'")


class PackedCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
    """A dynamic cache whose blocks keep what a plan says.

    Attributes:
        plan: what each block keeps.
    """

    def __init__(self, plan: CachePlan, config: Any) -> None:
        super().__init__(config=config)
        self.plan = plan
        layers: list[Any] = self.layers
        if len(layers) != len(plan.blocks):
            raise ModelError(f"{plan.name} is a cache of {len(plan.blocks)} blocks, and this model has {len(layers)}")
        layers[:] = [
            _layer(layer, None if block is None else block.scheme, number, plan.name)
            for number, (layer, block) in enumerate(zip(layers, plan.blocks, strict=True))
        ]

    def __iter__(self) -> Any:
        layers: list[Any] = self.layers
        for layer in layers:
            yield layer.keys, layer.values, None


def cache_of(plan: CachePlan, model: Any) -> PackedCache:
    """An empty cache of a model, by a plan.

    Raises:
        ModelError: the plan is of another model, or names a block that keeps no keys and values that grow.
    """
    cache = PackedCache(plan, model.config.get_text_config(decoder=True))
    watch(cache, plan, model)
    return cache


def _layer(stock: Any, scheme: Scheme | None, number: int, name: str) -> Any:
    if type(stock) is DynamicSlidingWindowLayer and scheme is None:
        return SlidingLayer(stock.sliding_window)
    if type(stock) is not DynamicLayer:
        if scheme is None:
            return stock
        raise ModelError(
            f"{name} names block {number}, whose past is a {type(stock).__name__} and not keys and values of every "
            "token; leave it out of the recipe"
        )
    return GrowingLayer() if scheme is None else PackedLayer(scheme)
