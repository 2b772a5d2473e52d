"""Makes mutants of Python source: one operator, constant or branch changed, the rest of the text as it was."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change. `function`: dotted, "" on the module; `text`: the line as it stands; `start`, `end`: bytes."""

    file: str
    function: str
    line: int
    text: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: bytes) -> bytes:
        """The file with this change; every other line keeps its number."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def mutants(root: Path, file: str) -> list[Mutant]:
    """Every mutant of one file, in the order of the text. Annotations, decorators, docstrings and f-strings stay."""
    source = (root / file).read_bytes()
    lines = source.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    made = []
    for function, node, after in _changes(ast.parse(source), ""):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before = source[start:end].decode()
        text = lines[node.lineno - 1].decode().strip()
        after = f"({after}" + "\n" * before.count("\n") + ")"  # so that lines keep their numbers
        made.append(Mutant(file, function, node.lineno, text, before, after, start, end))
    return made


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr, str]]:
    """(function, expression, what stands there instead) below `node`."""
    if isinstance(node, ast.JoinedStr | ast.arg):  # places inside f-strings are not told before Python 3.12
        return
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.expr):
        for after in _instead(node):
            yield function, node, after
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield function, node.test, f"not ({ast.unparse(node.test)})"
    named = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    inside = ".".join(filter(None, (function, node.name))) if named else function
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child, inside)


def _instead(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Compare() | ast.BinOp() | ast.BoolOp():
            operators = node.ops if isinstance(node, ast.Compare) else [node.op]
            for place, operator in enumerate(operators):
                if type(operator) not in SWAPPED:
                    continue
                other = copy.deepcopy(node)
                if isinstance(other, ast.Compare):
                    other.ops[place] = SWAPPED[type(operator)]()
                else:
                    other.op = SWAPPED[type(operator)]()
                yield ast.unparse(other)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield ast.unparse(node.operand)
        case ast.Constant(value=bool()):
            yield str(not node.value)
        case ast.Constant(value=int()):
            yield str(node.value + 1)
        case ast.Constant(value=float()):
            yield repr(node.value * 2 if node.value else 1.0)
