"""The models; they are registered with the Auto classes on import."""

from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
)

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.modeling.modeling_nac import NACForImageClassification, NACModel, NACPreTrainedModel
from m2mkd.modeling.modeling_vmoe import (
    VMoEBackbone,
    VMoEForImageClassification,
    VMoEModel,
    VMoEPreTrainedModel,
)


for config_class in (NACConfig, VMoEConfig):
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": ViTImageProcessorPil}, exist_ok=True)
AutoBackbone.register(VMoEConfig, VMoEBackbone, exist_ok=True)
AutoModel.register(NACConfig, NACModel, exist_ok=True)
AutoModel.register(VMoEConfig, VMoEModel, exist_ok=True)
AutoModelForImageClassification.register(NACConfig, NACForImageClassification, exist_ok=True)
AutoModelForImageClassification.register(VMoEConfig, VMoEForImageClassification, exist_ok=True)

__all__ = [
    "NACForImageClassification",
    "NACModel",
    "NACPreTrainedModel",
    "VMoEBackbone",
    "VMoEForImageClassification",
    "VMoEModel",
    "VMoEPreTrainedModel",
]
