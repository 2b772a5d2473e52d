"""Packed modules beside what users do to modules: compile, copy, move, differentiate, register."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from artifacts import choice, decode, encode
from regauge import parts
from regauge.errors import ModelError
from regauge.kernels.cpu.library import available
from regauge.runtime.matrices.modules import PackedLinear, PackedMatrix
from units.test_packed import EIGHT, FORMS, ROUNDING, SIXTEEN, matrix, random


def linear_layer(form: str, dtype: torch.dtype, rows: int = 40, columns: int = 64) -> PackedLinear:
    packed, _ = matrix(FORMS[form], rows, columns, dtype)
    return PackedLinear([packed], None, torch.ones(rows), dtype)


def compile_whole(*forms: str) -> None:
    """torch.compile sees packed layers without a break, few tokens and many. Called in a process of its own, because
    the checks of shapes that tests run under are nothing that it can trace."""
    for form in forms:
        torch.compiler.reset()  # a recompilation for each form would pass torch's limit
        layer = linear_layer(form, torch.bfloat16)
        table, _ = matrix(FORMS[form], 40, 64, torch.bfloat16)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        look_up = torch.compile(table.take, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            for tokens in (1, 30):
                x, some = random(2, tokens, 64, seed=1).to(torch.bfloat16), torch.arange(tokens)
                torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)
                assert look_up(some).equal(table.take(some))


@pytest.mark.parametrize(
    "forms",
    [
        ("int4", "w8a8"),
        pytest.param(("int3-asym", "nf4", "fp8", "lorc", "lorc low", "f16-low", "fp8 inputs"), marks=pytest.mark.slow),
    ],
    ids=lambda forms: "+".join(forms),
)
def test_torch_compiles_a_packed_layer_whole(forms: tuple[str, ...]) -> None:
    code = f"from units import test_packed_modules; test_packed_modules.compile_whole(*{forms}); print('whole')"
    here = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.stdout.split() == ["whole"], done.stderr


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
@pytest.mark.parametrize("form", ["int4", "fp4", "int8-asym"])
def test_the_operators_are_sound(form: str) -> None:
    """torch's own check: schema, fake kernels, gradients, tracing."""
    packed, _ = matrix(FORMS[form], 40, 64, torch.float32)
    assert packed.meta is not None
    arguments = (packed.panels, packed._buffers.get("row_scale"), packed._buffers.get("table"), list(packed.meta))
    x = random(3, 64)
    for wants in (False, True):
        x = x.clone().requires_grad_(wants)
        torch.library.opcheck(torch.ops.regauge.packed_linear.default, (x, *arguments, 3))
        torch.library.opcheck(torch.ops.regauge.packed_integers.default, (x, *arguments, 8))
    torch.library.opcheck(torch.ops.regauge.packed_rows.default, (*arguments, 3, 17, 0))
    torch.library.opcheck(torch.ops.regauge.packed_take.default, (torch.tensor([1, 2, 1]), *arguments, 0))


def test_operators_are_registered_with_the_packed_modules_and_not_before() -> None:
    code = (
        "import regauge, torch; before = hasattr(torch.ops.regauge, 'packed_linear');"
        "import regauge.runtime.matrices.modules;"
        "print(before, hasattr(torch.ops.regauge, 'packed_linear'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("form", ["int4", "w8a8"])
def test_the_gradient_of_the_input_is_through_the_decoded_weights(form: str) -> None:
    packed, w_OI = matrix(FORMS[form], 40, 64, torch.float32)
    x = random(3, 64).requires_grad_()
    packed(x).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w_OI.sum(0).expand(3, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["int4", "nf4", "fp8", "w8a8"])
def test_a_copy_stands_alone(form: str) -> None:
    layer = linear_layer(form, torch.float32)
    x = random(3, 64)
    wanted = layer(x)
    other = copy.deepcopy(layer)
    for name, buffer in layer.named_buffers():
        assert other.get_buffer(name).data_ptr() != buffer.data_ptr()
        buffer.zero_()
    assert other(x).equal(wanted)
    assert not layer(x).equal(wanted)


@pytest.mark.parametrize("form", ["int4", "nf4", "fp8"])
def test_another_dtype_leaves_steps_and_tables_as_they_are(form: str) -> None:
    layer, x = linear_layer(form, torch.float32), random(3, 64)
    wanted = layer(x)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    layer.bias = torch.nn.Parameter(torch.ones(40), requires_grad=False)
    assert layer(x).equal(wanted)


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
def test_panels_do_not_leave_the_cpu() -> None:
    layer = linear_layer("int4", torch.float32)

    class Elsewhere:
        """A tensor that says that it is on another device."""

        device = torch.device("cuda", 0)

    with pytest.raises(ModelError, match=r"cannot go to cuda:0; load it there: rg.load\(path, device='cuda:0'\)"):
        layer.parts[0]._apply(lambda tensor: Elsewhere())
    assert layer.to("meta")(torch.zeros(3, 64, device="meta")).shape == (3, 40)


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
def test_activations_are_rounded_as_asked() -> None:
    x = random(5, 64, seed=1)
    errors = {}
    for name in ("int8", "int16", "float32"):
        codes = encode(random(208, 64), FORMS["int4"])
        packed = PackedMatrix(codes, parts.format_of(FORMS["int4"].point), torch.float32, activations=name)
        wanted = x.double() @ decode(codes, FORMS["int4"]).double().T
        errors[name] = float((packed(x).double() - wanted).norm() / wanted.norm())
    assert 2e-3 < errors["int8"] < EIGHT
    assert 5e-6 < errors["int16"] < SIXTEEN
    assert errors["float32"] < ROUNDING[torch.float32]


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
def test_what_panels_would_pad_too_much_is_held_as_before() -> None:
    """A group of 24 is 24 codes of 4 bits, but of 3 bits no whole blocks of 32; and one row of 300,000 would be 16."""
    assert matrix(choice("int4", "group:24", "bf16"), 64, 96, torch.bfloat16)[0].native is not None
    assert matrix(choice("int3", "group:24", "bf16"), 64, 96, torch.bfloat16)[0].native is None
    assert matrix(choice("int4"), 1, 300_000, torch.bfloat16)[0].native is None
