"""Apply moves to tensors: the algebra of the gauge, in float64, cast to the storage dtype once at the end.

What: writers of a stream take M, readers M⁻ᵀ, so what is read stays what it was. For a stream y that one matrix writes
(y = A x + a) and another reads (z = B y + b): A′ = M A, a′ = M a, B′ = B M⁻¹. A shift y′ = y + c adds c to the
writer's bias and takes B c from the reader's. `through` ports (norm gains in the residual, the gate) only ever permute.

Block-local: `apply` touches the tensors present in `weights` and no other, so the same list of moves serves every
block of a streamed model, and the embeddings and head as well. It checks each move against the anatomy as the earlier
moves left it.

    moves = [Move("fold", "head.in"), Move("scale", "blocks.0.value.1", torch.rand(64) + 0.5)]
    new_anatomy = transform(moves, anatomy)
    new_weights = apply(moves, anatomy, weights)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from regauge.anatomy.effects import effect, unties
from regauge.anatomy.model import Anatomy, Port, Stream, Weights
from regauge.anatomy.values import INDICES, KINDS, MATRICES, Move, Rotation, check_value
from regauge.errors import MoveError, nearest

__all__ = ["Move", "Rotation", "apply", "boundary", "check", "compose", "inverse", "transform"]


def check(anatomy: Anatomy, move: Move) -> None:
    """Raises MoveError, with the reason, unless the stream admits the move and the value suits it."""
    if move.kind not in KINDS:
        raise MoveError(f"no move is called {move.kind!r}{nearest(move.kind, KINDS)}")
    names = [stream.name for stream in anatomy.streams]
    if move.stream not in anatomy.stream_names:
        raise MoveError(f"no stream is called {move.stream!r}{nearest(move.stream, names)}")
    stream = anatomy.stream(move.stream)
    if move.kind in stream.stops:
        raise MoveError(f"{stream.name} does not admit {move.kind}: {stream.stops[move.kind]}")
    if move.kind not in stream.admits:
        raise MoveError(f"{move.kind} has no meaning for {stream.name} (it admits {', '.join(sorted(stream.admits))})")
    check_value(move, stream.size, stream.admits[move.kind], anatomy.plumbing)


def transform(moves: Iterable[Move], anatomy: Anatomy) -> Anatomy:
    """The anatomy after the moves: kinds of norms, biases gained, tied heads untied, streams built anew."""
    for batch in _batches(moves):
        for move in batch:
            check(anatomy, move)
        anatomy = effect(batch, anatomy)
    return anatomy


def apply(moves: Iterable[Move], anatomy: Anatomy, weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """The tensors after the moves, for those given; gained biases join them where their weight is present.

    Args:
        moves: in order.
        anatomy: of the model that `weights` come from.
        weights: canonical tensors, often of one block. Never changed in place.
        dtype: of the tensors touched; None for each tensor's own (a gained bias takes its weight's).

    A tied head that a move unties comes out as a tensor of its own if `embed.weight` is present.
    """
    stored = {name: tensor.dtype for name, tensor in weights.items()}
    work = dict(weights)
    for batch in _batches(moves):
        for move in batch:
            check(anatomy, move)
            if unties(move, anatomy) and "embed.weight" in work and "head.weight" not in work:
                work["head.weight"] = work["embed.weight"]
                stored["head.weight"] = stored["embed.weight"]
        after = effect(batch, anatomy)
        _gain_biases(anatomy, after, work, stored)
        for move in batch:
            if anatomy.stream(move.stream).kind == "batch":
                _fold_batch(anatomy, anatomy.stream(move.stream), work)
            else:
                _act(move, anatomy.stream(move.stream), after.stream(move.stream), work)
        anatomy = after
    return {
        name: tensor if tensor is weights.get(name) else tensor.to(dtype or stored[name]).contiguous()
        for name, tensor in work.items()
    }


def inverse(move: Move) -> Move:
    """The move that undoes this one."""
    if move.kind == "permute":
        return Move(move.kind, move.stream, move.vector().argsort())
    if move.fast is not None:
        return Move(move.kind, move.stream, fast=move.fast.inverse())
    if move.kind in ("select", "centre", "fold"):
        raise MoveError(f"{move.kind} of {move.stream} cannot be undone: it drops what it moved")
    value = move.vector().to(torch.float64)
    if move.kind == "scale":
        undone = 1 / value
    elif move.kind == "shift":
        undone = -value
    else:
        undone = value.T if move.kind == "rotate" else torch.linalg.inv(value)
    return Move(move.kind, move.stream, undone)


def compose(first: Move, second: Move) -> Move:
    """One move that does `first`, then `second`: same kind, same stream, dense values."""
    if (first.kind, first.stream) != (second.kind, second.stream):
        raise MoveError(
            f"{first.kind} of {first.stream} and {second.kind} of {second.stream} do not compose into one move; "
            "keep them as a list"
        )
    if first.kind == "fold" or first.kind == "centre":
        return first
    a, b = first.vector(), second.vector()
    if first.kind in INDICES:
        return Move(first.kind, first.stream, a[b])
    a, b = a.to(torch.float64), b.to(torch.float64)
    value = b @ a if first.kind in MATRICES else b * a if first.kind == "scale" else b + a
    return Move(first.kind, first.stream, value)


State = Callable[[Tensor], Tensor]


def boundary(moves: Iterable[Move]) -> tuple[State, State]:
    """(enter, leave): maps of a residual state x_BTD into the moved gauge, and back.

    A block f and its moved form g satisfy g(enter(x)) = enter(f(x)). `leave` undoes `enter`, save that a centred state
    has lost its mean for good (no norm of the model ever saw it): compare leave(g(enter(x))) with leave(enter(f(x))).
    """
    steps = [move for move in moves if move.stream == "residual"]

    def enter(x_BTD: Tensor) -> Tensor:
        for move in steps:
            x_BTD = _along(move, x_BTD, -1)
        return x_BTD

    def leave(x_BTD: Tensor) -> Tensor:
        for move in reversed(steps):
            if move.kind != "centre":
                x_BTD = _along(inverse(move), x_BTD, -1)
        return x_BTD

    return enter, leave


def _along(move: Move, x: Tensor, axis: int, width: int = 1) -> Tensor:
    """M applied along one axis of x, in x's dtype; `width` for neither rotate nor affine."""
    axis = axis % x.dim()
    if move.kind == "centre":
        return x - x.mean(axis, keepdim=True)
    if move.fast is not None:
        return move.fast(x, axis)
    value = move.vector().to(x.device)
    if move.kind in INDICES:
        index = (value[:, None] * width + torch.arange(width, device=x.device, dtype=torch.int64)).flatten()
        return x.index_select(axis, index)
    value = value.to(x.dtype)
    if move.kind in MATRICES:
        return torch.movedim(torch.movedim(x, axis, -1) @ value.T, -1, axis)
    shape = [1] * x.dim()
    shape[axis] = -1
    value = value if width == 1 else value.repeat_interleave(width)
    return x * value.view(shape) if move.kind == "scale" else x + value.view(shape)


def _contragredient(move: Move) -> Move:
    """What readers take: M⁻ᵀ. Of an orthogonal map or a permutation that is itself."""
    if move.kind == "scale":
        return inverse(move)
    if move.kind == "affine":
        return Move("affine", move.stream, inverse(move).vector().T)
    return move


def _batches(moves: Iterable[Move]) -> list[list[Move]]:
    """Runs of moves of one kind on different streams of one kind: none changes what another may do.

    The streams are built anew once a batch, not once a move; folding the norms of a large model is one batch.
    """
    batches: list[list[Move]] = []
    key: tuple[str, bool] | None = None
    seen: set[str] = set()
    for move in moves:
        here = (move.kind, move.stream == "residual")
        if here != key or move.stream in seen:
            batches.append([])
            key, seen = here, set()
        batches[-1].append(move)
        seen.add(move.stream)
    return batches


def _act(move: Move, stream: Stream, after: Stream, work: Weights) -> None:
    if move.kind == "fold":
        return _fold(stream, work)
    if move.kind == "shift":
        return _shift(move, after, work)
    _on_ports(move, stream.writers, stream.size, work)
    if move.kind in INDICES:
        _on_ports(move, stream.through, stream.size, work)
    if move.kind != "centre":
        _on_ports(_contragredient(move), stream.readers, stream.size, work)
    return None


def _on_ports(move: Move, ports: Sequence[Port], size: int, work: Weights) -> None:
    for port in ports:
        if port.tensor not in work:
            continue
        tensor = work[port.tensor].to(torch.float64)
        span = size * port.width
        part = tensor.narrow(port.axis, port.start, span)
        moved = _along(move, part, port.axis, port.width)
        if span == tensor.shape[port.axis]:
            work[port.tensor] = moved
        else:
            kept = tensor is work[port.tensor] or moved.requires_grad  # what a gradient is taken through stays as it is
            whole = tensor.clone() if kept else tensor
            whole.narrow(port.axis, port.start, span).copy_(moved)
            work[port.tensor] = whole


def _gain_biases(before: Anatomy, after: Anatomy, work: Weights, stored: dict[str, torch.dtype]) -> None:
    """Zero biases for the sites and norms that gain one and are present."""
    if before is after:
        return
    for old, new in zip(before.sites, after.sites, strict=True):
        if new.bias is not old.bias and old.bias is None:
            _zeros(f"{new.name}.bias", f"{new.name}.weight", work, stored)
    for was, now in zip(before.norms, after.norms, strict=True):
        if now.bias is not was.bias and was.bias is None:
            _zeros(f"{now.name}.bias", f"{now.name}.gain", work, stored)


def _zeros(name: str, like: str, work: Weights, stored: dict[str, torch.dtype]) -> None:
    if like in work and name not in work:
        work[name] = torch.zeros(work[like].shape[0], dtype=torch.float64, device=work[like].device)
        stored[name] = stored[like]


def _shift(move: Move, after: Stream, work: Weights) -> None:
    """y′ = y + c. Biases of writers are ports of the stream once they are there; biases of readers take −B c."""
    biases = [port for port in after.writers if port.tensor.endswith(".bias")]
    _on_ports(move, biases, after.size, work)
    for port in after.readers:
        if port.tensor in work:
            c = move.vector().to(work[port.tensor].device, torch.float64)
            weight = work[port.tensor].to(torch.float64).narrow(1, port.start, after.size)
            bias = port.tensor.removesuffix(".weight") + ".bias"
            work[bias] = work[bias].to(torch.float64) - weight @ c


def _fold_batch(anatomy: Anatomy, stream: Stream, work: Weights) -> None:
    """The convolution takes what the batch norm behind it does: W′ = diag(s) W, b′ = s (b − mean) + β with
    s = g / √(var + ε). The norm is gone, and its tensors with it."""
    site = stream.name.removesuffix(".out")
    norm = anatomy.norm(f"{site}.norm")
    held = [f"{norm.name}.{word}" for word in norm.slots]
    here = [name for name in (*held, f"{site}.weight") if name in work]
    if not here:
        return
    if len(here) <= len(held):
        missing = next(name for name in (*held, f"{site}.weight") if name not in work)
        raise MoveError(f"fold of {stream.name} needs {missing} beside {here[0]}")
    gain, shift, mean, var = (work.pop(f"{norm.name}.{word}").to(torch.float64) for word in _OF_BATCH)
    scale = gain / (var + norm.eps).sqrt()
    work[f"{site}.weight"] = work[f"{site}.weight"].to(torch.float64) * scale[:, None]
    work[f"{site}.bias"] = scale * (work[f"{site}.bias"].to(torch.float64) - mean) + shift


_OF_BATCH = ("gain", "bias", "mean", "var")


def _fold(stream: Stream, work: Weights) -> None:
    """Readers take the norm's gain and bias: B′ = B diag(g), b′ = b + B β; then g = 1, β = 0."""
    readers = [port for port in stream.readers if port.tensor in work]
    found = [port.tensor for port in stream.writers if port.tensor in work]
    if not stream.writers or not (readers or found):
        return
    missing = [port.tensor for port in stream.writers if port.tensor not in work]
    if missing:
        raise MoveError(f"fold of {stream.name} needs {missing[0]} beside the tensors that read it")
    values = {name.rpartition(".")[2]: work[name].to(torch.float64) for name in found}
    for port in readers:
        weight = work[port.tensor].to(torch.float64)
        bias = port.tensor.removesuffix(".weight") + ".bias"
        if "bias" in values and bias in work:
            work[bias] = work[bias].to(torch.float64) + weight @ values["bias"]
        work[port.tensor] = weight * values["gain"]
    for name in found:
        work[name] = torch.ones_like(values["gain"]) if name.endswith(".gain") else torch.zeros_like(values["bias"])
