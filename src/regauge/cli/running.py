"""Commands that run artifacts. They import what they call when called: `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli.options import CACHE, DEBUG, SEED, THREADS


def chat(
    model: Annotated[str, typer.Argument(metavar="OUT", help="An artifact, a transformers directory or a hub id.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Answer with this model too, each under its name.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Say this and leave; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where it runs.")] = "cpu",
    cache: CACHE = None,
    seed: SEED = 0,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Talk to a model, with tokens a second after each answer. Example: regauge chat OUT --against MODEL"""
    from regauge.cli.bars import working
    from regauge.cli.chat import Manner
    from regauge.cli.chat import chat as talk

    with working("chat", quiet=True, threads=threads):
        talk([model, *([against] if against else [])], Manner(temperature, tokens, seed, device, cache), prompt or ())


def sample(
    model: Annotated[str, typer.Argument(metavar="OUT", help="An artifact or a directory of a model of images.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="A .png; default: where OUT's report shows it.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Draw the same with this model too, in rows above.")
    ] = None,
    labels: Annotated[
        str, typer.Option(metavar="N,N", help="Classes, a column each; default: the first ten of the model.")
    ] = "",
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Images of each class.")] = 2,
    guidance: Annotated[float, typer.Option(help="How much more an image should look like its class.")] = 1.5,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest with this share; 0: all.")
    ] = 0.0,
    subnet: Annotated[
        list[str] | None,
        typer.Option(metavar="SUBNET", help="What runs: once for all scales, or repeated, one for each (depth=8)."),
    ] = None,
    cache: CACHE = None,
    seed: SEED = 0,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Draw images of classes as a grid. Example: regauge sample OUT --against MODEL -o grid.png"""
    from regauge.cli.bars import working
    from regauge.cli.show import line
    from regauge.report.drawing import draw
    from regauge.report.pictures import Drawing, numbers

    drawing = Drawing(numbers(labels), rows, seed, guidance, top_k, top_p, tuple(subnet or ()))
    with working("sample", quiet=True, threads=threads):
        line(str(draw(model, out, drawing, against, cache)))


def serve(
    model: Annotated[str, typer.Argument(metavar="OUT", help="An artifact, a transformers directory or a hub id.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
    host: Annotated[str, typer.Option(help="Under which address; 0.0.0.0 for other machines.")] = "localhost",
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="Where it runs.")] = "auto",
    cache: CACHE = None,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """OpenAI's endpoints for a model, by transformers' own server. Example: regauge serve OUT --port 8000"""
    from regauge.cli.bars import working
    from regauge.cli.show import remark
    from regauge.hosts import host_of

    found = host_of(model)
    folder = found.folder(model)  # or there is nothing to serve
    plain = not getattr(found.tokenizer(folder), "chat_template", None)
    speaks = "; it has no chat template, so only /v1/completions answers" if plain else ""
    remark(f"http://{host}:{port}/v1, model {model}{speaks}; Ctrl-C ends it")
    with working("serve", quiet=True, threads=threads):
        found.serve(model, host, port, device, cache)
