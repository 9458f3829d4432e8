import pytest
import torch
from official_cases import Case
from testing_utils import assert_equal

from m2mkd.conversion.official_models import (
    assemble_stages,
    cut_in_stages,
    transformer_to_official,
    transformer_to_ours,
    with_aliases,
    without_aliases,
)
from m2mkd.errors import ConversionError


def block(layer: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"blocks.{layer}.norm1.weight": torch.rand(4),
        f"blocks.{layer}.attn.qkv.weight": torch.arange(48.0).reshape(12, 4),
        f"blocks.{layer}.attn.qkv.bias": torch.arange(12.0),
        f"blocks.{layer}.attn.proj.bias": torch.rand(4),
        f"blocks.{layer}.mlp.fc1.weight": torch.rand(8, 4),
    }


def experts(count: int = 3, layer: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"blocks.{layer}.moe.experts.{expert}.{name}": torch.rand(shape)
        for expert in range(count)
        for name, shape in {
            "htoh4.weight": (1, 8, 4),
            "htoh4.bias": (1, 8),
            "h4toh.weight": (1, 4, 8),
            "h4toh.bias": (1, 4),
        }.items()
    }


class TestConvertViT:
    def test_names_change_and_tensors_do_not(self) -> None:
        official = block()
        converted = transformer_to_ours("vit", official)
        assert torch.equal(converted["vit.layers.0.layernorm_before.weight"], official["blocks.0.norm1.weight"])
        assert torch.equal(converted["vit.layers.0.attention.o_proj.bias"], official["blocks.0.attn.proj.bias"])
        assert torch.equal(converted["vit.layers.0.mlp.fc1.weight"], official["blocks.0.mlp.fc1.weight"])

    def test_qkv_is_cut_in_three(self) -> None:
        converted, official = transformer_to_ours("vit", block()), block()
        for row, name in enumerate(("q_proj", "k_proj", "v_proj")):
            weight = official["blocks.0.attn.qkv.weight"][4 * row : 4 * row + 4]
            assert torch.equal(converted[f"vit.layers.0.attention.{name}.weight"], weight)
            assert converted[f"vit.layers.0.attention.{name}.weight"].is_contiguous()
            assert converted[f"vit.layers.0.attention.{name}.bias"].tolist() == [4.0 * row + i for i in range(4)]

    def test_the_offset_moves_a_stage_to_its_layers(self) -> None:
        converted = transformer_to_ours("vit", {**block(0), **block(1)}, layer_offset=6)
        assert {name.split(".")[2] for name in converted} == {"6", "7"}

    def test_stem_and_head_are_placed(self) -> None:
        official = {"cls_token": torch.rand(1), "pos_embed": torch.rand(1), "patch_embed.proj.bias": torch.rand(1)}
        official |= {"norm.weight": torch.rand(1), "head.weight": torch.rand(1)}
        assert list(transformer_to_ours("vit", official)) == [
            "vit.embeddings.cls_token",
            "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.bias",
            "vit.layernorm.weight",
            "classifier.weight",
        ]

    def test_the_second_name_of_each_block_is_left_out(self) -> None:
        official = block()
        twice = {**official, **{f"stages.0.{name}": value for name, value in official.items()}}
        assert_equal(transformer_to_ours("vit", twice), transformer_to_ours("vit", official))

    @pytest.mark.parametrize(
        "name", ["rotary.weight", "blocks.0.mlp.fc3.weight", "blocks.x.norm1.weight", "fc_norm.bias"]
    )
    def test_an_unknown_tensor_is_named(self, name: str) -> None:
        with pytest.raises(ConversionError, match=f"do not belong to an official vit checkpoint.*{name}"):
            transformer_to_ours("vit", {**block(), name: torch.rand(1)})

    def test_experts_are_no_part_of_a_vit(self) -> None:
        with pytest.raises(ConversionError, match="moe.experts.0.htoh4.weight"):
            transformer_to_ours("vit", experts())


class TestConvertVMoE:
    def test_the_experts_of_a_layer_are_stacked_in_order(self) -> None:
        official = experts(12)  # two digits: no order of strings
        converted = transformer_to_ours("vmoe", dict(reversed(official.items())))
        assert converted["vmoe.layers.0.mlp.experts.up_proj"].shape == (12, 8, 4)
        for index in range(12):
            for theirs, ours in (("htoh4", "up_proj"), ("h4toh", "down_proj")):
                source = f"blocks.0.moe.experts.{index}.{theirs}"
                target = f"vmoe.layers.0.mlp.experts.{ours}"
                assert torch.equal(converted[target][index], official[f"{source}.weight"][0])
                assert torch.equal(converted[f"{target}_bias"][index], official[f"{source}.bias"][0])

    def test_a_missing_expert_is_named(self) -> None:
        official = {name: value for name, value in experts(3).items() if ".experts.1." not in name}
        with pytest.raises(ConversionError, match=r"vmoe.layers.0.mlp.experts.\w+ are missing.* only \[0, 2\]"):
            transformer_to_ours("vmoe", official)

    def test_one_missing_tensor_of_an_expert_is_named(self) -> None:
        official = experts(3)
        del official["blocks.0.moe.experts.0.h4toh.bias"]
        with pytest.raises(ConversionError, match=r"down_proj_bias are missing.* only \[1, 2\]"):
            transformer_to_ours("vmoe", official)

    def test_a_missing_last_tensor_is_named_too(self) -> None:
        official = experts(3)
        del official["blocks.0.moe.experts.2.h4toh.bias"]
        with pytest.raises(ConversionError, match="down_proj_bias"):
            transformer_to_ours("vmoe", official)

    def test_gates_and_stitches_keep_their_layer(self) -> None:
        names = ["moe.gate.gate.weight", "pre_stitch.ln.bias", "post_stitch.fc.weight"]
        converted = transformer_to_ours("vmoe", {f"blocks.1.{name}": torch.rand(1) for name in names}, layer_offset=3)
        assert sorted(converted) == [
            "vmoe.layers.4.mlp.router.weight",
            "vmoe.layers.4.post_stitch.linear.weight",
            "vmoe.layers.4.pre_stitch.layernorm.bias",
        ]

    def test_an_unknown_tensor_is_named(self) -> None:
        with pytest.raises(ConversionError, match="official vmoe checkpoint.*blocks.0.moe.gate.noise"):
            transformer_to_ours("vmoe", {**experts(), "blocks.0.moe.gate.noise": torch.rand(1)})

    def test_every_number_of_an_official_checkpoint_is_there_once(self) -> None:
        official = {k: v for k, v in Case("vmoe_full").state_dict.items() if not k.startswith("stages.")}
        converted = transformer_to_ours("vmoe", official)
        assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in official.values())
        total = sum(v.double().sum() for v in official.values())
        assert torch.allclose(sum(v.double().sum() for v in converted.values()), total)


class TestToOfficial:
    def test_a_stage_of_a_vit_goes_there_and_back(self) -> None:
        official = {**block(0), **block(1)}
        assert_equal(
            transformer_to_official("vit", transformer_to_ours("vit", official, layer_offset=6), layer_offset=6),
            official,
        )

    def test_experts_are_taken_apart_in_their_order(self) -> None:
        official = {**experts(12), **block(1), "blocks.0.moe.gate.gate.bias": torch.rand(12)}
        official |= {"blocks.1.pre_stitch.fc.weight": torch.rand(4, 6), "head.bias": torch.rand(3)}
        assert_equal(
            transformer_to_official("vmoe", transformer_to_ours("vmoe", official, layer_offset=3), layer_offset=3),
            official,
        )

    @pytest.mark.parametrize("kind", ["vit", "vmoe"])
    def test_a_tensor_that_the_official_code_does_not_have_is_named(self, kind: str) -> None:
        with pytest.raises(ConversionError, match=f"pooler.weight of our {kind} has no official counterpart"):
            transformer_to_official(kind, {f"{kind}.pooler.weight": torch.rand(1)})

    def test_stages_and_aliases_go_there_and_back(self) -> None:
        official = {name: torch.rand(2) for name in ("cls_token", "patch_embed.proj.bias", "norm.bias", "head.weight")}
        official |= {**block(0), **block(1), **block(2)}
        stages = cut_in_stages(official, [2, 1])
        assert {"cls_token", "patch_embed.proj.bias", "blocks.1.norm1.weight"} < stages[0].keys()
        assert {"norm.bias", "head.weight", "blocks.0.norm1.weight"} < stages[1].keys()
        assert_equal(assemble_stages(stages, [2, 1]), official)
        both = with_aliases(official, [2, 1])
        assert both["stages.1.blocks.0.norm1.weight"] is official["blocks.2.norm1.weight"]
        assert len(both) == 2 * len(official)
        assert_equal(without_aliases(both), official)
