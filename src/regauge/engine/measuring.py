"""`measure A [B ...]`: opens models through their host, and has them measured side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache as once
from pathlib import Path

import torch

from regauge import parts
from regauge.artifact.files import weight_bytes
from regauge.artifact.sentences import MODULES, modules
from regauge.engine.room import LIBRARIES
from regauge.engine.scoring import scores, wanted
from regauge.engine.seeing import refuse_asked, refuse_images, seen
from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import BudgetError, ModelError, SettingError
from regauge.hosts import host_of
from regauge.hosts.states import SPILL
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.measure import images
from regauge.measure.arithmetic import Arithmetic, under
from regauge.measure.compare import LOGITS, LONG, Comparison, Method, side_by_side
from regauge.measure.cost import ORIGINAL, RUNTIME, Model
from regauge.measure.images import DTYPE
from regauge.measure.subject import Facts, Reader, Subject, comparable
from regauge.plan.caches import Asked, asked
from regauge.text.corpora import Where, corpus
from regauge.text.length import window_length
from regauge.text.split import pieces
from regauge.text.tokens import Tokenizer, frame, within
from regauge.text.windows import Windows, cut

TOKENS = 32768  # most tokens of text that are read
SAMPLED = 8192
LENGTH = 256  # tokens of a window of given text


def measure(
    models: Sequence[str | Path],
    eval: Where | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    rounds: int = 7,
    progress: Watcher | None = None,
    max_memory: int | None = None,
    tasks: str | Path | Sequence[str] | None = None,
    cache: Asked | None = None,
    long: int = 0,
    arithmetic: str | None = None,
) -> Comparison:
    """Measures models side by side.

    Args:
        models: directories or hub ids of sources and artifacts; the first is the original.
        eval: text; None: sampled from the first model, which must then be a source.
        dtype: of activations while speed and memory are measured; quality is measured in float32.
        max_memory: bytes that this process may take at its highest; models are timed one at a time where two are too
            much, and figures of quality are the same.
        tasks: names of lm-eval's, or files of questions (`measure.tasks`); one, several with commas, or a list.

        cache: what all models but the first keep of the past, as `load` takes it, in place of what they say; with one
            model alone, it is held against itself.
        long: tokens that the first model writes greedily behind some prompts, and the others read (`measure.long`).
        arithmetic: how products of all models but the first are taken (`measure.arithmetic`); with one model alone, it
            is held against itself.

    Raises:
        RecipeError: `cache` is no recipe of one, `arithmetic` names none.
        BudgetError: that is too little; says what would do.
        ModelError: no model, or one that cannot be loaded.
        TextError: the text cannot be used.
    """
    if not models:
        raise ModelError("there is nothing to measure: name a model, and others to hold against it.")
    questions = None if tasks is None else wanted(tasks)
    clock = Clock(progress or nobody)
    original = _subject(_names(models)[0], models[0], None)
    with quiet_torch(), host_of(models[0]).unsaid():
        if original.facts().pictured:
            more = {"tasks": tasks, "cache": cache, "long": long, "arithmetic": arithmetic, "max-memory": max_memory}
            refuse_asked(original.name, more)
            return _images(
                [original, *(_subject(*one, None) for one in list(zip(_names(models), models, strict=True))[1:])],
                eval,
                Method(seed, DTYPE, rounds, say=clock.say),
            )
    refuse_images(original.name, eval)
    apart = max_memory is not None and _one_at_a_time(models, max_memory)
    kept = None if cache is None else asked(cache)
    taken = None if arithmetic is None else _arithmetic(arithmetic, models, tasks is not None or long > 0)
    models = [*models, *models] if (taken is not None or cache is not None) and len(models) == 1 else models
    caches = [None, *([cache] * (len(models) - 1))]
    names = _names(models)
    if cache is not None:
        names = [names[0], *(f"{name}, cache {'none' if kept is None else kept.name}" for name in names[1:])]
    if taken is not None:
        names = [names[0], *(f"{name}, {taken.name}" for name in names[1:])]
    subjects = [original, *(_subject(*one) for one in list(zip(names, models, caches, strict=True))[1:])]
    notes = () if eval is not None else ("no text was given: the first model sampled it from itself",)
    if taken is not None:
        subjects = [subjects[0], *(replace(one, outputs=_under(taken, one.outputs)) for one in subjects[1:])]
        notes = (*notes, f"quality is under {taken.name}, which is computed and not run: speed and memory are ordinary")
    host = host_of(models[0])
    with quiet_torch(), host.unsaid():

        def text(found: Facts) -> Windows:
            tokenizer: Tokenizer = host.tokenizer(host.folder(str(models[0])))
            windows = _sampled(models[0], tokenizer, seed) if eval is None else _given(eval, tokenizer, found, seed)
            for path in models[1:]:
                _same_tokens(windows, tokenizer, models[0], path)
            return windows

        found = side_by_side(subjects, text, Method(seed, dtype, rounds, apart, long, clock.say), notes)
        if questions is None:
            return found
        own: Tokenizer = host.tokenizer(host.folder(str(models[0])))
        return found.model_copy(update={"tasks": scores(questions, subjects, own, seed, clock.say)})


def _images(subjects: Sequence[Subject], eval: Where | None, method: Method) -> Comparison:
    method.say("open", "")
    every = [subject.facts() for subject in subjects]
    comparable([subject.name for subject in subjects], every)
    return images.side_by_side(subjects, every[0], seen(subjects, eval, every[0]), method)


def _arithmetic(text: str, models: Sequence[str | Path], more: bool) -> Arithmetic:
    """The arithmetic that a user names.

    Raises:
        RecipeError: there is none of that name.
        SettingError: it is asked for beside what is run, not computed; or of an artifact.
    """
    found: Arithmetic = parts.build(parts.ARITHMETIC, parts.read(parts.ARITHMETIC, text, parts.MEASURE))
    if more:
        raise SettingError(f"{found.name} is evaluated on a text: leave out tasks and long, which run the model.")
    for path in models[1:] or models:
        if Path(path).is_dir() and host_of(path).packed(path):
            raise SettingError(
                f"{path} is stored in codes, and its products are kernels of their own, which {found.name} does not "
                "reach; measure a plain checkpoint under it."
            )
    return found


def _under(arithmetic: Arithmetic, read: Reader) -> Reader:
    return lambda batches, prompt=None: under(arithmetic, read(batches, prompt))


def _one_at_a_time(models: Sequence[str | Path], bound: int) -> bool:
    """Whether models must be timed one at a time to keep a bound. Plain checkpoints are mapped and take nothing.

    Raises:
        BudgetError: not even one would do.
    """
    packed = [weight_bytes(path) if Path(path).is_dir() and host_of(path).packed(path) else 0 for path in models]
    read = [size * 3 // 2 if size else _read(path) for size, path in zip(packed, models, strict=True)]
    process = anonymous_bytes() + LIBRARIES
    quality = process + read[0] + max(read[1:], default=0) + 3 * 4 * LOGITS
    least = max(quality, process + max(packed))
    if least > bound:
        raise BudgetError(
            f"measuring these takes {least:,} bytes of memory at the least, and --max-memory allows {bound:,}; "
            "give it that."
        )
    return process + sum(packed) > bound


def _read(path: str | Path) -> int:
    """Bytes while a plain checkpoint is read block by block in float32: a block, and its states where they are few."""
    source = host_of(path).open(path)
    anatomy = source.anatomy
    sizes = [sum(4 * s.shape[0] * s.shape[1] for s in anatomy.in_block(block)) for block in range(anatomy.blocks)]
    states = 4 * TOKENS * anatomy.hidden
    return (0 if source.dtype is torch.float32 else max(sizes, default=0)) + 2 * min(states, SPILL)


def _names(models: Sequence[str | Path]) -> list[str]:
    """Last parts of the paths, numbered where they are not unique."""
    found: list[str] = []
    for path in models:
        name = Path(str(path).rstrip("/")).name or str(path)
        found.append(name if name not in found else f"{name} ({len(found) + 1})")
    return found


def _subject(name: str, path: str | Path, cache: Asked | None) -> Subject:
    host = host_of(path)

    def ways(dtype: torch.dtype) -> Mapping[str, Model]:
        found = host.ways(host.load(path, dtype=dtype, cache=cache))
        return {RUNTIME: found.runtime} if found.own is None else {RUNTIME: found.runtime, ORIGINAL: found.own}

    return Subject(
        name=name,
        path=path,
        facts=once(lambda: host.facts(path, cache)),
        outputs=lambda batches, prompt=None: host.outputs(path, batches, cache, prompt),
        ways=ways,
        stored=weight_bytes(path) if Path(path).is_dir() else None,
        notes=_unread(name, host.folder(str(path))),
    )


def _unread(name: str, folder: Path) -> tuple[str, ...]:
    """That a sentence encoder is measured by its transformer alone."""
    beside = [module.name for module in modules(folder) if module.path]
    if not beside:
        return ()
    return (
        f"{name} is measured by the mean of its last hidden states: {', '.join(beside)} of its {MODULES} are not run, "
        "nor their bytes counted",
    )


def _same_tokens(windows: Windows, tokenizer: Tokenizer, first: str | Path, path: str | Path) -> None:
    """Refuses a model whose own tokenizer cuts the text otherwise: the tokens would mean other words to it.

    Raises:
        ModelError: names both.
    """
    host = host_of(path)
    try:
        other: Tokenizer = host.tokenizer(host.folder(str(path)))
    except ModelError:
        return  # it has none of its own
    for ids in windows.ids[:4]:
        text = tokenizer.decode(ids.tolist())
        if tokenizer.encode(text) != other.encode(text):
            raise ModelError(
                f"{path} has another tokenizer than {first}: it cuts {text[:40]!r} into other tokens, and models are "
                "compared on the same tokens; measure models that share a tokenizer."
            )


def text_of(path: str | Path, text: Where | None, found: Facts, seed: int) -> Windows:
    """The windows that a model is scored on: of a text, or of what it samples from itself."""
    host = host_of(path)
    tokenizer: Tokenizer = host.tokenizer(host.folder(str(path)))
    return _sampled(path, tokenizer, seed) if text is None else _given(text, tokenizer, found, seed)


def _given(text: Where, tokenizer: Tokenizer, found: Facts, seed: int) -> Windows:
    read, before = corpus(text), frame(tokenizer)[0]
    wanted = LONG if found.keeps else LENGTH
    length = min(wanted, found.most or wanted)
    windows = cut(pieces(read), tokenizer, length, description=read.description, before=before).take(TOKENS, seed)
    within(windows.ids, found.vocabulary, tokenizer)
    return windows


def _sampled(path: str | Path, tokenizer: Tokenizer, seed: int) -> Windows:
    host = host_of(path)
    source = host.open(path)
    length = window_length(source.parameters(), host.context(source))
    ids_NT, told = host.sample(source, tokenizer, SAMPLED // length, length, seed)
    rows = tuple(ids_NT.unbind())
    sizes = tuple(max(1, len(tokenizer.decode(row.tolist()).encode())) for row in rows)
    return Windows(rows, tuple(range(len(rows))), sizes, f"sampled from the first model, from {told}")
