import unittest
from typing import Any

from sdist import load_mixins


load_mixins("test_modeling_common")

from testers import ConfigTester, VisionModelTester, VisionModelTests  # noqa: E402

from m2mkd import NACConfig, NACForImageClassification, NACModel  # noqa: E402


class NACModelTester(VisionModelTester):
    sizes = {
        "image_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "code_size": 24,
        "signature_size": 12,
        "tokenizer_depths": [1, 1],
        "position_embedding_size": 8,
        "num_input_latents": 6,
        "num_mediator_latents": 10,
        "num_output_latents": 4,
    }
    # in a round of messages the mediators receive, and inputs and mediators send
    encoder_seq_length = 10
    key_length = 16

    def get_config(self) -> NACConfig:
        return NACConfig(num_channels=self.num_channels, **{**self.sizes, **self.overrides})


class NACModelTest(VisionModelTests, unittest.TestCase):
    all_model_classes = (NACModel, NACForImageClassification)
    overrides: dict[str, Any] = {}

    def setUp(self) -> None:
        self.model_tester = NACModelTester(**self.overrides)
        names = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
        self.config_tester = ConfigTester(
            self, config_class=NACConfig, has_text_modality=False, hidden_size=36, common_properties=names
        )

    def test_hidden_states_output(self) -> None:
        # states of inputs and mediators, of whom the mediators alone are rows of the attention
        self.model_tester.encoder_seq_length = 16
        super().test_hidden_states_output()


class GraphNACModelTest(NACModelTest):
    overrides = {
        "graph_prior": "barabasi_albert",
        "graph_prior_kwargs": {"m": 2},
        "signature_repulsion_coef": 0.1,
        "block_model_coef": 0.1,
        "block_model_num_clusters": 2,
        "share_codes_between_layers": False,
    }
