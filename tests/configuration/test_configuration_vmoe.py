import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from testing_utils import vmoe_config
from transformers import AutoConfig

from m2mkd import VMoEConfig
from m2mkd.configuration.configuration_vmoe import VMOE_PRESETS


class TestVMoEConfig:
    @pytest.mark.parametrize(
        "overrides, field, rule",
        [
            pytest.param({"hidden_size": 0}, "hidden_size", "at least 1", id="hidden_size"),
            pytest.param({"num_hidden_layers": 0, "moe_layers": []}, "num_hidden_layers", "at least 1", id="depth"),
            pytest.param({"num_attention_heads": 0}, "num_attention_heads", "at least 1", id="num_attention_heads"),
            pytest.param({"intermediate_size": -1}, "intermediate_size", "at least 1", id="intermediate_size"),
            pytest.param({"num_channels": 0}, "num_channels", "at least 1", id="num_channels"),
            pytest.param({"num_attention_heads": 3}, "num_attention_heads", "multiple", id="heads_divide_width"),
            pytest.param({"image_size": 9}, "image_size", "multiple of `patch_size`", id="patches_cover_image"),
            pytest.param({"image_size": [8, 9]}, "image_size", "multiple of `patch_size`", id="patches_cover_width"),
            pytest.param({"patch_size": 0}, "patch_size", "positive", id="patch_size"),
            pytest.param({"drop_path_rate": 1.0}, "drop_path_rate", "[0, 1)", id="drop_path_rate_high"),
            pytest.param({"drop_path_rate": -0.1}, "drop_path_rate", "[0, 1)", id="drop_path_rate_low"),
            pytest.param({"moe_layers": [4]}, "moe_layers", "from 0 to 3", id="moe_layers_range"),
            pytest.param({"moe_layers": [-1]}, "moe_layers", "from 0 to 3", id="moe_layers_negative"),
            pytest.param({"moe_layers": [1, 1]}, "moe_layers", "different", id="moe_layers_twice"),
            pytest.param({"num_experts_per_tok": 5}, "num_experts_per_tok", "num_experts >=", id="top_k_high"),
            pytest.param({"num_experts_per_tok": 0}, "num_experts_per_tok", ">= 1", id="top_k_low"),
            pytest.param({"num_experts": 0}, "num_experts", ">= 1", id="num_experts"),
            pytest.param({"router_noise_std": -1.0}, "router_noise_std", "not be negative", id="router_noise_std"),
            pytest.param(
                {"router_importance_loss_coef": -1.0},
                "router_importance_loss_coef",
                "not be negative",
                id="importance",
            ),
            pytest.param({"router_load_loss_coef": -1.0}, "router_load_loss_coef", "not be negative", id="load"),
            pytest.param(
                {"router_load_loss_coef": 0.1}, "router_load_loss_coef", "router_noise_std", id="load_needs_noise"
            ),
            pytest.param(
                {"pre_stitch_layers": [4], "stitch_size": 8}, "pre_stitch_layers", "from 0 to 3", id="pre_stitch_range"
            ),
            pytest.param(
                {"post_stitch_layers": [0, 0], "stitch_size": 8},
                "post_stitch_layers",
                "different",
                id="post_stitch_twice",
            ),
            pytest.param({"pre_stitch_layers": [1]}, "pre_stitch_layers", "stitch_size", id="pre_stitch_width"),
            pytest.param({"router_gshard_loss_coef": -1}, "router_gshard_loss_coef", "not be negative", id="gshard"),
            pytest.param({"capacity_factor": 0}, "capacity_factor", "must be positive", id="capacity_factor"),
            pytest.param({"expert_capacity": -1}, "expert_capacity", "must be positive", id="expert_capacity"),
            pytest.param({"capacity_multiple_of": 0}, "capacity_multiple_of", "must be positive", id="multiple_of"),
            pytest.param({"router_group_size": 0}, "router_group_size", "must be positive", id="group_size"),
            pytest.param(
                {"capacity_factor": 1.0, "expert_capacity": 2},
                "expert_capacity",
                "Set one of them",
                id="two_capacities",
            ),
            pytest.param({"router_type": "soft", "num_slots": 0}, "num_slots", "at least 1", id="num_slots"),
            pytest.param(
                {"router_type": "soft", "capacity_factor": 1.0},
                "capacity_factor",
                "Set `num_slots`",
                id="soft_capacity",
            ),
            pytest.param(
                {"router_type": "expert_choice"}, "router_type", "needs `capacity_factor`", id="expert_choice"
            ),
            pytest.param(
                {"batch_prioritized_routing": True},
                "batch_prioritized_routing",
                "Set `capacity_factor`",
                id="priorities",
            ),
            pytest.param(
                {"batch_prioritized_routing": True, "router_type": "expert_choice", "capacity_factor": 1.0},
                "batch_prioritized_routing",
                "token choice",
                id="priorities_of_experts",
            ),
            pytest.param(
                {"router_type": "soft", "router_importance_loss_coef": 0.1},
                "router_importance_loss_coef",
                "same load",
                id="loss_of_soft",
            ),
            pytest.param(
                {"router_type": "expert_choice", "capacity_factor": 1.0, "router_gshard_loss_coef": 0.1},
                "router_gshard_loss_coef",
                "same load",
                id="loss_of_expert_choice",
            ),
            pytest.param({"num_ensemble_members": 3}, "num_ensemble_members", "divide `num_experts` 4", id="members"),
            pytest.param({"num_ensemble_members": 0}, "num_ensemble_members", "at least 1", id="no_members"),
            pytest.param(
                {"num_ensemble_members": 2, "num_experts_per_tok": 3},
                "num_experts_per_tok",
                "only 2 of the 4",
                id="experts_of_a_member",
            ),
            pytest.param(
                {"num_ensemble_members": 2, "router_type": "soft"},
                "num_ensemble_members",
                "'token_choice'",
                id="soft_e3",
            ),
            pytest.param(
                {"num_ensemble_members": 2, "moe_layers": []}, "num_ensemble_members", "a sparse layer", id="dense_e3"
            ),
            pytest.param(
                {"num_ensemble_members": 2, "problem_type": "multi_label_classification"},
                "problem_type",
                "softmax over the classes",
                id="e3_labels",
            ),
            pytest.param(
                {"num_ensemble_members": 2, "router_group_size": 5},
                "router_group_size",
                "a multiple of",
                id="e3_group",
            ),
            pytest.param({"representation_size": 0}, "representation_size", "at least 1", id="representation_size"),
            pytest.param(
                {"position_embedding_type": "sincos2d", "hidden_size": 18, "num_attention_heads": 2},
                "position_embedding_type",
                "multiple of 4",
                id="sincos2d",
            ),
            pytest.param({"post_stitch_layers": [1]}, "post_stitch_layers", "stitch_size", id="post_stitch_width"),
        ],
    )
    def test_a_broken_rule_is_refused_by_field_and_rule(self, overrides: dict, field: str, rule: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError) as error:
            vmoe_config(**overrides)
        assert isinstance(error.value.__cause__, ValueError)
        assert f"`{field}" in str(error.value) or f"{field}`" in str(error.value)
        assert rule in str(error.value)

    @pytest.mark.parametrize(
        "overrides", [{"hidden_size": "16"}, {"qkv_bias": "no"}, {"moe_layers": 2}, {"router_type": "top"}]
    )
    def test_a_wrong_type_is_refused(self, overrides: dict) -> None:
        with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(overrides))):
            vmoe_config(**overrides)

    def test_a_rule_broken_by_assignment_is_found_before_saving(self, tmp_path) -> None:
        config = vmoe_config()
        config.num_experts_per_tok = 9
        with pytest.raises(StrictDataclassClassValidationError, match="num_experts_per_tok"):
            config.save_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "edge", [{"drop_path_rate": 0}, {"router_importance_loss_coef": 1}, {"num_experts_per_tok": 4}]
    )
    def test_values_on_the_edge_are_accepted(self, edge: dict) -> None:
        name, value = next(iter(edge.items()))
        assert getattr(vmoe_config(**edge), name) == value

    def test_the_default_is_vmoe_base_of_the_paper(self) -> None:
        config = VMoEConfig()
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
        assert (config.intermediate_size, config.patch_size, config.image_size) == (3072, 16, 224)
        assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
        assert config.moe_layers == list(range(12))

    @pytest.mark.parametrize(
        "name, layers, width, heads, mlp, experts, patch",
        [
            ("tiny", 4, 32, 4, 128, 4, 8),
            ("base", 12, 768, 12, 3072, 8, 16),
            ("large", 24, 1024, 16, 4096, 8, 16),
            ("huge", 32, 1280, 16, 5120, 8, 14),
        ],
    )
    def test_presets_have_the_sizes_of_their_vit(
        self, name: str, layers: int, width: int, heads: int, mlp: int, experts: int, patch: int
    ) -> None:
        config = VMoEConfig.from_preset(name)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
        assert (config.intermediate_size, config.num_experts, config.patch_size) == (mlp, experts, patch)
        assert config.num_experts_per_tok == 2
        assert config.moe_layers == list(range(layers))

    def test_overrides_win_over_the_preset_and_leave_it_as_it_was(self) -> None:
        config = VMoEConfig.from_preset("tiny", hidden_size=48, num_labels=7)
        assert (config.hidden_size, config.num_labels) == (48, 7)
        assert VMOE_PRESETS["tiny"]["hidden_size"] == 32

    def test_an_unknown_preset_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="'giant'.*'base', 'huge', 'large', 'tiny'"):
            VMoEConfig.from_preset("giant")

    def test_no_moe_layers_given_means_every_layer(self) -> None:
        assert vmoe_config(moe_layers=None).moe_layers == [0, 1, 2, 3]

    @pytest.mark.parametrize("moe_layers", [None, [], [0, 2]])
    def test_save_and_load_keep_every_field(self, tmp_path, moe_layers: list[int] | None) -> None:
        config = vmoe_config(
            moe_layers=moe_layers,
            drop_path_rate=0.1,
            router_noise_std=1.0,
            router_load_loss_coef=0.01,
            capacity_factor=1.05,
            batch_prioritized_routing=True,
            stitch_size=8,
            pre_stitch_layers=[1],
            image_size=[8, 12],
        )
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is VMoEConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert loaded.moe_layers == ([0, 1, 2, 3] if moe_layers is None else moe_layers)

    def test_auto_config_makes_one_by_its_model_type(self) -> None:
        assert type(AutoConfig.for_model("vmoe")) is VMoEConfig

    def test_the_usual_name_of_the_expert_count_works(self) -> None:
        config = vmoe_config(num_local_experts=2)
        assert config.num_experts == config.num_local_experts == 2
