from functools import partial

import pytest
import torch
from testing_utils import (
    IMAGE_SIZE,
    NUM_LABELS,
    ROUTERS,
    assert_equal,
    images,
    on_meta,
    randomized,
    run_chain,
    snapshot,
    vit,
    vit_config,
    vmoe,
    vmoe_config,
)
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
    ViTImageProcessor,
)

from m2mkd import VMoEForImageClassification, split_into_stages
from m2mkd.distillation.checks import check_same_normalization, check_stitchable, num_tokens
from m2mkd.distillation.split import initialize_stage
from m2mkd.errors import StageError


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "num_labels": NUM_LABELS,
}


def deit() -> DeiTForImageClassification:
    return DeiTForImageClassification(DeiTConfig(**SIZES, intermediate_size=24))


def dinov2() -> Dinov2ForImageClassification:
    return Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2))


def deit_with_two_heads() -> DeiTForImageClassificationWithTeacher:
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, intermediate_size=24))


BUILDERS = {
    "vit": lambda: ViTForImageClassification(vit_config(**SIZES)),
    "deit": deit,
    "deit_with_two_heads": deit_with_two_heads,
    "dinov2": dinov2,
    "vmoe": lambda: VMoEForImageClassification(vmoe_config()),
    **{name: partial(VMoEForImageClassification, vmoe_config(**options)) for name, options in ROUTERS.items()},
    "vmoe_gap": lambda: VMoEForImageClassification(vmoe_config(classifier_pooling="gap", representation_size=6)),
    "vmoe_map": lambda: VMoEForImageClassification(vmoe_config(classifier_pooling="map", use_qk_norm=True)),
}


@pytest.fixture(params=BUILDERS)
def model(request) -> PreTrainedModel:
    return randomized(BUILDERS[request.param](), seed=1)


class TestSplitIntoStages:
    @pytest.mark.parametrize("depths", [[4], [2, 2], [1, 3], [1, 1, 1, 1]], ids=str)
    def test_the_stages_in_order_give_the_logits_of_the_model(self, model: PreTrainedModel, depths: list[int]) -> None:
        stages = split_into_stages(model, depths)
        assert [stage.num_layers for stage in stages] == depths
        assert torch.equal(run_chain(stages, images()), model(images()).logits)

    def test_a_middle_stage_keeps_the_shape(self, model: PreTrainedModel) -> None:
        first, second, third = split_into_stages(model, [1, 2, 1])
        hidden_states = first(images())
        assert hidden_states.shape == (3, num_tokens(model.config), 16)
        assert second(hidden_states).shape == hidden_states.shape
        assert third(second(hidden_states)).shape == (3, NUM_LABELS)
        assert [s.is_first for s in (first, second, third)] == [True, False, False]
        assert [s.is_last for s in (first, second, third)] == [False, False, True]
        assert [list(s.layer_indices) for s in (first, second, third)] == [[0], [1, 2], [3]]

    def test_stages_hold_the_tensors_of_the_model_itself(self, model: PreTrainedModel) -> None:
        tensors = dict(model.named_parameters())
        for stage in split_into_stages(model, [1, 3]):
            for name, parameter in stage.named_parameters():
                assert parameter is tensors[name]

    def test_training_a_stage_trains_the_model(self, model: PreTrainedModel) -> None:
        before = snapshot(model)
        stage = split_into_stages(model, [1, 2, 1])[1]
        optimizer = torch.optim.SGD(stage.parameters(), lr=1.0)
        stage(torch.randn(3, num_tokens(model.config), 16)).square().sum().backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved and moved <= stage.state_dict().keys()

    def test_the_names_of_all_stages_are_those_of_the_model_each_once(self, model: PreTrainedModel) -> None:
        names = [name for stage in split_into_stages(model, [1, 2, 1]) for name in stage.state_dict()]
        assert len(names) == len(set(names))
        assert set(names) == set(model.state_dict())

    def test_a_stage_saved_by_name_loads_into_the_model(self, model: PreTrainedModel) -> None:
        state = {k: v.clone() for stage in split_into_stages(model, [2, 2]) for k, v in stage.state_dict().items()}
        other = randomized(type(model)(model.config), seed=2)
        other.load_state_dict(state, strict=True)
        assert torch.equal(other(images()).logits, model(images()).logits)

    def test_embedding_arguments_reach_the_first_stage(self) -> None:
        model, pixel_values = vmoe(), images(size=16)
        first, second = split_into_stages(model, [1, 3])
        logits = second(first(pixel_values, interpolate_pos_encoding=True))
        assert torch.equal(logits, model(pixel_values, interpolate_pos_encoding=True).logits)

    def test_images_are_cast_to_the_dtype_of_the_first_stage(self) -> None:
        model = vit().to(torch.bfloat16)
        assert split_into_stages(model, [1, 2])[0](images()).dtype == torch.bfloat16

    def test_an_ensemble_is_refused_with_the_way_out(self) -> None:
        with pytest.raises(StageError, match="`num_ensemble_members` 2.*one member, or train the ensemble end to end"):
            split_into_stages(vmoe(num_ensemble_members=2), [2, 2])

    @pytest.mark.parametrize("depths", [[2, 3], [1, 1], [5]], ids=str)
    def test_depths_that_do_not_add_up_are_refused_with_both_sums(self, depths: list[int]) -> None:
        with pytest.raises(StageError, match=rf"add up to {sum(depths)} layers, but VMoEForImageClassification has 4"):
            split_into_stages(vmoe(), depths)

    @pytest.mark.parametrize("depths", [[], [0, 4], [-1, 5], [2.0, 2.0], [True, 3], ["2", "2"]], ids=str)
    def test_depths_that_are_no_counts_are_refused(self, depths: list) -> None:
        with pytest.raises(StageError, match="whole numbers of at least 1"):
            split_into_stages(vmoe(), depths)

    def test_an_unknown_architecture_is_refused_with_the_known_ones(self) -> None:
        model = on_meta(lambda: ConvNextForImageClassification(ConvNextConfig(depths=[1, 1, 1, 1])))
        with pytest.raises(StageError, match="ConvNextForImageClassification cannot be cut.*CLIP.*V-MoE.*`kd`"):
            split_into_stages(model, [4])

    def test_the_bare_model_is_refused_because_it_has_no_head(self) -> None:
        with pytest.raises(StageError, match="VMoEModel cannot be cut"):
            split_into_stages(vmoe().vmoe, [4])

    def test_a_stage_says_where_it_is(self) -> None:
        assert "stage 1 of 2, layers [1, 2, 3]" in repr(split_into_stages(vmoe(), [1, 3])[1])


class TestInitializeStage:
    def test_alone_with_the_others_and_from_the_meta_device_it_starts_the_same(self, model: PreTrainedModel) -> None:
        together = type(model)(model.config)
        for stage in split_into_stages(together, [1, 2, 1]):
            torch.manual_seed(stage.index)  # whatever was drawn before
            initialize_stage(together, stage, seed=7)
        expected = {name: value.clone() for name, value in together.state_dict().items()}
        for index in range(3):
            for build in (lambda: type(model)(model.config), lambda: on_meta(lambda: type(model)(model.config))):
                alone = build()
                stage = split_into_stages(alone, [1, 2, 1])[index]
                initialize_stage(alone, stage, seed=7)
                assert_equal(stage.state_dict(), {name: expected[name] for name in stage.state_dict()})

    def test_the_other_stages_stay_without_memory(self, model: PreTrainedModel) -> None:
        built = on_meta(lambda: type(model)(model.config))
        stages = split_into_stages(built, [1, 2, 1])
        initialize_stage(built, stages[1], seed=0)
        assert not any(parameter.is_meta for parameter in stages[1].parameters())
        assert all(p.is_meta for stage in (stages[0], stages[2]) for p in stage.parameters())
        own = {name for name, p in built.named_parameters() if not p.is_meta}
        assert own == set(stages[1].state_dict()), "the model does not see the stage's new tensors"

    def test_it_draws_what_the_model_would(self) -> None:
        model = vmoe(initializer_range=0.05, hidden_size=32, intermediate_size=64)
        stage = split_into_stages(model, [1, 2, 1])[1]
        initialize_stage(model, stage, seed=0)
        experts = model.vmoe.layers[1].mlp.experts
        assert 0.04 < experts.up_proj.std() < 0.06 and (experts.up_proj_bias == 0).all()
        assert (model.vmoe.layers[2].layernorm_before.weight == 1).all()

    def test_another_seed_and_another_stage_get_other_weights(self) -> None:
        model = vmoe(moe_layers=[])
        drawn = []
        for seed in (0, 1):
            for stage in split_into_stages(model, [1, 2, 1])[1:]:
                initialize_stage(model, stage, seed=seed)
                drawn.append(model.vmoe.layers[stage.layer_indices[0]].mlp.fc1.weight.clone())
        assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])

    def test_the_global_random_numbers_go_on_as_if_nothing_was_drawn(self) -> None:
        model = vmoe()
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        initialize_stage(model, split_into_stages(model, [2, 2])[0], seed=0)
        assert torch.equal(torch.rand(2), expected)


def test_a_dinov2_needs_more_than_one_token() -> None:
    *_, last = split_into_stages(randomized(dinov2(), seed=1), [2, 2])
    with pytest.raises(StageError, match="set `read_in_latents` to 'all'"):
        last(torch.randn(3, 1, 16))


class TestNumTokens:
    def test_it_is_the_length_of_the_hidden_states(self, model: PreTrainedModel) -> None:
        hidden_states = model(images(), output_hidden_states=True).hidden_states[0]
        assert num_tokens(model.config) == hidden_states.shape[1]

    def test_an_oblong_image_counts_each_side(self) -> None:
        assert num_tokens(vmoe_config(image_size=[8, 16], patch_size=[4, 2])) == 2 * 8 + 1


class TestCheckStitchable:
    def test_networks_that_fit_pass(self) -> None:
        check_stitchable(vmoe_config(), vit_config(), vit_config())
        check_stitchable(vmoe_config(), None, vit_config())
        check_stitchable(vmoe_config(), None, None)

    def test_teacher_and_meta_model_of_different_width_are_refused(self) -> None:
        with pytest.raises(StageError, match="teacher is 16 wide and the meta model 12.*`hidden_size`"):
            check_stitchable(vmoe_config(), vit_config(hidden_size=16), vit_config())

    @pytest.mark.parametrize("who", ["teacher", "meta model"])
    def test_another_number_of_patches_is_refused_with_its_causes(self, who: str) -> None:
        other, fine = vit_config(patch_size=2), vit_config()
        networks = (other, fine) if who == "teacher" else (fine, other)
        with pytest.raises(StageError, match=f"student has 4 patches.*the {who} 16.*patch_size 2"):
            check_stitchable(vmoe_config(), *networks)

    def test_a_student_may_lack_the_distillation_token_of_teacher_and_meta_model(self) -> None:
        deit = DeiTConfig(**SIZES, intermediate_size=24)
        check_stitchable(vmoe_config(), deit, deit)

    def test_teacher_and_meta_model_have_the_same_tokens(self) -> None:
        teacher = DeiTConfig(**{**SIZES, "hidden_size": 12}, intermediate_size=24)
        with pytest.raises(StageError, match=r"\(a deit\) has 2 and the meta model \(a vit\) 1. .*from_teacher"):
            check_stitchable(vmoe_config(), teacher, vit_config())

    def test_the_whole_student_may_have_other_tokens_than_its_teacher(self) -> None:
        check_stitchable(vmoe_config(), vit_config(patch_size=2), None)

    @pytest.mark.parametrize("who", ["teacher", "meta model"])
    def test_another_number_of_classes_is_refused(self, who: str) -> None:
        other, fine = vit_config(num_labels=7), vit_config()
        networks = (other, fine) if who == "teacher" else (fine, other)
        with pytest.raises(StageError, match=f"student has 5 classes and the {who} 7"):
            check_stitchable(vmoe_config(), *networks)

    def test_classes_in_another_order_are_refused_by_the_first_that_differs(self) -> None:
        ours = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
        theirs = {**ours, 1: "cat", 2: "bee"}
        with pytest.raises(StageError, match="class 1 is 'bee', the teacher's is 'cat'"):
            check_stitchable(vmoe_config(id2label=ours), vit_config(id2label=theirs), None)

    def test_classes_without_names_fit_any_names(self) -> None:
        named = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
        check_stitchable(vmoe_config(), vit_config(id2label=named), vit_config())
        check_stitchable(vmoe_config(id2label=named), vit_config(), vit_config(id2label=named))


class TestCheckSameNormalization:
    def test_equal_processors_pass(self) -> None:
        processors = [ViTImageProcessor(image_mean=mean) for mean in ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3))]
        check_same_normalization(*processors, ("student", "teacher"))

    @pytest.mark.parametrize(
        "field, value",
        [
            ("image_mean", [0.1, 0.2, 0.3]),
            ("image_std", [0.1, 0.2, 0.3]),
            ("do_normalize", False),
            ("do_rescale", False),
            ("rescale_factor", 0.5),
            ("size", {"height": 32, "width": 32}),
        ],
    )
    def test_a_difference_is_refused_by_field_and_network(self, field: str, value: object) -> None:
        with pytest.raises(StageError, match=f"student and the teacher differ in `{field}`"):
            check_same_normalization(ViTImageProcessor(), ViTImageProcessor(**{field: value}), ("student", "teacher"))
