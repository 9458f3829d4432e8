import pytest
import torch
from testing_utils import images, run_chain, vit

from m2mkd import split_into_stages
from m2mkd.distillation.frozen_networks import FrozenNetworks, TeacherContext


BATCH = {"pixel_values": images()}


def networks(indices: tuple[int, ...] = (0, 1, 2), **overrides) -> FrozenNetworks:
    meta = split_into_stages(vit(seed=1, **overrides), [1, 1, 1])
    teacher = split_into_stages(vit(seed=2, num_hidden_layers=5, **overrides), [1, 2, 2])
    return FrozenNetworks(meta, {index: teacher[index] for index in indices})


class TestFrozenNetworks:
    def test_the_prefix_is_what_the_meta_model_computes_before_each_pair(self) -> None:
        frozen = networks()
        inputs = frozen.prefix(images(), [0, 1, 2])
        assert torch.equal(inputs[0], images())
        assert torch.equal(inputs[1], frozen.meta[0](images()))
        assert torch.equal(inputs[2], frozen.meta[1](frozen.meta[0](images())))

    @pytest.mark.parametrize(
        "indices, calls", [([0], [0, 0, 0]), ([1], [1, 0, 0]), ([2], [1, 1, 0]), ([0, 2], [1, 1, 0])]
    )
    def test_the_prefix_runs_no_stage_twice_and_none_in_vain(self, indices: list[int], calls: list[int]) -> None:
        frozen, counted = networks(), [0, 0, 0]

        def count(index: int) -> None:
            counted[index] += 1

        for index, stage in enumerate(frozen.meta):
            stage.register_forward_hook(lambda *_, index=index: count(index))
        assert sorted(frozen.prefix(images(), indices)) == indices
        assert counted == calls

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_prefix_stage_and_suffix_are_the_meta_model(self, index: int) -> None:
        frozen = networks()
        inputs = frozen.prefix(images(), [index])[index]
        logits = frozen.suffix(frozen.meta[index](inputs), index)
        assert torch.equal(logits, run_chain(frozen.meta, images()))

    def test_the_suffix_passes_gradient_to_its_input_alone(self) -> None:
        frozen = networks()
        hidden_states = torch.randn(3, 5, 12, requires_grad=True)
        frozen.suffix(hidden_states, 0).sum().backward()
        assert hidden_states.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in frozen.parameters())

    def test_the_teacher_takes_the_place_of_one_meta_stage(self) -> None:
        frozen = networks()
        _, logits = frozen.inputs_and_targets(BATCH, [0, 1, 2])
        for index in range(3):
            chain = [*frozen.meta[:index], frozen.teacher[str(index)], *frozen.meta[index + 1 :]]
            assert torch.equal(logits[index], run_chain(chain, images()))
            assert not logits[index].requires_grad

    def test_pairs_without_a_teacher_have_no_teacher_logits(self) -> None:
        frozen = networks(indices=(1,))
        assert list(frozen.inputs_and_targets(BATCH, [0, 1])[1]) == [1]

    def test_nothing_in_it_wants_a_gradient(self) -> None:
        assert not any(parameter.requires_grad for parameter in networks().parameters())

    def test_it_stays_in_evaluation_mode(self) -> None:
        frozen = networks(hidden_dropout_prob=0.5)
        frozen.train()
        assert not any(module.training for module in frozen.modules())
        logits = [frozen.inputs_and_targets(BATCH, [1])[1][1] for _ in range(2)]
        assert torch.equal(*logits)

    def test_without_networks_it_hands_the_images_on(self) -> None:
        frozen, logits = FrozenNetworks([], {}), torch.randn(3, 5)
        assert torch.equal(frozen.prefix(images(), [0])[0], images())
        assert frozen.inputs_and_targets(BATCH, [0])[1] == {}
        assert torch.equal(frozen.suffix(logits, 0), logits)
        assert frozen.dtype == torch.float32

    def test_in_bf16_the_suffix_takes_what_an_fp32_student_hands_over(self) -> None:
        frozen = networks().to(torch.bfloat16)
        assert frozen.dtype == torch.bfloat16
        hidden_states = torch.randn(3, 5, 12, requires_grad=True)
        logits = frozen.suffix(hidden_states, 0)
        assert logits.dtype == torch.bfloat16
        logits.float().sum().backward()
        assert hidden_states.grad.dtype == torch.float32


class TestBoundary:
    def test_the_target_is_the_output_of_the_teachers_stage_inside_the_meta_model(self) -> None:
        frozen = networks()
        frozen.match = "boundary"
        inputs, targets = frozen.inputs_and_targets(BATCH, [0, 1, 2])
        for index in range(3):
            assert torch.equal(targets[index], frozen.teacher[str(index)](inputs[index]))
            assert torch.equal(frozen.matched(targets[index], index), targets[index])


class TestTeacherContext:
    @staticmethod
    def stages() -> list:
        return split_into_stages(vit(seed=2, num_hidden_layers=5), [1, 2, 2])

    @pytest.mark.parametrize("indices", [[0, 1, 2], [1], [0, 2]])
    def test_inputs_and_targets_are_the_teachers_own_hidden_states(self, indices: list[int]) -> None:
        inputs, targets = TeacherContext(self.stages(), indices).inputs_and_targets(BATCH, indices)
        hidden = BATCH["pixel_values"]
        for index, stage in enumerate(self.stages()):
            if index in indices:
                assert torch.equal(inputs[index], hidden)
                assert torch.equal(targets[index], stage(hidden))
            hidden = stage(hidden)
        assert list(inputs) == list(targets) == indices

    @pytest.mark.parametrize("indices", [[0, 1], [1]])
    def test_the_logits_are_those_of_the_whole_teacher(self, indices: list[int]) -> None:
        frozen = TeacherContext(self.stages(), indices, "logits")
        inputs, targets = frozen.inputs_and_targets(BATCH, indices)
        for index in indices:
            assert torch.equal(targets[index], run_chain(self.stages(), BATCH["pixel_values"]))
            assert torch.equal(frozen.matched(self.stages()[index](inputs[index]), index), targets[index])
