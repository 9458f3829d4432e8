"""Models, their stages, stitches and losses; the models are registered with the Auto classes on import."""

from transformers import AutoModel, AutoModelForImageClassification

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.modeling.modeling_nac import NACForImageClassification, NACModel, NACPreTrainedModel
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification, VMoEModel, VMoEPreTrainedModel
from m2mkd.modeling.stages import split_into_stages


AutoModel.register(NACConfig, NACModel, exist_ok=True)
AutoModel.register(VMoEConfig, VMoEModel, exist_ok=True)
AutoModelForImageClassification.register(NACConfig, NACForImageClassification, exist_ok=True)
AutoModelForImageClassification.register(VMoEConfig, VMoEForImageClassification, exist_ok=True)

__all__ = [
    "NACForImageClassification",
    "NACModel",
    "NACPreTrainedModel",
    "VMoEForImageClassification",
    "VMoEModel",
    "VMoEPreTrainedModel",
    "split_into_stages",
]
