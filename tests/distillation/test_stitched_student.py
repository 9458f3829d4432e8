import pytest
import torch
from testing_utils import ROUTERS, assert_close, assert_equal, gradients, images, snapshot, vmoe
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification

from m2mkd import split_into_stages
from m2mkd.distillation.stitched_student import StitchedStage, StitchedStudent
from m2mkd.modeling.router_losses import importance_loss


STITCH_SIZE = 12
DEPTHS = [1, 2, 1]
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}


def student(indices: list[int], seed: int = 0, stitch: str = "layernorm_linear", **overrides) -> StitchedStudent:
    model = vmoe(**overrides)
    stages = split_into_stages(model, DEPTHS)
    return StitchedStudent(model, [stages[index] for index in indices], STITCH_SIZE, stitch, seed)


def inputs() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {0: images(), **{index: torch.randn(3, 5, STITCH_SIZE, generator=generator) for index in (1, 2)}}


class TestStitchedStage:
    @pytest.mark.parametrize("index, pre, post", [(0, False, True), (1, True, True), (2, True, False)])
    def test_only_inner_sides_are_stitched(self, index: int, pre: bool, post: bool) -> None:
        pair = StitchedStage(split_into_stages(vmoe(), DEPTHS)[index], STITCH_SIZE)
        assert (not isinstance(pair.pre, nn.Identity)) is pre
        assert (not isinstance(pair.post, nn.Identity)) is post
        hidden_states, balance = pair(inputs()[index])
        assert hidden_states.shape == ((3, 5, STITCH_SIZE) if post else (3, 5))
        assert balance == {}

    def test_it_is_pre_then_stage_then_post(self) -> None:
        pair = StitchedStage(split_into_stages(vmoe(), DEPTHS)[1], STITCH_SIZE)
        expected = pair.post(pair.stage(pair.pre(inputs()[1])))
        assert torch.equal(pair(inputs()[1])[0], expected)

    def test_a_linear_stitch_has_no_layer_norm(self) -> None:
        pair = StitchedStage(split_into_stages(vmoe(), DEPTHS)[1], STITCH_SIZE, "linear")
        names = {"pre.linear.weight", "pre.linear.bias", "post.linear.weight", "post.linear.bias"}
        assert set(pair.stitch_state_dict()) == names

    def test_without_stitches_it_is_the_stage(self) -> None:
        stage = split_into_stages(vmoe(), DEPTHS)[1]
        pair = StitchedStage(stage, 16, "none")
        hidden_states = torch.randn(3, 5, 16)
        assert torch.equal(pair(hidden_states)[0], stage(hidden_states))
        assert pair.stitch_state_dict() == {}

    @pytest.mark.parametrize("stitch", ["layernorm_linear", "none"])
    def test_the_distillation_token_of_a_deit_is_left_out_and_comes_back_as_the_class_token(self, stitch: str) -> None:
        pair = StitchedStage(split_into_stages(vmoe(), DEPTHS)[1], 16, stitch, special_tokens=2)
        hidden_states = torch.randn(3, 6, 16)
        alone = pair.post(pair.stage(pair.pre(hidden_states[:, [0, 2, 3, 4, 5]])))
        assert torch.equal(pair(hidden_states)[0], alone[:, [0, 0, 1, 2, 3, 4]])

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_the_outer_sides_of_a_student_have_no_other_tokens(self, index: int) -> None:
        pair = StitchedStage(split_into_stages(vmoe(), DEPTHS)[index], STITCH_SIZE, special_tokens=2)
        assert pair.stitch_state_dict().keys() == student([index]).pairs[str(index)].stitch_state_dict().keys()
        given = images() if index == 0 else torch.randn(3, 6, STITCH_SIZE)
        assert pair(given)[0].shape == ((3, 5) if index == 2 else (3, 6, STITCH_SIZE))

    def test_a_deit_inside_a_vit_makes_its_distillation_token_of_the_class_token(self) -> None:
        deit = DeiTForImageClassification(DeiTConfig(**SIZES)).eval()
        pair = StitchedStage(split_into_stages(deit, DEPTHS)[1], 16, "none", special_tokens=1)
        hidden_states = torch.randn(3, 5, 16)
        given = torch.cat([hidden_states[:, :1], hidden_states], dim=1)
        assert torch.equal(pair(hidden_states)[0], pair.stage(given)[:, [0, 2, 3, 4, 5]])

    def test_a_student_without_a_class_token_gives_the_mean_of_its_patches_for_one(self) -> None:
        stages = split_into_stages(vmoe(classifier_pooling="gap"), DEPTHS)
        pair = StitchedStage(stages[1], 16, special_tokens=1)
        hidden_states = torch.randn(3, 5, 16)
        alone = pair.post(pair.stage(pair.pre(hidden_states[:, 1:])))
        assert torch.equal(pair(hidden_states)[0], torch.cat([alone.mean(dim=1, keepdim=True), alone], dim=1))
        assert StitchedStage(stages[2], 16, special_tokens=1)(hidden_states)[0].shape == (3, 5)

    @pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
    def test_every_router_trains_between_stitches(self, options: dict) -> None:
        pairs = student([0, 1, 2], **options, moe_layers=[0, 1, 3]).pairs.train()
        for index, given in inputs().items():
            pair = pairs[str(index)]
            after = gradients(pair, pair(given)[0].square().sum())
            # the weights of an expert are zero where no token was sent to it
            for name in ("router", "experts.up_proj"):
                assert all(after[key].abs().max() > 0 for key in after if name in key and "bias" not in key)

    def test_the_balance_losses_are_those_of_its_own_layers(self) -> None:
        model = vmoe(moe_layers=[0, 1, 2], router_importance_loss_coef=0.3)
        pair = StitchedStage(split_into_stages(model, DEPTHS)[1], STITCH_SIZE).train()
        recorded = []
        for layer in (1, 2):
            model.vmoe.layers[layer].mlp.router.register_forward_hook(lambda _m, _i, out: recorded.append(out[0]))
        _, balance = pair(inputs()[1])
        importance = sum(importance_loss(logits) for logits in recorded) / 2
        assert torch.allclose(balance["importance_loss"], importance)
        assert torch.allclose(balance["aux_loss"], 0.3 * importance)

    @pytest.mark.parametrize("overrides", [{}, {"router_importance_loss_coef": 0.3}], ids=["no_weight", "weighed"])
    def test_there_is_none_in_evaluation_or_without_sparse_layers(self, overrides: dict) -> None:
        pairs = student([0, 1], moe_layers=[1], **overrides).pairs
        assert pairs["1"].eval()(inputs()[1])[1] == {}
        assert pairs["0"].train()(inputs()[0])[1] == {}

    def test_recording_leaves_no_hooks_behind(self) -> None:
        model = vmoe(router_importance_loss_coef=0.3)
        StitchedStage(split_into_stages(model, DEPTHS)[1], STITCH_SIZE).train()(inputs()[1])
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize(
        "overrides, expected",
        [
            ({}, [False, False]),
            ({"hidden_dropout_prob": 0.1}, [True, True]),
            ({"attention_probs_dropout_prob": 0.1}, [True, True]),
            ({"drop_path_rate": 0.1}, [False, True]),
            ({"router_noise_std": 1.0}, [False, True]),
        ],
        ids=["nothing", "dropout", "attention_dropout", "drop_path_of_later_layers", "noise_of_sparse_layers"],
    )
    def test_it_knows_whether_it_draws_random_numbers(self, overrides: dict, expected: list[bool]) -> None:
        pairs = student([0, 1], **overrides).pairs.values()
        assert [pair.is_stochastic for pair in pairs] == expected


class TestStitchedStudent:
    def test_it_holds_the_chosen_stages_and_their_stitches_alone(self) -> None:
        model = vmoe()
        stages = split_into_stages(model, DEPTHS)
        stitched = StitchedStudent(model, [stages[1]], STITCH_SIZE)
        held = {id(parameter) for parameter in stitched.parameters()}
        assert {id(p) for p in stages[1].parameters()} < held
        assert not held & {id(p) for stage in (stages[0], stages[2]) for p in stage.parameters()}
        assert {name.split(".")[0] for name in stitched.state_dict()} == {"pairs"}

    def test_stitches_start_the_same_alone_or_with_others(self) -> None:
        together = student([0, 1, 2]).pairs
        torch.manual_seed(99)
        alone = student([1]).pairs["1"]
        assert_equal(alone.stitch_state_dict(), together["1"].stitch_state_dict())

    def test_stitches_of_other_pairs_and_seeds_start_otherwise(self) -> None:
        # `pre` is drawn first: with one stream for all, those of pairs 1 and 2 would be equal
        pairs = student([1, 2]).pairs
        other = student([1], seed=1).pairs["1"]
        weight = pairs["1"].pre.linear.weight
        assert weight.shape == pairs["2"].pre.linear.weight.shape
        assert not torch.equal(weight, pairs["2"].pre.linear.weight)
        assert not torch.equal(weight, other.pre.linear.weight)

    def test_every_pair_gets_its_own_input(self) -> None:
        stitched = student([0, 2])
        outputs = stitched(inputs())
        assert list(outputs) == ["0", "2"]
        for name, (hidden_states, _) in outputs.items():
            assert torch.equal(hidden_states, stitched.pairs[name](inputs()[int(name)])[0])

    def test_a_pair_draws_the_same_random_numbers_alone_or_with_others(self) -> None:
        noise = {"drop_path_rate": 0.5, "router_noise_std": 4.0, "hidden_dropout_prob": 0.2}
        together = student([0, 1, 2], **noise).train()(inputs(), seed=11)
        torch.manual_seed(99)
        alone = student([1], **noise).train()(inputs(), seed=11)
        assert torch.equal(alone["1"][0], together["1"][0])
        assert not torch.equal(student([1], **noise).train()(inputs(), seed=12)["1"][0], together["1"][0])

    def test_pairs_and_seeds_draw_different_random_numbers(self) -> None:
        stitched = student([1, 2], hidden_dropout_prob=0.5).train()
        drawn = []
        for pair in stitched.pairs.values():
            pair.pre.register_forward_hook(lambda *_: drawn.append(torch.rand(4)))
        for seed in (11, 12):
            stitched(inputs(), seed=seed)
        assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4

    def test_a_seed_leaves_the_global_random_numbers_alone(self) -> None:
        stitched = student([1], hidden_dropout_prob=0.5).train()
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        stitched(inputs(), seed=1)
        assert torch.equal(torch.rand(2), expected)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*deprecated:FutureWarning")
    @pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
    def test_checkpointing_recomputes_and_gives_the_same_gradients(self, name: str) -> None:
        stitched = student([0, 1, 2], drop_path_rate=0.5, router_noise_std=4.0).train()
        calls = []
        stitched.pairs["1"].stage.vmoe.layers.get_submodule("1").mlp.register_forward_hook(lambda *_: calls.append(1))

        def result() -> dict[str, torch.Tensor]:
            calls.clear()
            outputs = stitched(inputs(), seed=4)
            return gradients(stitched, sum(hidden.square().sum() for hidden, _ in outputs.values()))

        expected = result()
        assert len(calls) == 1
        getattr(stitched, f"{name}_enable")()
        assert_close(result(), expected, atol=1e-6)
        assert len(calls) == 2
        getattr(stitched, f"{name}_disable")()
        assert_close(result(), expected, atol=1e-6)
        assert len(calls) == 1

    def test_training_it_trains_the_student(self) -> None:
        model = vmoe()
        before = snapshot(model)
        stitched = StitchedStudent(model, split_into_stages(model, DEPTHS)[1:2], STITCH_SIZE)
        with torch.no_grad():
            for parameter in stitched.parameters():
                parameter.add_(1.0)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.split(".")[2] for name in moved} == {"1", "2"}
