"""Methods that one loaded model has otherwise than its class.

They stand in the model itself, so they must not hold it: a model that is in a cycle stays in memory, packed weights and
all, until the garbage collector comes by. Copies and pickles of a model get theirs.

What a user may call on a model that nothing else refers to (`rg.load(OUT).generate(ids)`) must hold it while it runs.
Only a method of a class does, so the model gets a class of its own, a subclass of transformers' with the same name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from regauge.errors import ModelError

HOLDING = ("generate",)
"""Methods that hold the model while they run."""
KEPT = "regauge_own_"
"""What the names begin with under which the functions before those methods stand."""


class Owned:
    """A function of one model, that does not keep the model alive.

    Args:
        model: its first argument at every call.
        function: of a module, by which pickle finds it.
        own: the name of the method of the model's class that it stands before.
    """

    def __init__(self, model: Any, function: Callable[..., Any], own: str) -> None:
        self._model, self._function, self._own = weakref.ref(model), function, own

    @property
    def model(self) -> Any:
        """The model.

        Raises:
            ModelError: nothing refers to it any more.
        """
        found = self._model()
        if found is None:
            raise ModelError(f"the model of this {self._own}() is gone: keep it in a variable while it is used.")
        return found

    @property
    def function(self) -> Callable[..., Any]:
        """What is called, with the model."""
        return self._function

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method of the model's class, whose signature this has."""
        model = self.model
        return method(model, self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.model, *args, **kwargs)

    def again(self, model: Any) -> Owned:
        """The same method of another model."""
        return Owned(model, self._function, self._own)

    def __reduce__(self) -> Any:
        return Owned, (self.model, self._function, self._own)


def own(model: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts a function before a method of one model; it finds that by `method(model, name)`."""
    if name in HOLDING:
        model.__class__ = _holding(stock(model))
    vars(model)[_place(name)] = Owned(model, function, name)


def before(model: Any, name: str) -> Callable[..., Any] | None:
    """The function that stands before a method of a model, if one does."""
    found = vars(model).get(_place(name))
    return found.function if isinstance(found, Owned) else None


def disown(model: Any, name: str) -> None:
    """Takes away what stands before a method."""
    vars(model).pop(_place(name), None)


def method(model: Any, name: str) -> Callable[..., Any]:
    """The method of the class that the model has from transformers, bound."""
    found: Callable[..., Any] = getattr(stock(model), name).__get__(model)
    return found


def stock(model: Any) -> type:
    """The class that a model has from transformers."""
    kind = type(model)
    found: type = vars(kind).get("regauge_stock", kind)
    return found


def _place(name: str) -> str:
    return KEPT + name if name in HOLDING else name


@cache
def _holding(kind: type) -> type:
    """The subclass of a class of models, its name too, whose methods of `HOLDING` are those of the model."""
    said = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    own_methods = {name: _through(getattr(kind, name), name) for name in HOLDING}
    return type(kind.__name__, (kind,), said | own_methods | {"regauge_stock": kind, "__reduce_ex__": _reduced})


def _through(known: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(known)
    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = before(model, name)
        return known(model, *args, **kwargs) if found is None else found(model, *args, **kwargs)

    return called


def _reduced(model: Any, protocol: int) -> Any:
    """By the class from transformers: this one stands in no module, where pickle would look for it."""
    return _again, (stock(model),), model.__getstate__()


def _again(kind: type) -> Any:
    new: Any = _holding(kind)
    return new.__new__(new)
