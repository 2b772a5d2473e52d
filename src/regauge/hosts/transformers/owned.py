"""Methods that one loaded model has otherwise than its class.

They stand in the model itself, so they must not hold it: a model that is in a cycle stays in memory, packed weights and
all, until the garbage collector comes by. Copies and pickles of a model get theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from regauge.errors import ModelError


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
        found: Callable[..., Any] = getattr(type(model), self._own).__get__(model)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.model, *args, **kwargs)

    def again(self, model: Any) -> Owned:
        """The same method of another model."""
        return Owned(model, self._function, self._own)

    def __reduce__(self) -> Any:
        return Owned, (self.model, self._function, self._own)


def own(model: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts a function before a method of one model; it finds that by `method(model, name)`."""
    setattr(model, name, Owned(model, function, name))


def method(model: Any, name: str) -> Callable[..., Any]:
    """The method of the model's class, bound."""
    found: Callable[..., Any] = getattr(type(model), name).__get__(model)
    return found
