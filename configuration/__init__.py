"""Model configurations, registered with `AutoConfig` on import."""

from transformers import AutoConfig

from m2mkd.configuration.configuration_nac import NACConfig
from m2mkd.configuration.configuration_vmoe import VMoEConfig


for config_class in (NACConfig, VMoEConfig):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

__all__ = ["NACConfig", "VMoEConfig"]
