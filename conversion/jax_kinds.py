"""The V-MoEs of google-research/vmoe, and the ViTs of big_vision and vision_transformer (JAX)."""

from abc import abstractmethod
from typing import ClassVar

from transformers import PreTrainedConfig, PreTrainedModel, ViTForImageClassification

from m2mkd.conversion.jax_tree import check_tree, converted_tree, read_parameters
from m2mkd.conversion.kind import Kind, Request
from m2mkd.conversion.official_models import NameTable, OfficialArguments, shapes_of
from m2mkd.conversion.official_pixels import VMOE_JAX_PIXELS
from m2mkd.conversion.output import Output, Tensors, model_output, on_meta
from m2mkd.conversion.vit_jax import VIT_JAX_TABLE, vit_jax_config, with_vmoe_names
from m2mkd.conversion.vmoe_jax import VMOE_JAX_TABLE, model_section, vmoe_jax_config
from m2mkd.conversion.vmoe_jax_published import PUBLISHED
from m2mkd.errors import ConversionError
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification


class JaxKind(Kind):
    """A parameter tree of flax. At no time there are two copies of it in memory."""

    needs_config = False
    model_class: ClassVar[type[PreTrainedModel]]
    table: ClassVar[NameTable]

    def convert(self, request: Request) -> Output:
        """The whole model."""
        arrays = self.named(read_parameters(request.path))
        model = on_meta(self.model_class, lambda: self.config(arrays, request))
        converted = converted_tree(arrays, self.table)
        check_tree(converted, shapes_of(model.state_dict()), self.table)
        return model_output(model, converted, VMOE_JAX_PIXELS)

    def named(self, arrays: Tensors) -> Tensors:
        """The arrays by the names of google-research/vmoe."""
        return arrays

    @abstractmethod
    def config(self, arrays: Tensors, request: Request) -> PreTrainedConfig:
        """The configuration of the model with these arrays."""


class VMoEJaxKind(JaxKind):
    """A V-MoE of google-research/vmoe."""

    name = "vmoe-jax"
    model_class = VMoEForImageClassification
    table = VMOE_JAX_TABLE

    def config(self, arrays: Tensors, request: Request) -> PreTrainedConfig:
        """See [`JaxKind`]. Without `--config`, the name of the checkpoint must be that of a published one."""
        name = request.path.stem if request.path.is_file() else request.path.name
        if request.content:
            return vmoe_jax_config(arrays, model_section(request.content))
        if name not in PUBLISHED:
            raise ConversionError(
                "arrays do not show how routers choose. Give --config with the `model` section of the model's "
                f"configuration as JSON, or keep the name of a published checkpoint: {', '.join(PUBLISHED)}."
            )
        return vmoe_jax_config(arrays, PUBLISHED[name])


class ViTJaxKind(JaxKind):
    """A ViT of big_vision or vision_transformer (AugReg) with a class token."""

    name = "vit-jax"
    model_class = ViTForImageClassification
    table = VIT_JAX_TABLE

    def named(self, arrays: Tensors) -> Tensors:
        """See [`JaxKind`]."""
        return with_vmoe_names(arrays)

    def config(self, arrays: Tensors, request: Request) -> PreTrainedConfig:
        """See [`JaxKind`]."""
        return vit_jax_config(arrays, OfficialArguments(request.content))
