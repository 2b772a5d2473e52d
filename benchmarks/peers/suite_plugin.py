"""A pytest plugin: transformers' own model tests on models that Regauge compressed and loaded.

`transformers_suite.py` loads it with `-p suite_plugin` and says by SUITE_FAMILIES which families' classes are ours;
none: every test gets transformers' plain model, with the same random numbers.

A class of such a family, called with a config as tests do, then draws the same random weights as ever, writes them
with `save_pretrained`, compresses the folder with `regauge.apply`, and returns what `regauge.load` makes of it, in
training mode and with gradients, as a constructor leaves a model. Nothing else of the model is touched. A loaded model
refuses `save_pretrained`, which is checked each time, and its artifact is copied instead; `from_pretrained` of such a
copy is `regauge.load`.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib
import inspect
import json
import os
import random
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

PRESET = os.environ.get("SUITE_PRESET", "rtn-w8")
ACTIVATIONS = os.environ.get("SUITE_ACTIVATIONS")
FAMILIES = os.environ.get("SUITE_FAMILIES", "").split()
FOLDER = Path(os.environ["SUITE_FOLDER"])
LIMIT = 2e-3
"""How far logits of the native step may be, as a part of their size: both round what they multiply to 16 bits."""
SPOILT = "SUITE_SPOILT" in os.environ
MARKERS = """generate is_pipeline_test torch_compile_test torch_export_test training_ci tensor_parallel_ci
    not_device_test accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test all_flash_attn_test"""

counts: Counter[str] = Counter()  # "family: what"
family = ""  # whose test is running
furthest = 0.0  # of all answers of the native step, from those of transformers' modules
_state = threading.local()
_ours: set[type] = set()
_save, _from_pretrained = PreTrainedModel.save_pretrained, PreTrainedModel.from_pretrained.__func__


# --- what tests of another version need -------------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    for name in MARKERS.split():
        config.addinivalue_line("markers", f"{name}: transformers' own")
    for path in FOLDER.glob("tests/**/*.py"):
        if path.name.startswith(("test_modeling", "test_tensor", "causal_lm")) or path.parent.name == "generation":
            _fill_in(path)


def _fill_in(path: Path) -> None:
    """Names that a test file imports from transformers and this one lacks: to use one is an error, not to import it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("transformers."):
            try:
                module = importlib.import_module(str(node.module))
            except ImportError:
                continue
            for name in [alias.name for alias in node.names if not hasattr(module, alias.name)]:
                setattr(module, name, functools.partial(_absent, f"{node.module}.{name}"))


def _absent(name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"this transformers has no {name}")


def tell(what: str, times: int = 1) -> None:
    counts[f"{family}: {what}"] += times


def pytest_runtest_setup(item: Any) -> None:
    """Plain and loaded models see the same numbers."""
    global family
    family = item.path.parent.name
    random.seed(9)
    numpy.random.seed(9)  # noqa: NPY002  # tests draw from it
    torch.manual_seed(9)
    for module in list(sys.modules.values()):
        if (getattr(module, "__name__", "") or "").startswith("tests.") and hasattr(module, "global_rng"):
            module.global_rng.seed(9)


def _unpad(mixin: Any) -> None:
    """Testers pad at random on the right, where the native step leaves decoding to transformers; what tests of padding
    make themselves stays."""
    prepare = mixin.prepare_config_and_inputs_for_generate

    @functools.wraps(prepare)
    def unpadded(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, inputs = prepare(self, *args, **kwargs)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return config, inputs

    mixin.prepare_config_and_inputs_for_generate = unpadded


# --- loaded models in place of plain ones ------------------------------------------------------------------------


def pytest_collection_finish(session: Any) -> None:
    _unpad(sys.modules["tests.generation.test_utils"].GenerationTesterMixin)
    if not FAMILIES or _ours:
        return
    for family in FAMILIES:
        home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for thing in list(vars(home).values()):
            own = inspect.isclass(thing) and issubclass(thing, PreTrainedModel) and thing.__module__ == home.__name__
            if own and not thing.__name__.endswith("PreTrainedModel"):
                _replace(thing)
    PreTrainedModel.save_pretrained = _saved
    PreTrainedModel.from_pretrained = classmethod(_read)
    _watch()


def _replace(made: type) -> None:
    """Lets `made(config)` give a loaded model. The class stays what it is: tests ask for its name and its methods."""
    _ours.add(made)
    init: Any = made.__init__  # type: ignore[misc]  # of this class alone

    @functools.wraps(init)
    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.__dict__.pop("suite_ready", False):
            init(self, *args, **kwargs)

    def create(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("config")
        meta = torch.get_default_device().type == "meta"
        if cls is not made or not isinstance(config, PreTrainedConfig) or meta or getattr(_state, "plain", False):
            return object.__new__(cls)
        model = _loaded(cls, args, kwargs, config)
        model.__dict__["suite_ready"] = True
        return model

    made.__init__, made.__new__ = begin, staticmethod(create)  # type: ignore[misc,assignment,method-assign]


@contextmanager
def _plain() -> Iterator[None]:
    """Constructors give transformers' own models here."""
    before, _state.plain = getattr(_state, "plain", False), True
    try:
        yield
    finally:
        _state.plain = before


def _loaded(cls: type, args: Any, kwargs: Any, config: Any) -> Any:
    with _plain():
        plain: Any = cls(*args, **kwargs)
        digest = hashlib.sha256(f"{cls.__name__} {config.to_json_string()} {plain.dtype}".encode())
        for key, tensor in plain.state_dict().items():
            digest.update(key.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        artifact = _artifact(plain, digest.hexdigest()[:24])
    model = _opened(artifact, None, config._attn_implementation)
    if plain.is_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.requires_grad_(True).train()


def _artifact(plain: Any, name: str) -> Path:
    """The model compressed, in a folder of its own; the same weights are compressed once."""
    import regauge as rg

    found = FOLDER / "artifacts" / name
    if not found.exists():
        source, built = (FOLDER / "artifacts" / f"{name}-{os.getpid()}-{what}" for what in ("source", "built"))
        _save(plain, str(source))
        rg.apply(PRESET, source, out=built)
        tell("artifacts built")
        shutil.rmtree(source)
        try:
            built.rename(found)
        except OSError:  # the other worker was first
            shutil.rmtree(built)
    return found


def _opened(artifact: Path, dtype: Any, attention: str | None) -> Any:
    import regauge as rg

    with _plain():
        model = rg.load(artifact, dtype=dtype, activations=ACTIVATIONS)
    if not getattr(model, "is_quantized", False):
        raise AssertionError("the model under test is not a compressed one")
    if attention and model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    model.__dict__["suite_artifact"] = artifact
    tell("models loaded")
    return model


def _saved(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
    artifact = self.__dict__.get("suite_artifact")
    if artifact is None:
        return _save(self, folder, *args, **kwargs)
    try:
        _save(self, folder, *args, **kwargs)
    except ValueError as refusal:
        if "not serializable" not in str(refusal) and "quantiz" not in str(refusal):
            raise
    else:
        raise AssertionError("save_pretrained wrote a loaded model")
    if Path(folder) != artifact:
        shutil.copytree(artifact, folder, dirs_exist_ok=True)
    tell("artifacts copied for save_pretrained")
    return None


def _read(cls: type, *args: Any, **kwargs: Any) -> Any:
    if "pretrained_model_name_or_path" in kwargs:
        return _read(cls, kwargs.pop("pretrained_model_name_or_path"), *args, **kwargs)
    name, *args = args
    config = Path(str(name)) / "config.json"
    told_apart = {"dtype", "torch_dtype", "attn_implementation", "output_loading_info", "device_map"}
    ours = config.exists() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    if not ours or cls not in _ours or args or kwargs.keys() - told_apart:
        with _plain():
            return _from_pretrained(cls, name, *args, **kwargs)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    model = _opened(Path(str(name)), dtype, kwargs.get("attn_implementation"))
    info = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    return (model, info) if kwargs.get("output_loading_info") else model


# --- what is told -------------------------------------------------------------------------------------------------


def _copied(cache: Any) -> Any:
    """A cache as it is now; tensors that came out of a graph are not copied as they stand."""
    held = [tensor for layer in getattr(cache, "layers", ()) for tensor in vars(layer).values()]
    return copy.deepcopy(cache, {id(one): one.detach().clone() for one in held if getattr(one, "grad_fn", None)})


def _held(model: Any, logits: torch.Tensor, args: Any, kwargs: Any) -> None:
    """Every answer of the native step is compared with that of transformers' own modules on the same packed weights."""
    global furthest
    from regauge.hosts.transformers.owned import method

    with torch.no_grad():
        wanted = method(model, "forward")(*args, **kwargs).logits
    apart = float((logits - wanted).norm() / wanted.norm())
    furthest = max(furthest, apart)
    if not apart < LIMIT:
        raise AssertionError(f"the native step's logits are {apart:.1e} of their size from those of the modules")


def _watch() -> None:
    """Counts the calls of `generate` that the native step served, and what kept it from others."""
    from regauge.hosts.transformers.plug import NativeStep

    serve, generate, eager = NativeStep.serve, GenerationMixin.generate, NativeStep._eager

    @functools.wraps(serve)
    def counted(self: Any, args: Any, kwargs: Any) -> Any:
        cache = _copied(kwargs.get("past_key_values"))
        found = serve(self, args, kwargs)
        if found is not None:
            tell("calls of the native step")
            if SPOILT:
                found["logits"] = found.logits = found.logits.roll(1, -1)
            _held(self.model, found.logits, args, kwargs | {"past_key_values": cache})
        return found

    @functools.wraps(eager)
    def why(self: Any, reason: str) -> None:
        tell(f"not native: {reason}")
        eager(self, reason)

    @functools.wraps(generate)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = counts[f"{family}: calls of the native step"]
        try:
            return generate(self, *args, **kwargs)
        finally:
            if "suite_artifact" in self.__dict__:
                tell("generate")
                tell("generate, native", counts[f"{family}: calls of the native step"] > before)

    NativeStep.serve, NativeStep._eager, GenerationMixin.generate = counted, why, counting


def pytest_sessionfinish(session: Any) -> None:
    if not hasattr(session.config, "workerinput") and session.config.getoption("numprocesses", None):
        return
    name = getattr(session.config, "workerinput", {}).get("workerid", "alone")
    where = FOLDER / f"told-{'ours' if FAMILIES else 'plain'}-{name}.json"
    where.write_text(json.dumps({"counts": counts, "furthest": furthest}), encoding="utf-8")
