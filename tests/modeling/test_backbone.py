import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testing_utils import gradients, images, randomized, vmoe, vmoe_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    DetrConfig,
    DetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from m2mkd import VMoEBackbone, VMoEConfig


STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def backbone(seed: int = 0, **overrides: Any) -> VMoEBackbone:
    return randomized(VMoEBackbone(vmoe_config(**overrides)), seed)


class TestConfig:
    def test_features_and_indices_follow_each_other(self) -> None:
        assert vmoe_config().stage_names == STAGES
        config = vmoe_config(out_features=["stem", "stage3"])
        assert config.out_indices == [0, 3]
        config.out_indices = [-2, -1]
        assert config.out_features == ["stage3", "stage4"]
        assert vmoe_config().out_features == ["stage4"]

    @pytest.mark.parametrize("choice", [{"out_features": ["stage5"]}, {"out_indices": [5]}], ids=str)
    def test_a_stage_that_there_is_not_is_refused(self, choice: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="stage_names"):
            vmoe_config(**choice)

    def test_they_are_saved(self, tmp_path: Path) -> None:
        config = vmoe_config(out_features=["stage1", "stage4"])
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert loaded.out_features == config.out_features and loaded.out_indices == [1, 4]

    def test_a_folder_from_before_there_were_backbones_loads(self, tmp_path: Path) -> None:
        model = vmoe()
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        for name in ("out_features", "out_indices", "stage_names"):
            del saved[name]
        (tmp_path / "config.json").write_text(json.dumps(saved))
        loaded = VMoEBackbone.from_pretrained(tmp_path)
        assert loaded.out_features == ["stage4"] and loaded.channels == [16]


class TestFeatureMaps:
    def test_they_are_the_patches_of_the_chosen_stages(self) -> None:
        model = backbone(out_features=["stem", "stage2", "stage4"])
        outputs = model(images(), output_hidden_states=True)
        assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [(3, 16, 2, 2)] * 3
        assert model.channels == [16] * 3
        for feature_map, index in zip(outputs.feature_maps, (0, 2, 4), strict=True):
            patches = model.vmoe.layernorm(outputs.hidden_states[index])[:, 1:]
            assert torch.equal(feature_map.flatten(2).transpose(1, 2), patches)

    def test_rows_and_columns_keep_their_places(self) -> None:
        model = backbone(out_features=["stem"])
        pixel_values = images(1)
        base = model(pixel_values).feature_maps[0]
        pixel_values[..., :4, 4:] += 1  # the upper right patch
        moved = (model(pixel_values).feature_maps[0] - base).abs().sum(dim=(0, 1)) > 0
        assert moved.tolist() == [[False, True], [False, False]]

    @pytest.mark.parametrize("height, width", [(16, 8), (20, 12), (9, 23)])
    def test_another_size_is_interpolated(self, height: int, width: int) -> None:
        feature_map = backbone()(torch.randn(2, 3, height, width)).feature_maps[0]
        assert feature_map.shape == (2, 16, height // 4, width // 4)

    def test_what_is_not_asked_for_is_not_returned(self) -> None:
        model = backbone()
        assert list(model(images()).keys()) == ["feature_maps", "last_hidden_state"]
        model.set_attn_implementation("eager")
        outputs = model(images(), output_attentions=True, output_hidden_states=True)
        assert len(outputs.attentions) == 4 and len(outputs.hidden_states) == 5
        assert len(model(images(), output_router_logits=True).router_logits) == 2
        feature_maps = model(images(), return_dict=False)[0]
        assert torch.equal(feature_maps[0], outputs.feature_maps[0])

    def test_a_stage_that_ends_in_a_stitch_has_its_width(self) -> None:
        stitched = {"stitch_size": 10, "pre_stitch_layers": [2], "post_stitch_layers": [1]}
        model = backbone(out_indices=[1, 2, 3], **stitched)
        outputs = model(images(), output_hidden_states=True)
        assert model.channels == [16, 10, 16] == [feature_map.shape[1] for feature_map in outputs.feature_maps]
        patches = outputs.hidden_states[2][:, 1:]
        assert torch.equal(outputs.feature_maps[1].flatten(2).transpose(1, 2), patches)


class TestOnTopOfIt:
    def test_the_auto_class_knows_it(self) -> None:
        # transformers 5.23: `AutoBackbone.from_pretrained` takes repositories on the Hub alone, no folders
        assert type(AutoBackbone.from_config(vmoe_config())) is VMoEBackbone

    def test_it_loads_the_body_of_a_classifier(self, tmp_path: Path) -> None:
        classifier = vmoe()
        classifier.save_pretrained(tmp_path)
        model = VMoEBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage4"])
        states = classifier(images(), output_hidden_states=True).hidden_states[1]
        expected = classifier.vmoe.layernorm(states)[:, 1:].transpose(1, 2)
        assert torch.equal(model(images()).feature_maps[0].flatten(2), expected)

    def test_upernet_trains_all_of_it(self, tmp_path: Path) -> None:
        config = UperNetConfig(
            backbone_config=vmoe_config(out_indices=[1, 2, 3, 4], num_experts_per_tok=4), hidden_size=8, num_labels=3,
            auxiliary_in_channels=16, auxiliary_channels=8,
        )  # fmt: skip
        model = UperNetForSemanticSegmentation(config).train()
        pixel_values, labels = images(size=24), torch.randint(3, (3, 24, 24))
        outputs = model(pixel_values, labels=labels)
        assert outputs.logits.shape == (3, 3, 24, 24)
        still = {name for name, gradient in gradients(model, outputs.loss).items() if gradient.abs().max() == 0}
        assert still == set()
        model.eval().save_pretrained(tmp_path)
        loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
        assert isinstance(loaded.config.backbone_config, VMoEConfig)
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)

    def test_detr_takes_it(self) -> None:
        sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        config = DetrConfig(
            backbone_config=vmoe_config(), d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, num_queries=6,
            num_labels=3, **sizes,
        )  # fmt: skip
        model = DetrForObjectDetection(config)
        outputs = model(images(size=24))
        assert outputs.logits.shape == (3, 6, 4) and outputs.pred_boxes.shape == (3, 6, 4)
        after = gradients(model, outputs.pred_boxes.sum())
        assert after["model.backbone.model.vmoe.layers.0.attention.q_proj.weight"].abs().max() > 0
