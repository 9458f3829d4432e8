"""The experts of each patch, and of each class."""

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import IMAGE_SIZE, ROUTERS, images, vmoe

from m2mkd.data import DataConfig, ImageDataset, LabeledImages
from m2mkd.errors import StageError
from m2mkd.evaluation.routing import patch_weights, specialisation


def dataset(labels: list[int], num_classes: int) -> ImageDataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    names = [str(index) for index in range(len(labels))]
    classes = [f"class {index}" for index in range(num_classes)]
    data = LabeledImages([Image.fromarray(image) for image in pixels], np.array(labels), classes, names)
    return ImageDataset(data, DataConfig(source="x", image_size=IMAGE_SIZE, mean=[0.5] * 3, std=[0.2] * 3), False)


def what_experts_return(model) -> dict[int, torch.Tensor]:
    """
    The layers' outputs for `images()`, where every token of expert e comes back as the e-th unit vector: the weights,
    by another way than `weights_by_expert`.
    """
    outputs: dict[int, torch.Tensor] = {}
    for layer in (1, 3):
        sparse = model.vmoe.layers[layer].mlp
        for bias in (sparse.experts.up_proj, sparse.experts.up_proj_bias, sparse.experts.down_proj):
            bias.data.zero_()
        sparse.experts.down_proj_bias.data.copy_(torch.eye(model.config.num_experts, model.config.hidden_size))
        sparse.register_forward_hook(lambda _m, _i, output, layer=layer: outputs.update({layer: output}))
    with torch.no_grad():
        model(images())
    return outputs


@pytest.mark.parametrize("group", [None, 15])
@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, *ROUTERS.values()], ids=str)
def test_weights_are_those_with_which_the_experts_count(options: dict, group: int | None) -> None:
    model = vmoe(router_group_size=group, **options)
    outputs = what_experts_return(model)
    weights = patch_weights(model, images())
    assert weights.keys() == {1, 3}
    for layer, of_layer in weights.items():
        # after the class token
        torch.testing.assert_close(of_layer, outputs[layer][:, 1:, :4], atol=1e-6, rtol=1e-5)


def test_members_of_an_ensemble_have_experts_of_their_own() -> None:
    model = vmoe(num_ensemble_members=2, num_experts_per_tok=1)
    outputs = what_experts_return(model)
    weights = patch_weights(model, images())[1]
    assert weights.shape == (6, 4, 4)
    torch.testing.assert_close(weights, outputs[1][:, 1:, :4])
    assert not weights[0::2, :, 2:].any() and not weights[1::2, :, :2].any()


@pytest.mark.parametrize("options", [{}, ROUTERS["capacity"], ROUTERS["soft"]], ids=["all kept", "capacity", "soft"])
def test_the_experts_of_a_class(options: dict) -> None:
    model, data = vmoe(**options), dataset([2, 0, 2, 0, 2], num_classes=4)
    shares = specialisation(model, data, batch_size=2)
    pixels = torch.stack([sample["pixel_values"] for sample in data])
    weights = patch_weights(model, pixels)[3]
    seen = weights if model.config.router_type == "soft" else (weights > 0).float()
    torch.testing.assert_close(shares[3][2], seen[[0, 2, 4]].mean(dim=(0, 1)))
    torch.testing.assert_close(shares[3][0], seen[[1, 3]].mean(dim=(0, 1)))
    assert shares[3][[1, 3]].isnan().all()
    if not options:
        assert shares[3][2].sum() == pytest.approx(2)


def test_images_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(StageError, match="cannot route these images"):
        patch_weights(vmoe(), images(size=16))
    with pytest.raises(StageError, match="router_group_size` is 7"):
        patch_weights(vmoe(router_group_size=7, **ROUTERS["capacity"]), images())
