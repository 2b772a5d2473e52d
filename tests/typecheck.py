"""The checks of every annotation of regauge under pytest, by beartype, with int accepted as float.

`install()` decorates each function and each dataclass of regauge as it is imported. Modules that name shapes are left
to jaxtyping, which carries the sizes from one annotation to the next; all others need none of that, and beartype alone
is several times faster. A closure's checks are made once, not again for each closure. An annotation that cannot be read
when its module is imported (a name under TYPE_CHECKING) counts as Any, as jaxtyping has it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, get_type_hints
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

checker = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
by_shape = functools.partial(jaxtyped, typechecker=checker)
TAG = f"typecheck{sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
CALLED = "__beartype_func"
_made: dict[tuple[CodeType, str, str], Callable[..., Any]] = {}


def install() -> None:
    """From here on regauge is checked; it must not be imported yet."""
    assert "regauge" not in sys.modules
    # Python 3.11 lists the members of a protocol anew for each check, which no code here changes.
    typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())


def checked(function: FunctionType) -> Callable[..., Any]:
    """The function, its arguments and its result checked at each call."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return by_shape(function)  # type: ignore[no-any-return]  # checks what the call returns, not what is yielded
    key = (function.__code__, function.__module__, function.__qualname__)
    if key not in _made:
        _made[key] = checker(_hollow(function))
    made = _made[key]
    if made.__kwdefaults__ is None or CALLED not in made.__kwdefaults__:
        return function  # nothing is annotated
    found = FunctionType(made.__code__, made.__globals__, function.__name__, made.__defaults__)
    functools.update_wrapper(found, function)
    found.__kwdefaults__ = made.__kwdefaults__ | {CALLED: function}
    return found


def checked_class(made: type) -> type:
    """The class; of a dataclass the fields are checked when one is made."""
    if dataclasses.is_dataclass(made) and "__init__" in vars(made) and not hasattr(made.__init__, "__wrapped__"):
        made.__init__ = checked(made.__init__)  # type: ignore[misc]  # on purpose
    return made


def _hollow(function: FunctionType) -> FunctionType:
    """The same signature with annotations that are read, and none of what the function holds on to."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    found = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    found.__module__, found.__qualname__ = function.__module__, function.__qualname__
    found.__annotations__ = {
        name: read(annotation, function.__globals__) for name, annotation in function.__annotations__.items()
    }
    return found


def read(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation says, Any where it names what a module has not (yet)."""

    def holder(value: Any) -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:  # a name that only type checkers see
        return Any


class _Decorate(ast.NodeTransformer):
    """Puts checks nearest to each function, and outermost on each class."""

    def __init__(self, function: str, made: str) -> None:
        self.function, self.made = function, made

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        first = next(
            (
                place
                for place, child in enumerate(node.body)
                if not (isinstance(child, ast.ImportFrom) and child.module == "__future__")
                and not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
            ),
            len(node.body),
        )
        node.body.insert(first, ast.Import(names=[ast.alias("typecheck", "_typecheck")]))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _named(self.made, node))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if any(isinstance(one, ast.Name) and one.id == "no_type_check" for one in node.decorator_list):
            return node
        self.generic_visit(node)
        node.decorator_list.append(_named(self.function, node))
        return node


def _named(name: str, where: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Attribute(ast.Name("_typecheck", ast.Load()), name, ast.Load()), where)


class _Loader(SourceFileLoader):
    """Compiles with the decorators, and keeps what it compiled under a name of its own."""

    def get_code(self, fullname: str) -> CodeType | None:
        named = functools.partial(importlib.util.cache_from_source, optimization=TAG)
        with patch("importlib._bootstrap_external.cache_from_source", named):
            return super().get_code(fullname)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        tree = ast.parse(importlib.util.decode_source(data), path)
        shapes = any(isinstance(node, ast.ImportFrom) and node.module == "jaxtyping" for node in tree.body)
        decorate = _Decorate("by_shape", "by_shape") if shapes else _Decorate("checked", "checked_class")
        made = ast.fix_missing_locations(decorate.visit(tree))
        code: CodeType = compile(made, path, "exec", dont_inherit=True, optimize=_optimize)
        return code


class _Finder(MetaPathFinder):
    """Finds regauge's modules as Python does, and loads them with the checks."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "regauge":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
