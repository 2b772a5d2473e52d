"""Our own models, where transformers has none: written as transformers' models are, so that one host reads all of them.

`OWN` names what there is; `register` makes transformers' Auto classes know one of them, when it is first asked for.
"""

from __future__ import annotations

import importlib

OWN = {
    "regauge_resnet": ("regauge.hosts.regauge.configuration_resnet", "regauge.hosts.regauge.modeling_resnet"),
    "regauge_var": ("regauge.hosts.regauge.configuration_var", "regauge.hosts.regauge.modeling_var"),
}
"""`model_type` → modules of its config and of its model."""


def register(model_type: str) -> bool:
    """Makes transformers know a model type of ours; whether it is one."""
    if model_type not in OWN:
        return False
    from transformers import AutoConfig, AutoModel

    config, model = (importlib.import_module(name) for name in OWN[model_type])
    AutoConfig.register(model_type, config.CONFIG, exist_ok=True)
    AutoModel.register(config.CONFIG, model.MODEL, exist_ok=True)
    return True
