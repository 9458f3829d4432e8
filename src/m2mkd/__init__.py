"""m2mkd: modular vision models (V-MoE, NAC) distilled module by module from a pretrained ViT.

`import m2mkd` registers the model types `vmoe` and `nac` with the Auto classes of transformers, so that
`AutoModelForImageClassification.from_pretrained` loads our folders. The training half (`M2MKDTrainer`, `M2MKDConfig`)
is imported on first use: loading a published model needs none of it.
"""

import sys
from importlib import import_module
from typing import Any


# The console script imports the models only when a command does some work: its help does not need them.
if "m2mkd_cli" not in sys.modules:
    from m2mkd.configuration import NACConfig, VMoEConfig
    from m2mkd.modeling import (
        NACForImageClassification,
        NACModel,
        NACPreTrainedModel,
        VMoEBackbone,
        VMoEForImageClassification,
        VMoEModel,
        VMoEPreTrainedModel,
    )


__version__ = "0.1.0"

_LAZY = {
    "AlignmentTrainer": "m2mkd.trainer.alignment_trainer",
    "M2MKDConfig": "m2mkd.trainer.m2mkd_config",
    "M2MKDTrainer": "m2mkd.trainer.m2mkd_trainer",
    "TargetCache": "m2mkd.distillation.target_cache",
    "export_hub_code": "m2mkd.hub.code_export",
    "split_into_stages": "m2mkd.distillation.split",
    "meta_from_teacher": "m2mkd.distillation.meta_from_teacher",
    "upcycle": "m2mkd.distillation.upcycling",
}

__all__ = [
    "AlignmentTrainer",
    "M2MKDConfig",
    "M2MKDTrainer",
    "NACConfig",
    "NACForImageClassification",
    "NACModel",
    "NACPreTrainedModel",
    "TargetCache",
    "VMoEBackbone",
    "VMoEConfig",
    "VMoEForImageClassification",
    "VMoEModel",
    "VMoEPreTrainedModel",
    "export_hub_code",
    "meta_from_teacher",
    "split_into_stages",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_LAZY.get(name, "m2mkd.modeling")), name)
    raise AttributeError(f"module 'm2mkd' has no attribute '{name}'; its public names are {__all__}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
