"""`transformers serve` for artifacts: transformers' own server and flags, with `rg.load` behind them.

    python -m regauge.hosts.transformers.serve OUT --port 8000

Everything is `transformers serve`'s (OpenAI's endpoints, streaming, `--help`); its packages are wanted
(`pip install transformers[serving]`). Models that are no artifacts load as they always do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regauge.artifact.caches import FILE
from regauge.artifact.codec.base import COMPRESSED_TENSORS, REGAUGE
from regauge.errors import SettingError
from regauge.hosts.transformers.hub import model_folder
from regauge.hosts.transformers.load import load
from regauge.plan.caches import asked


@contextmanager
def packed_models(cache: str | None = None) -> Iterator[None]:
    """Within, transformers' server loads artifacts packed; afterwards it is as it was.

    Args:
        cache: what models keep of the past, as `load` takes it; None: as each artifact says.
    """
    from transformers.cli.serving.model_manager import ModelManager

    stock = ModelManager._load_model

    def load_model(self: Any, model_id_and_revision: str, **rest: Any) -> Any:
        from transformers import AutoConfig

        name, revision = model_id_and_revision.rsplit("@", 1)
        quantisation = getattr(AutoConfig.from_pretrained(name, revision=revision), "quantization_config", None) or {}
        folder = model_folder(name, revision)
        kept = cache is not None or (folder / FILE).is_file()
        if not kept and quantisation.get("quant_method") not in (REGAUGE, COMPRESSED_TENSORS):
            return stock(self, model_id_and_revision, **rest)
        if self.quantization is not None:
            raise SettingError(f"{name} is quantised; leave --quantization {self.quantization} out")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else str(self.device)
        return load(folder, device, self.dtype if isinstance(self.dtype, torch.dtype) else None, cache=cache)

    ModelManager._load_model = load_model
    try:
        yield
    finally:
        ModelManager._load_model = stock


PACKAGES = ("fastapi", "uvicorn", "openai")
"""What transformers' server wants."""


def serve(
    model: str, host: str = "localhost", port: int = 8000, device: str = "auto", cache: str | None = None
) -> None:
    """Serves one model until it is interrupted: transformers' server, with artifacts loaded packed.

    Raises:
        SettingError: what the server wants is not installed.
        ModelError: the model cannot be found.
        RecipeError: `cache` is no recipe of one.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingError(f"a server wants {', '.join(missing)}: pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    folder = model_folder(model, None)
    if cache is not None:
        asked(cache)  # or there is nothing to serve it by
    with packed_models(cache):
        Serve(force_model=str(folder), host=host, port=port, device=device)


def main() -> None:
    """The command line of `transformers serve`."""
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    with packed_models():
        app()


if __name__ == "__main__":
    main()
