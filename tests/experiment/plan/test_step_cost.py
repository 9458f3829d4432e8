"""What a step costs, against products that can be counted by hand."""

import pytest
from testing_utils import IMAGE_SIZE, vit_config, vmoe_config

from m2mkd import split_into_stages
from m2mkd.experiment.flops import count_parameters
from m2mkd.experiment.plan.step_cost import (
    COUNTED_IMAGES,
    StageCounter,
    StepCost,
    build_on_meta,
    stitched_pairs,
    trained_cost,
)


# Width, width within a layer, tokens of an image, pixels of a patch, classes: see vit_config.
WIDTH, INNER, TOKENS, PATCH, CLASSES = 12, 20, 5, 48, 5
# Multiplications and additions apart: projections, scores and their use, and the two halves of the MLP.
LAYER = 2 * TOKENS * (4 * WIDTH**2 + 2 * TOKENS * WIDTH + 2 * WIDTH * INNER)
IMAGES = (COUNTED_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_costs_add_up() -> None:
    assert StepCost(1, 2, 3, 4) + StepCost(10, 20, 30, 40) == StepCost(11, 22, 33, 44)


class TestStageCounter:
    def test_flops_of_an_image(self) -> None:
        stem, last = split_into_stages(build_on_meta(vit_config()), [1, 2])
        counter = StageCounter()
        step, shape = counter.forward(stem, IMAGES)
        assert step.flops == LAYER + 2 * (TOKENS - 1) * PATCH * WIDTH and step.frozen == count_parameters(stem)
        assert step.saved == 0 and shape == (COUNTED_IMAGES, TOKENS, WIDTH)
        step, shape = counter.forward(last, shape)
        assert step.flops == 2 * LAYER + 2 * WIDTH * CLASSES and shape == (COUNTED_IMAGES, CLASSES)

    def test_gradient_for_the_input_costs_another_pass(self) -> None:
        _, last = split_into_stages(build_on_meta(vit_config()), [1, 2])
        shape, counter = (COUNTED_IMAGES, TOKENS, WIDTH), StageCounter()
        forward, passed = counter.forward(last, shape)[0], counter.passed(last, shape)[0]
        # each product of two activations, of which a layer has two, needs a gradient for both
        products = 2 * 2 * (2 * TOKENS * TOKENS * WIDTH)
        assert passed.flops == 2 * forward.flops + products and passed.saved > 0 == passed.parameters

    def test_a_stage_is_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stem, _ = split_into_stages(build_on_meta(vit_config()), [1, 2])
        counter = StageCounter()
        first = counter.forward(stem, IMAGES)
        monkeypatch.setattr(stem, "forward", None)
        assert counter.forward(stem, IMAGES) is first


class TestTrainedCost:
    def test_weights_need_a_gradient_as_well(self) -> None:
        student = build_on_meta(vit_config())
        stages = split_into_stages(student, [3])
        (pair,) = stitched_pairs(student, stages, WIDTH, "none")
        cost, shape = trained_cost(pair, IMAGES)
        embeddings, head = 2 * (TOKENS - 1) * PATCH * WIDTH, 2 * WIDTH * CLASSES
        # images need no gradient
        assert cost.flops == 3 * (3 * LAYER + head) + 2 * embeddings and shape == (COUNTED_IMAGES, CLASSES)
        assert cost.parameters == count_parameters(student)

    def test_of_the_layers_alone(self) -> None:
        student = build_on_meta(vit_config())
        (pair,) = stitched_pairs(student, split_into_stages(student, [3]), WIDTH, "none")
        cost, _ = trained_cost(pair, IMAGES, layers_only=True)
        assert cost.parameters == sum(count_parameters(layer) for layer in student.vit.layers)

    def test_experts_that_are_not_chosen_cost_nothing(self) -> None:
        def flops(**sizes: int) -> float:
            student = build_on_meta(vmoe_config(moe_layers=[1], **sizes))
            (pair,) = stitched_pairs(student, split_into_stages(student, [4]), 16, "none")
            return trained_cost(pair, IMAGES)[0].flops

        # the router alone grows with their number
        assert 0 < flops(num_experts=6) - flops(num_experts=4) <= 3 * 2 * TOKENS * 16 * 2
