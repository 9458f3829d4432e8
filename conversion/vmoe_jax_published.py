"""What the arrays of the published checkpoints of google-research/vmoe do not show."""

from typing import Any


def _model(num_selected_experts: int, group_size: int, capacity_factor: float, **moe: Any) -> dict[str, Any]:
    router = {
        "num_selected_experts": num_selected_experts,
        "noise_std": 1.0,
        "importance_loss_weight": 0.005,
        "load_loss_weight": 0.005,
        "dispatcher": {"batch_priority": False, "capacity_factor": capacity_factor},
    }
    return {"encoder": {"moe": {"group_size": group_size, "router": router, **moe}}}


# The `model` sections of that code's configurations, by the names in gs://vmoe_checkpoints, with the capacity of the
# evaluation. For `..._medium` and `eee_s32_last2_ilsvrc2012` none was published: theirs are those of `..._light1`, the
# same model trained for fewer epochs, and of the model fine-tuned from it, with groups of as many images.
PUBLISHED = {
    "vmoe_s32_last2_ilsvrc2012_randaug_light1": _model(2, 8 * 50, 4.0),
    "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012": _model(2, 8 * 145, 1.5),
    "vmoe_s32_last2_ilsvrc2012_randaug_medium": _model(2, 8 * 50, 4.0),
    "vmoe_b16_imagenet21k_randaug_strong": _model(2, 8 * 197, 1.05),
    "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012": _model(2, 8 * 577, 1.5),
    "eee_s32_last2_ilsvrc2012": _model(1, 128 * 50 * 2, 1.5, ensemble_size=2),
    "eee_s32_last2_ilsvrc2012_ft_cifar100": _model(1, 128 * 17 * 2, 1.5, ensemble_size=2),
}
