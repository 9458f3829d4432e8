"""Model configurations, registered with `AutoConfig` on import."""

from transformers import AutoConfig

from m2mkd.configuration.configuration_vmoe import VMoEConfig


AutoConfig.register(VMoEConfig.model_type, VMoEConfig, exist_ok=True)

__all__ = ["VMoEConfig"]
