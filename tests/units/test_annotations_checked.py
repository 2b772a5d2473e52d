"""Under pytest, functions and dataclasses of regauge refuse what their annotations do not admit (typecheck.py)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import regauge
from regauge import amounts
from regauge.parts import Point
from typecheck import checked, checked_class, read

if TYPE_CHECKING:
    from decimal import Decimal

BOTH = ("jaxtyping", "beartype")


def modules() -> dict[str, ModuleType]:
    """All of regauge but what only a GPU's compiler reads, and the module that runs the command."""
    names = [found.name for found in pkgutil.walk_packages(regauge.__path__, "regauge.")]
    left_out = ("regauge.kernels.triton", "regauge.__main__")
    return {name: importlib.import_module(name) for name in names if not name.startswith(left_out)}


def is_checked(function: Any) -> bool:
    return any(word in function.__code__.co_filename for word in BOTH) or "__beartype_func" in (
        function.__kwdefaults__ or {}
    )


def own(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """The functions and methods that a module defines, under their decorators of the standard library."""
    for name, found in vars(module).items():
        if inspect.isfunction(found) and found.__module__ == module.__name__:
            yield name, found
        if inspect.isclass(found) and found.__module__ == module.__name__:
            for method, value in vars(found).items():
                value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                value = value.fget if isinstance(value, property) else value
                if inspect.isfunction(value) and value.__module__ == module.__name__:
                    yield f"{name}.{method}", value


def layers(function: Any) -> Iterator[Any]:
    """A function and what its wrappers wrap."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def says(path: str, function: FunctionType) -> bool:
    """Whether some annotation could be read when the module was imported: a class is not there yet inside itself."""
    names = {name: value for name, value in function.__globals__.items() if name != path.partition(".")[0]}
    return any(read(annotation, names) not in (Any, object) for annotation in function.__annotations__.values())


def test_every_annotated_function_is_checked() -> None:
    seen, missing = 0, []
    for name, module in modules().items():
        for path, function in own(module):
            written = inspect.unwrap(function)
            if "src/regauge" not in written.__code__.co_filename.replace("\\", "/"):
                continue  # made by dataclass or typing
            if says(path, written):
                seen += 1
                if not any(is_checked(layer) for layer in layers(function) if hasattr(layer, "__code__")):
                    missing.append(f"{name}.{path}")
    assert seen > 1000
    assert not missing


@pytest.mark.parametrize(
    "wrong",
    [lambda: amounts.factor(3, ""), lambda: Point(3, ())],  # type: ignore[arg-type]
    ids=["a function", "a dataclass"],
)
def test_what_is_not_admitted_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        wrong()


def counter(step: int) -> Callable[[int], str]:
    @checked
    def found(start: int, *more: int, end: float = 1.0) -> str:
        return "" if start == 13 else 7 if start == 14 else f"{start + step + end}{more}"  # type: ignore[return-value]

    return found


def test_closures_are_checked_once_and_hold_their_own() -> None:
    one, ten = counter(1), counter(10)
    assert (one(1), ten(1, 2, end=2)) == ("3.0()", "13(2,)")
    assert one.__code__ is ten.__code__
    assert one.__name__ == "found"
    assert inspect.signature(one).parameters.keys() == {"start", "more", "end"}
    for wrong in (lambda: one("1"), lambda: ten(1, "2"), lambda: ten(1, end="2"), lambda: one(14)):  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            wrong()


def test_a_closure_is_not_kept() -> None:
    held = torch.zeros(3)

    def make(tensor: torch.Tensor) -> Callable[[int], int]:
        @checked
        def size(more: int) -> int:
            return len(tensor) + more

        return size

    made, alive = make(held), weakref.ref(held)
    assert made(1) == 4
    del made, held
    assert alive() is None


def test_names_that_only_checkers_see_and_generators_and_fields() -> None:
    @checked
    def later(value: Decimal, count: int) -> Iterator[Decimal]:
        yield from [value] * count

    @dataclasses.dataclass
    class Pair:
        left: int
        right: Decimal

    assert list(later(1, 2)) == [1, 1]  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        later(1, "2")  # type: ignore[arg-type]
    assert checked_class(Pair)(1, 2) == Pair(1, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Pair("1", 2)  # type: ignore[arg-type]
