"""Stages of a V-MoE: transformer layers whose routers have their own losses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from m2mkd.distillation.transformer_stage import TransformerStage
from m2mkd.modeling.modeling_vmoe import VMoEDropPath, balance_losses, has_balance_loss
from m2mkd.modeling.vmoe_routers import VMoERouter


class VMoEStage(TransformerStage):
    """Consecutive layers of a V-MoE. Stitches can be kept between the layers."""

    keeps_stitches = True
    has_experts = True
    interpolates_positions = False

    @property
    def is_stochastic(self) -> bool:
        """Whether a forward in training draws random numbers: dropout, drop path or noisy routers do."""
        return super().is_stochastic or any(
            (isinstance(module, VMoEDropPath) and module.drop_prob > 0)
            or (isinstance(module, VMoERouter) and module.noise_std > 0)
            for module in self.modules()
        )

    @contextmanager
    def auxiliary_losses(self) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
        """Context manager that yields a function for the balance losses of the sparse layers, if any have a weight."""
        recorded: list[tuple[torch.Tensor, ...]] = []
        routers = [module for module in self.modules() if isinstance(module, VMoERouter)]
        hooks = [
            router.register_forward_hook(lambda _module, _inputs, outputs: recorded.append(outputs))
            for router in routers
            if has_balance_loss(self.config)
        ]

        def losses() -> dict[str, torch.Tensor]:
            if not recorded:
                return {}
            clean, noisy, _, _ = zip(*recorded, strict=True)
            return balance_losses(clean, noisy, self.config)

        try:
            yield losses
        finally:
            for hook in hooks:
                hook.remove()
