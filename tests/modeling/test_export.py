"""
`torch.export` and ONNX, by torch itself and through the exporters of transformers. No expert may be lost: a tracer
sees one routing.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from testing_utils import images, nac, randomized, vmoe
from transformers import PreTrainedModel

from m2mkd import VMoEForImageClassification


pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the exporters of transformers took this form in 5.23"
)
Build = Callable[[], PreTrainedModel]


def many_experts() -> VMoEForImageClassification:
    """Five tokens per image and one expert per token, so an image uses at most five of the eight experts."""
    return vmoe(num_experts=8, num_experts_per_tok=1, num_hidden_layers=2, moe_layers=[1])


def graph_of_latents() -> PreTrainedModel:
    return randomized(nac(), seed=0)


def chosen_experts(model: VMoEForImageClassification, pixel_values: torch.Tensor) -> list[set[int]]:
    """The experts that the images use, for each sparse layer."""
    with torch.no_grad():
        router_logits = model(pixel_values, output_router_logits=True).router_logits
    return [set(layer.topk(model.config.num_experts_per_tok).indices.flatten().tolist()) for layer in router_logits]


def others_than(model: VMoEForImageClassification, sample: torch.Tensor) -> torch.Tensor:
    """Images that use experts that the sample does not use, in every sparse layer."""
    others = images(8, seed=1)
    pairs = zip(chosen_experts(model, others), chosen_experts(model, sample), strict=True)
    assert all(theirs - its for theirs, its in pairs)
    return others


class TestTorchExport:
    @pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
    def test_every_expert_is_in_the_program(self, backend: str) -> None:
        model, sample = many_experts(), images(1)
        model.set_experts_implementation(backend)
        program = torch.export.export(model, (), {"pixel_values": sample}).module()
        for image in others_than(model, sample):
            outputs = program(pixel_values=image[None])
            torch.testing.assert_close(outputs.logits, model(image[None]).logits, atol=1e-5, rtol=1e-4)

    def test_the_program_has_operators_of_torch_alone(self) -> None:
        model = many_experts()
        assert model.config._experts_implementation == "grouped_mm"
        program = torch.export.export(model, (), {"pixel_values": images(1)})
        called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert called and {target.namespace for target in called} == {"aten"}

    def test_a_training_program_keeps_the_gradient_of_the_graph(self) -> None:
        model = graph_of_latents()
        program = torch.export.export(model, (), {"pixel_values": images(2)}).module()
        program(pixel_values=images(2)).logits.sum().backward()
        parameters = dict(program.named_parameters())
        assert parameters["nac.mediator_latents.signatures"].grad.abs().max() > 0


class TestDynamoExporter:
    @pytest.mark.parametrize("build", [many_experts, graph_of_latents])
    def test_a_batch_of_another_size_gets_the_same_logits(self, build: Build, tmp_path: Path) -> None:
        from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel

        model, sample = build(), images(2)
        batch = {"pixel_values": {0: torch.export.Dim("batch")}}
        exported = DynamoExporter().export(model, {"pixel_values": sample}, DynamoConfig(dynamic_shapes=batch))
        exported.save_pretrained(tmp_path)
        others = images(8, seed=1)
        with torch.no_grad():
            expected = model(others).logits
        for program in (exported, ExportedModel.from_pretrained(tmp_path)):
            torch.testing.assert_close(program(pixel_values=others).logits, expected, atol=1e-5, rtol=1e-4)


class TestTorchOnnx:
    @pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_it_computes_what_the_model_does(self, dynamo: bool, tmp_path: Path) -> None:
        for library in ("onnx", "onnxscript"):
            pytest.importorskip(library)
        onnxruntime = pytest.importorskip("onnxruntime")
        model, sample = many_experts().eval(), images(1)
        torch.onnx.export(model, (sample,), str(tmp_path / "model.onnx"), dynamo=dynamo)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (pixel_values,) = session.get_inputs()
        for image in others_than(model, sample):
            logits, *_ = session.run(None, {pixel_values.name: image[None].numpy()})
            with torch.no_grad():
                expected = model(image[None]).logits
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


class TestOnnxExporter:
    @pytest.mark.parametrize("build", [many_experts, graph_of_latents])
    def test_it_computes_what_the_model_does(self, build: Build, tmp_path: Path) -> None:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)
        from transformers.exporters import ExportedModel
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        model, sample = build(), images(1)
        exported = OnnxExporter().export(model, {"pixel_values": sample}, OnnxConfig())
        exported.save_pretrained(tmp_path)
        loaded = ExportedModel.from_pretrained(tmp_path)
        others = others_than(model, sample) if isinstance(model, VMoEForImageClassification) else images(2, seed=1)
        for image in others:
            with torch.no_grad():
                expected = model(image[None]).logits
            torch.testing.assert_close(loaded(pixel_values=image[None]).logits, expected, atol=1e-4, rtol=1e-4)
