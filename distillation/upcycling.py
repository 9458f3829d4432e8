"""Sparse upcycling (arXiv 2212.05055): a V-MoE whose experts start as copies of a dense model's MLPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.distillation.sizes import pair, patch_grid
from m2mkd.distillation.split import count_layers, split_into_stages
from m2mkd.distillation.stage import Stage
from m2mkd.errors import StageError
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification
from m2mkd.modeling.vmoe_routers import VMoELinearRouter


# The experts' tensors, and those of a dense MLP that they are copies of.
_EXPERTS = {
    ".experts.up_proj": ".fc1.weight",
    ".experts.up_proj_bias": ".fc1.bias",
    ".experts.down_proj": ".fc2.weight",
    ".experts.down_proj_bias": ".fc2.bias",
}
_BATCH_SIZE = 32
_POSITIONS = "vmoe.embeddings.position_embeddings"
# Fields that must be the dense model's. The logits also depend on `layer_norm_eps`, but hardly.
_FIXED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias"),
    *("num_channels", "patch_size", "image_size", "num_labels"),
)


def upcycle(
    dense_model: PreTrainedModel,
    num_experts: int = 8,
    layers: str | Sequence[int] = "every-other",
    *,
    approximate: bool = False,
    noise_std: float = 0.0,
    router_images: torch.Tensor | None = None,
    **overrides: Any,
) -> VMoEForImageClassification:
    """
    Build a V-MoE from a dense classifier (arXiv 2212.05055, section 2.1). In the sparse layers, every expert is a copy
    of the dense MLP and the router is new; everything else is copied. With normalized top-k weights (`norm_topk_prob`,
    the default), it starts with the dense model's logits; [`logit_difference`] measures how far it is from them.

    Args:
        dense_model (`PreTrainedModel`): A ViT, DeiT or DINOv2 (without SwiGLU) classifier, or a V-MoE without experts.
        num_experts (`int`): Experts in each sparse layer.
        layers (`str` or `Sequence[int]`): Sparse layers: `"all"`, `"every-other"` (1, 3, 5, …; Every-2 of V-MoE, arXiv
            2106.05974), `"last-2"` (the last two of these, V-MoE's Last-2), or indices.
        approximate (`bool`): Whether to leave out what a V-MoE cannot express, and start near the dense model: a
            DeiT's distillation token and its head, the half of a DINOv2's head that reads the mean of the patches.
        noise_std (`float`): See [`add_noise_to_experts`].
        router_images (`torch.Tensor`, *optional*): Images for [`init_routers_from_centroids`]. `None`: the routers are
            drawn at random, with the standard deviation `initializer_range`.
        overrides: Other fields of [`VMoEConfig`], e.g. `num_experts_per_tok` (with 1, a normalized weight is always 1:
            routers learn from their balance losses only). For another `image_size`, position embeddings are
            resampled as in [`upcycle_into`].

    Returns:
        `VMoEForImageClassification`: In float32, in the dense model's mode and on its device; they share no tensor.

    Raises:
        `StageError`: the dense model cannot be expressed as a V-MoE, or an argument is not valid.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from m2mkd import upcycle

    >>> dense = ViTForImageClassification(ViTConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64))
    >>> upcycle(dense, num_experts=4, layers="last-2").config.moe_layers
    [9, 11]

    ```"""
    config = _upcycled_config(dense_model, num_experts, layers, overrides)
    with torch.device(dense_model.device):
        student = VMoEForImageClassification(config).float().train(dense_model.training)
    upcycle_into(student, dense_model, approximate=approximate, zoom_positions="image_size" in overrides)
    add_noise_to_experts(student, noise_std)
    if router_images is not None:
        init_routers_from_centroids(student, router_images)
    return student


def _upcycled_config(
    dense_model: PreTrainedModel, num_experts: int, layers: str | Sequence[int], overrides: dict[str, Any]
) -> VMoEConfig:
    unknown = sorted(overrides.keys() - ({field.name for field in fields(VMoEConfig)} - {"moe_layers"}))
    if unknown:
        raise StageError(f"{unknown} are no fields of VMoEConfig that can be set here; `layers` sets `moe_layers`.")
    given = _dense_fields(dense_model)
    del given["num_labels"]  # transformers counts the names
    copied = ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
    given |= {field: getattr(dense_model.config, field) for field in (*copied, "id2label", "label2id")}
    given |= {"num_experts": num_experts, "moe_layers": sparse_layers(layers, given["num_hidden_layers"])}
    try:
        return VMoEConfig(**{**given, **overrides})
    except StrictDataclassError as error:
        raise StageError(f"There is no such V-MoE: {error.__cause__ or error}") from error


def sparse_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """
    Indices of the layers that become sparse, see [`upcycle`]. Raises `StageError` if there are none, or for an unknown
    word.
    """
    every_other = list(range(1, num_layers, 2))
    words = {"every-other": every_other, "last-2": every_other[-2:], "all": list(range(num_layers))}
    if isinstance(layers, str) and layers not in words:
        raise StageError(f"`layers` is {layers!r}; it must be one of {', '.join(words)}, or a list of layer indices.")
    chosen = words[layers] if isinstance(layers, str) else list(layers)
    if not chosen or any(type(index) is not int for index in chosen):
        raise StageError(f"`layers` is {layers!r}; give at least one of the {num_layers} layers, by its index from 0.")
    return chosen


@torch.no_grad()
def upcycle_into(
    student: VMoEForImageClassification,
    dense_model: PreTrainedModel,
    *,
    approximate: bool = False,
    keep_head: bool = False,
    zoom_positions: bool = False,
) -> None:
    """
    Give an existing V-MoE the weights of a dense model in place, as [`upcycle`] does. Its routers keep their own
    weights. With `keep_head` and `zoom_positions`, this is the initialization of google-research/vmoe from a ViT. From
    a V-MoE with the same sparse layers, experts and routers are copied too (its initialization for fine-tuning).

    Args:
        student (`VMoEForImageClassification`)
        dense_model (`PreTrainedModel`)
        approximate (`bool`): See [`upcycle`].
        keep_head (`bool`): Whether the student keeps its own classifier.
        zoom_positions (`bool`): Whether the dense model's position embeddings are resampled to the student's grid of
            patches: bilinear with aligned corners, by `scipy.ndimage.zoom` as in google-research/vmoe. Like there, the
            last row or column is 0 for a few sizes (8 to 26 patches a side, 28 to 14), where scipy rounds beyond the
            edge.

    Raises:
        `StageError`: the two differ in a size or in the activation, or the dense model cannot be expressed as a V-MoE.
    """
    stage = _whole(dense_model)
    given = stage.vmoe_weights()
    lost = stage.lost_in_vmoe(with_head=not keep_head)
    if lost and not approximate:
        raise StageError(
            f"A V-MoE has one special token, and its head reads only that one. It cannot express {' and '.join(lost)} "
            f"of a {dense_model.config.model_type}. Pass `approximate=True` (on the command line, --approximate) to "
            "leave that out and to start near the dense model, or use a ViT."
        )
    _check_same_sizes(student, dense_model, keep_head, zoom_positions)
    grids = patch_grid(dense_model.config), patch_grid(student.config)
    if grids[0] != grids[1]:
        given[_POSITIONS] = resample_positions(given[_POSITIONS], *grids)
    own = student.state_dict()
    if keep_head:
        given |= {name: tensor for name, tensor in own.items() if name.startswith("classifier.")}
    weights, unused = {}, set(given)
    for name in own:
        dense_name = next((name.replace(*names) for names in _EXPERTS.items() if name.endswith(names[0])), None)
        if name in given:
            weights[name] = given[name]
        elif dense_name in given:
            weights[name] = given[dense_name].expand(student.config.num_experts, *given[dense_name].shape)
        elif ".router." in name:
            weights[name] = own[name]
        unused -= {name, dense_name}
    _check_same_tensors(own, weights, unused)
    student.load_state_dict(weights, strict=True)


@torch.no_grad()
def add_noise_to_experts(student: VMoEForImageClassification, noise_std: float) -> None:
    """
    Add normal noise to the weights of all experts in place, so that copies differ from the start.

    Args:
        student (`VMoEForImageClassification`)
        noise_std (`float`): In units of the standard deviation of each tensor (all experts of a layer together).

    Raises:
        `StageError`: `noise_std` is negative or not finite.
    """
    if not 0 <= noise_std < math.inf:
        raise StageError(f"`noise_std` must be 0 (no noise) or a positive number, but is {noise_std}.")
    for name, parameter in student.named_parameters():
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            parameter += noise_std * parameter.std() * torch.randn_like(parameter)


@torch.no_grad()
def init_routers_from_centroids(student: VMoEForImageClassification, pixel_values: torch.Tensor) -> None:
    """
    Give each router the directions in which the tokens of its layer lie, in place: k-means of the normalized tokens,
    one cluster an expert (after arXiv 2604.13508). Each token then prefers the expert of the centroid with the largest
    scalar product. The scale is such that the logits of a token have a standard deviation of 1 on average.

    Args:
        student (`VMoEForImageClassification`): An upcycled one.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images of the training
            data, a few hundred; all their tokens are in memory at once.

    Raises:
        `StageError`: there are fewer different tokens than experts.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    routers = [module for module in student.modules() if isinstance(module, VMoELinearRouter)]
    seen: dict[VMoELinearRouter, list[torch.Tensor]] = {router: [] for router in routers}
    hooks = [
        router.register_forward_pre_hook(lambda router, args: seen[router].append(args[0].flatten(0, -2).float()))
        for router in routers
    ]
    _logits(student, pixel_values)
    for hook in hooks:
        hook.remove()
    for router in routers:
        tokens = torch.cat(seen.pop(router))
        directions = F.normalize(tokens, dim=-1).cpu().numpy()
        # scipy draws from its own generator: this one follows torch's
        seed = int(torch.randint(2**31, ()))
        try:
            found, _ = kmeans2(directions, len(router.weight), minit="++", missing="raise", seed=seed)
        except (ClusterError, ValueError) as error:
            raise StageError(
                f"The {len(directions)} tokens of the given images do not form {len(router.weight)} clusters, one for "
                f"each expert ({error}). Give more images."
            ) from error
        centroids = F.normalize(torch.from_numpy(found), dim=-1).to(tokens)
        spread = (tokens @ centroids.T).std(dim=-1, correction=0).mean()
        router.weight.copy_(centroids / spread if len(centroids) > 1 else centroids)
        if router.bias is not None:
            router.bias.zero_()


@dataclass(frozen=True)
class LogitDifference:
    """
    How far the logits of a V-MoE are from a dense model's.

    Attributes:
        largest (`float`): The largest absolute difference of two logits.
        largest_logit (`float`): The dense model's largest absolute logit.
        agreement (`float`): Share of the images with the same predicted class, 0 to 1.
    """

    largest: float
    largest_logit: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"the logits differ from the dense model's by at most {self.largest:.2g} (its largest is "
            f"{self.largest_logit:.2g}), and {self.agreement:.1%} of the predicted classes are equal."
        )


@torch.no_grad()
def logit_difference(
    student: VMoEForImageClassification, dense_model: PreTrainedModel, pixel_values: torch.Tensor
) -> LogitDifference:
    """
    Measure how far an upcycled V-MoE is from its dense model, both in eval mode.

    Args:
        student (`VMoEForImageClassification`)
        dense_model (`PreTrainedModel`): With the same classes.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Of a size that both take.
    """
    ours, theirs = (_logits(model, pixel_values) for model in (student, dense_model))
    return LogitDifference(
        largest=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        agreement=float((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean()),
    )


def _logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    try:
        batches = pixel_values.to(model.device, model.dtype).split(_BATCH_SIZE)
        return torch.cat([model.eval()(pixel_values=batch).logits.float() for batch in batches])
    finally:
        model.train(was_training)


def _whole(dense_model: PreTrainedModel) -> Stage:
    return split_into_stages(dense_model, [count_layers(dense_model)])[0]


def _dense_fields(dense_model: PreTrainedModel) -> dict[str, Any]:
    """The fields of `_FIXED` for a dense model. The configuration of a DINOv2 has no `intermediate_size`."""
    weights, config = _whole(dense_model).vmoe_weights(), dense_model.config
    width = next((len(tensor) for name, tensor in weights.items() if name.endswith(".mlp.fc1.bias")), None)
    width = width or getattr(config, "intermediate_size", None)
    if width is None:
        raise StageError(
            f"The MLPs of this {config.model_type} are not two projections with an activation between them (a gated "
            "MLP such as SwiGLU has three), and the experts of a V-MoE are. Use another dense model."
        )
    return {field: width if field == "intermediate_size" else getattr(config, field) for field in _FIXED}


def _check_same_sizes(
    student: VMoEForImageClassification, dense_model: PreTrainedModel, keep_head: bool, zoom_positions: bool
) -> None:
    free = {"num_labels": keep_head, "image_size": zoom_positions}
    ways = {
        "num_labels": " or pass `keep_head=True` to keep the V-MoE's own head,",
        "image_size": " or pass `zoom_positions=True` to resample the position embeddings,",
    }
    for field, theirs in _dense_fields(dense_model).items():
        ours = getattr(student.config, field)
        if field in ("patch_size", "image_size"):
            ours, theirs = pair(ours), pair(theirs)
        if ours != theirs and not free.get(field, False):
            raise StageError(
                f"`{field}` is {ours} in the V-MoE and {theirs} in the dense model. "
                f"The V-MoE takes the dense model's weights, so they must be equal: set the V-MoE's to {theirs},"
                f"{ways.get(field, '')} or take another dense model."
            )


def _check_same_tensors(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], unused: set[str]) -> None:
    lines = [f"{name}: only in the dense model" for name in sorted(unused)]
    for name, tensor in own.items():
        if name not in weights:
            lines.append(f"{name}: only in the V-MoE")
        elif weights[name].shape != tensor.shape:
            theirs = tuple(weights[name].shape)
            lines.append(f"{name}: {tuple(tensor.shape)} in the V-MoE, {theirs} in the dense model")
    if lines:
        raise StageError(
            "The V-MoE cannot take the dense model's weights, because their parts differ. The V-MoE must have no "
            "stitches, and sparse layers of the dense model must be sparse in the V-MoE, with as many experts:\n  "
            + "\n  ".join(lines[:8] + ["…"] * (len(lines) > 8))
        )


def resample_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """
    Resample position embeddings of shape `(1, 1 + height * width, hidden_size)` to another grid of patches, as
    [`upcycle_into`] says. The class token's stays.
    """
    from scipy.ndimage import zoom

    patches = positions[0, 1:].unflatten(0, grid).float().cpu().numpy()
    zoomed = zoom(patches, (new_grid[0] / grid[0], new_grid[1] / grid[1], 1), order=1)
    return torch.cat([positions[:, :1], torch.from_numpy(zoomed).to(positions).flatten(0, 1)[None]], dim=1)
