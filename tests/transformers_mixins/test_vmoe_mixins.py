import unittest
from typing import Any

from sdist import load_mixins


load_mixins("test_modeling_common")

from testers import BackboneTesterMixin, ConfigTester, VisionModelTester, VisionModelTests  # noqa: E402

from m2mkd import VMoEBackbone, VMoEConfig, VMoEForImageClassification, VMoEModel  # noqa: E402


class VMoEModelTester(VisionModelTester):
    sizes = {
        "image_size": 30,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        # no multiple of anything, as transformers has it for its vision models
        "intermediate_size": 37,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    seq_length = (30 // 2) ** 2 + 1

    def get_config(self) -> VMoEConfig:
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return VMoEConfig(num_channels=self.num_channels, **{**self.sizes, **dropout, **self.overrides})


class VMoEModelTest(VisionModelTests, unittest.TestCase):
    all_model_classes = (VMoEModel, VMoEBackbone, VMoEForImageClassification)
    overrides: dict[str, Any] = {}
    seq_length = VMoEModelTester.seq_length

    def setUp(self) -> None:
        self.model_tester = VMoEModelTester(**self.overrides)
        self.model_tester.seq_length = self.seq_length
        names = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
        self.config_tester = ConfigTester(
            self, config_class=VMoEConfig, has_text_modality=False, hidden_size=36, common_properties=names
        )


class BalancedVMoEModelTest(VMoEModelTest):
    overrides = {
        "moe_layers": [1],
        "router_noise_std": 1.0,
        "router_importance_loss_coef": 0.01,
        "router_load_loss_coef": 0.01,
        "drop_path_rate": 0.1,
    }


class CapacityVMoEModelTest(VMoEModelTest):
    overrides = {"capacity_factor": 1.0, "batch_prioritized_routing": True, "router_gshard_loss_coef": 0.01}


class ExpertChoiceVMoEModelTest(VMoEModelTest):
    overrides = {"router_type": "expert_choice", "capacity_factor": 2.0, "classifier_pooling": "gap"}
    seq_length = (30 // 2) ** 2


class SoftVMoEModelTest(VMoEModelTest):
    overrides = {"router_type": "soft", "num_slots": 2, "classifier_pooling": "map", "use_qk_norm": True}
    seq_length = (30 // 2) ** 2


class EnsembleVMoEModelTest(VMoEModelTest):
    # a backbone of an ensemble is refused
    all_model_classes = (VMoEModel, VMoEForImageClassification)
    overrides = {"num_ensemble_members": 2, "num_experts_per_tok": 1, "representation_size": 24}


class VMoEBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (VMoEBackbone,)
    config_class = VMoEConfig
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = VMoEModelTester(out_features=["stage1", "stage2"], attn_implementation="eager")
