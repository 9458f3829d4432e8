"""DINOv2 backbones (arXiv 2304.07193) of transformers that were exported to ONNX."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model

from m2mkd.conversion.kind import Kind, Request
from m2mkd.conversion.official_pixels import DINOV2_PIXELS
from m2mkd.conversion.output import Output, Tensors, model_output
from m2mkd.errors import ConversionError


_CLASS_TOKEN, _POSITIONS = "embeddings.cls_token", "embeddings.position_embeddings"
# Width of a head in every published DINOv2; the graph has the number of heads only inside its reshapes.
_HEAD_SIZE = 64


class Dinov2OnnxKind(Kind):
    """A `Dinov2Model`, alone or inside a larger network, as `torch.onnx.export(…, dynamo=False)` writes it."""

    name = "dinov2-onnx"
    needs_config = False

    def convert(self, request: Request) -> Output:
        """The backbone; the rest of the network is left out."""
        if request.content:
            raise ConversionError(f"--kind {self.name} reads everything from the file. Leave out --config.")
        tensors = _read_parameters(request.path)
        prefixes = [name.removesuffix(_CLASS_TOKEN) for name in tensors if name.endswith(_CLASS_TOKEN)]
        if len(prefixes) != 1:
            raise ConversionError(f"a DINOv2 has one parameter `{_CLASS_TOKEN}`, the file has {len(prefixes)}.")
        (prefix,) = prefixes
        if prefix + _POSITIONS not in tensors:
            tensors[prefix + _POSITIONS] = _take_positions(tensors)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        # transformers knows the names of its earlier versions
        model, info = Dinov2Model.from_pretrained(
            None, config=_config(own), state_dict=own, ignore_mismatched_sizes=True, output_loading_info=True
        )
        if any(info.values()):
            wrong = "; ".join(f"{what}: {sorted(map(str, names))}" for what, names in info.items() if names)
            raise ConversionError(f"the parameters are not those of a Dinov2Model. {wrong}")
        write, what = model_output(model, model.state_dict(), DINOV2_PIXELS)
        return write, f"{what} ({len(tensors) - len(own)} tensors outside `{prefix}` left out)"


def _read_parameters(path: Path) -> Tensors:
    """The constants of the graph. The weight of a linear layer gets back its name and its form."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ConversionError("reading ONNX needs onnx: `pip install m2mkd[onnx]`.") from error
    try:
        graph = onnx.load(path).graph
        tensors = {part.name: torch.from_numpy(onnx.numpy_helper.to_array(part).copy()) for part in graph.initializer}
    except (OSError, DecodeError, onnx.checker.ValidationError, TypeError) as error:
        raise ConversionError(f"the file cannot be read as ONNX: {error}") from error
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        weights = [products[name] for name in node.input if products.get(name) in tensors]
        biases = [name for name in node.input if name.endswith(".bias") and name in tensors]
        if node.op_type == "Add" and weights and biases:
            # the exporter folds the transposition of the weight into a constant without a name
            tensors[biases[0].removesuffix("bias") + "weight"] = tensors.pop(weights[0]).T.contiguous()
    return tensors


def _take_positions(tensors: Tensors) -> torch.Tensor:
    """The position embeddings (1, 1 + patches, width), which the exporter splits into class token and patches."""
    names = [name for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    parts = sorted(map(tensors.pop, names), key=lambda part: part.shape[1])
    if len(parts) != 2 or parts[0].shape[1] != 1:
        raise ConversionError(f"the file has no position embeddings, only {[tuple(part.shape) for part in parts]}.")
    return torch.cat(parts, dim=1)


def _config(tensors: Tensors) -> Dinov2Config:
    try:
        patches = tensors["embeddings.patch_embeddings.projection.weight"]
        fc1 = tensors["encoder.layer.0.mlp.fc1.bias"]
    except KeyError as error:
        raise ConversionError(f"the file has no {error}. Only a DINOv2 without SwiGLU can be converted.") from error
    width, channels, size, _ = patches.shape
    if width % _HEAD_SIZE:
        raise ConversionError(f"the width is {width}; that of a DINOv2 is a multiple of {_HEAD_SIZE}.")
    sizes: dict[str, Any] = {"hidden_size": width, "num_channels": channels, "patch_size": size}
    return Dinov2Config(
        **sizes,
        num_hidden_layers=sum(name.endswith(".layer_scale1.lambda1") for name in tensors),
        num_attention_heads=width // _HEAD_SIZE,
        mlp_ratio=len(fc1) // width,
        image_size=size * math.isqrt(tensors[_POSITIONS].shape[1] - 1),
        # only masked image modeling reads it, so it is not in the graph
        use_mask_token=False,
    )
