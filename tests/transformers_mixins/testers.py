"""What the test classes of both models share."""

import json
import os
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sdist import load_mixins
from torch import nn
from transformers import ImageClassificationPipeline, PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.models.auto import modeling_auto


modeling_common = load_mixins("test_modeling_common")
ConfigTester = load_mixins("test_configuration_common").ConfigTester
BackboneTesterMixin = load_mixins("test_backbone_common").BackboneTesterMixin

# the mixins know a model's task by these tables of names, which `AutoModel.register` leaves alone
modeling_auto.MODEL_MAPPING_NAMES.update(vmoe="VMoEModel", nac="NACModel")
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.update(vmoe="VMoEBackbone")
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.update(
    vmoe="VMoEForImageClassification", nac="NACForImageClassification"
)


class VisionModelTester:
    """Configuration and images of one model; the mixins read the sizes from here."""

    batch_size = 13
    num_channels = 3
    num_labels = 10
    is_training = True
    sizes: dict[str, Any]

    def __init__(self, **overrides: Any):
        self.overrides = overrides
        vars(self).update(self.sizes)

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def prepare_config_and_inputs(self) -> tuple[PreTrainedConfig, torch.Tensor, torch.Tensor]:
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        labels = modeling_common.ids_tensor([self.batch_size], self.num_labels)
        return self.get_config(), modeling_common.floats_tensor(shape), labels

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class VisionModelTests(modeling_common.ModelTesterMixin):
    """`ModelTesterMixin` with the three changes that transformers makes for each of its vision models."""

    test_resize_embeddings = False

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip("images are no embeddings")
    def test_inputs_embeds(self) -> None:
        pass

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            self.assertIsInstance(model.get_output_embeddings(), nn.Linear | None)

    def test_for_image_classification(self) -> None:
        for num_channels in (3, 1):
            config, pixel_values, labels = self.model_tester.prepare_config_and_inputs()
            config.num_channels, config.num_labels = num_channels, self.model_tester.num_labels
            model = self.all_model_classes[-1](config).eval()
            outputs = model(pixel_values[:, :num_channels], labels=labels)
            self.assertEqual(outputs.logits.shape, (self.model_tester.batch_size, self.model_tester.num_labels))


class ImageClassificationPipelineTests(unittest.TestCase):
    """What `PipelineTesterMixin` calls; the one of transformers is not in the distribution, and loads from the Hub."""

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: None = None, dtype: str = "float32", **processors: Any
    ) -> tuple[ImageClassificationPipeline, list[Image.Image]]:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 30, 3), dtype=np.uint8)
        pipeline = ImageClassificationPipeline(model=model, tokenizer=tokenizer, dtype=dtype, top_k=2, **processors)
        return pipeline, [Image.fromarray(image) for image in pixels]

    def run_pipeline_test(self, pipeline: ImageClassificationPipeline, examples: list[Image.Image]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/image.png"
            examples[0].save(path)
            inputs = [*examples, path, *(examples[0].convert(mode) for mode in ("L", "LA", "RGBA"))]
            outputs = [pipeline(path), *pipeline(inputs)]
        self.assertEqual(len(outputs), 1 + len(inputs))
        for output in outputs:
            self.assertEqual([(type(entry["score"]), type(entry["label"])) for entry in output], [(float, str)] * 2)


def pipeline_mixin(*testers: tuple[type[PreTrainedModel], VisionModelTester]) -> type:
    """`PipelineTesterMixin` over tiny models in a folder, in the place of those on the Hub."""
    folder = Path(tempfile.mkdtemp())
    summary = {}
    for model_class, tester in testers:
        config = tester.get_config()
        target = folder / config.model_type / model_class.__name__
        model_class(config).save_pretrained(target)
        size = {"height": tester.image_size, "width": tester.image_size}
        ViTImageProcessorPil(size=size).save_pretrained(target)
        summary[model_class.__name__] = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessorPil"]}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(folder)
    module = load_mixins("test_pipeline_mixin")
    test = f"{ImageClassificationPipelineTests.__module__}.{ImageClassificationPipelineTests.__name__}"
    module.pipeline_test_mapping["image-classification"]["test"] = test
    return module.PipelineTesterMixin
