import math

import pytest
import torch

from m2mkd.distillation.losses import (
    boundary_loss,
    hard_distillation_loss,
    per_sample_boundary_error,
    per_sample_cross_entropy,
    per_sample_kl,
    pool_tokens,
    soft_distillation_loss,
)
from m2mkd.modeling.router_losses import importance_loss, load_loss


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def squared_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


STUDENT = [[1.0, 2.0, -0.5], [0.0, -1.0, 3.0]]
TEACHER = [[0.5, 0.5, 0.0], [2.0, 0.1, -1.0]]


class TestPerSampleCrossEntropy:
    def test_it_is_minus_the_log_probability_of_the_label(self) -> None:
        loss = per_sample_cross_entropy(torch.tensor(STUDENT), torch.tensor([1, 0]))
        expected = [-math.log(softmax(STUDENT[0])[1]), -math.log(softmax(STUDENT[1])[0])]
        assert loss.tolist() == pytest.approx(expected, rel=1e-6)

    def test_smoothing_spreads_its_share_over_all_classes(self) -> None:
        loss = per_sample_cross_entropy(torch.tensor(STUDENT), torch.tensor([1, 0]), label_smoothing=0.3)
        for row, label, value in zip(STUDENT, [1, 0], loss.tolist(), strict=True):
            target = [0.3 / 3 + (0.7 if index == label else 0.0) for index in range(3)]
            assert value == pytest.approx(
                -sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True)), rel=1e-6
            )

    def test_a_distribution_weighs_the_classes(self) -> None:
        targets = [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]
        loss = per_sample_cross_entropy(torch.tensor(STUDENT), torch.tensor(targets))
        for row, target, value in zip(STUDENT, targets, loss.tolist(), strict=True):
            assert value == pytest.approx(
                -sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True)), rel=1e-6
            )

    def test_a_one_hot_distribution_is_the_label(self) -> None:
        logits, labels = torch.tensor(STUDENT), torch.tensor([1, 0])
        soft = torch.nn.functional.one_hot(labels, 3).float()
        for smoothing in (0.0, 0.2):
            assert torch.allclose(
                per_sample_cross_entropy(logits, soft, smoothing), per_sample_cross_entropy(logits, labels, smoothing)
            )

    def test_half_precision_is_computed_in_float32(self) -> None:
        loss = per_sample_cross_entropy(torch.tensor(STUDENT, dtype=torch.bfloat16), torch.tensor([1, 0]))
        assert loss.dtype == torch.float32


class TestPerSampleKL:
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_it_is_the_divergence_from_the_teacher_times_the_temperature_squared(self, temperature: float) -> None:
        ours = per_sample_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature).tolist()
        for student, teacher, value in zip(STUDENT, TEACHER, ours, strict=True):
            p, q = softmax(teacher, temperature), softmax(student, temperature)
            expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert value == pytest.approx(expected, rel=1e-5)

    def test_it_is_zero_for_identical_logits(self) -> None:
        logits = torch.randn(4, 7)
        assert per_sample_kl(logits, logits, 3.0).tolist() == [0.0] * 4

    def test_it_does_not_see_a_constant_added_to_the_logits(self) -> None:
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        shifted = per_sample_kl(student + 5, teacher - 3)
        assert torch.allclose(shifted, per_sample_kl(student, teacher), atol=1e-5)

    def test_it_is_not_symmetric(self) -> None:
        student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
        assert not torch.allclose(per_sample_kl(student, teacher), per_sample_kl(teacher, student))

    def test_certain_networks_give_a_finite_value(self) -> None:
        student, teacher = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
        assert per_sample_kl(student, teacher).tolist() == pytest.approx([200.0])

    def test_the_temperature_factor_keeps_the_size_of_the_gradient(self) -> None:
        norms = []
        for temperature in (20.0, 80.0):
            student = torch.tensor(STUDENT, requires_grad=True)
            per_sample_kl(student, torch.tensor(TEACHER), temperature).sum().backward()
            norms.append(student.grad.norm().item())
        assert norms[0] == pytest.approx(norms[1], rel=0.1)


class TestSoftDistillationLoss:
    def test_batchmean_is_the_mean_over_the_images(self) -> None:
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        assert torch.allclose(
            soft_distillation_loss(student, teacher, 2.0), per_sample_kl(student, teacher, 2.0).mean()
        )

    def test_mean_is_weaker_by_the_number_of_classes(self) -> None:
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        batchmean = soft_distillation_loss(student, teacher, 2.0, reduction="batchmean")
        assert torch.allclose(batchmean, 7 * soft_distillation_loss(student, teacher, 2.0, reduction="mean"))

    @pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
    def test_both_are_those_of_torch(self) -> None:
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        for reduction in ("batchmean", "mean"):
            theirs = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction=reduction)
            assert torch.allclose(soft_distillation_loss(student, teacher, 1.0, reduction), theirs, atol=1e-6)


class TestHardDistillationLoss:
    def test_it_is_the_cross_entropy_with_the_class_the_teacher_would_choose(self) -> None:
        teacher = torch.tensor([[0.1, 0.2, 0.0], [2.0, 0.1, -1.0]])
        loss = hard_distillation_loss(torch.tensor(STUDENT), teacher).item()
        expected = -(math.log(softmax(STUDENT[0])[1]) + math.log(softmax(STUDENT[1])[0])) / 2
        assert loss == pytest.approx(expected, rel=1e-6)


class TestImportanceLoss:
    def test_it_is_the_squared_variation_of_the_summed_softmax_weights(self) -> None:
        logits = [[1.0, 0.0, -1.0, 2.0], [0.5, 0.5, 3.0, 0.0], [-2.0, 1.0, 0.0, 0.3]]
        sums = [sum(softmax(row)[expert] for row in logits) for expert in range(4)]
        assert importance_loss(torch.tensor(logits)).item() == pytest.approx(squared_variation(sums), rel=1e-5)

    def test_it_is_zero_when_the_experts_share_equally(self) -> None:
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert importance_loss(logits).item() == pytest.approx(0.0, abs=1e-12)

    def test_it_is_largest_when_one_expert_has_it_all(self) -> None:
        logits = torch.zeros(6, 4)
        logits[:, 2] = 100.0
        assert importance_loss(logits).item() == pytest.approx(3.0)

    def test_the_number_of_tokens_does_not_matter(self) -> None:
        logits = torch.randn(5, 4)
        assert torch.allclose(importance_loss(logits.repeat(3, 1)), importance_loss(logits))


class TestLoadLoss:
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_it_is_the_squared_variation_of_the_chances_to_be_chosen(self, k: int) -> None:
        noise_std = 0.25
        clean = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
        noisy = clean + noise_std * torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
        loads = [0.0] * 4
        for clean_row, noisy_row in zip(clean.tolist(), noisy.tolist(), strict=True):
            threshold = sorted(noisy_row, reverse=True)[k - 1]
            for expert, value in enumerate(clean_row):
                z = (threshold - value) / noise_std
                loads[expert] += (1 - 0.5 * (1 + math.erf(z / math.sqrt(2)))) / 7
        assert load_loss(clean, noisy, noise_std, k).item() == pytest.approx(squared_variation(loads), rel=1e-4)

    def test_two_experts_by_hand(self) -> None:
        # threshold 0: the first is at it (chance 1/2), the second one standard deviation below (chance 0.1587)
        clean, noisy = torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -3.0]])
        loads = [0.5, 1 - 0.8413447]
        assert load_loss(clean, noisy, 1.0, 1).item() == pytest.approx(squared_variation(loads), rel=1e-5)

    def test_its_gradient_reaches_the_logits(self) -> None:
        clean = torch.randn(7, 4, requires_grad=True)
        load_loss(clean, clean.detach() + 0.1 * torch.randn(7, 4), 0.25, 2).backward()
        assert clean.grad.isfinite().all() and clean.grad.abs().sum() > 0

    @pytest.mark.parametrize("noise_std", [0.0, -1.0])
    def test_without_noise_it_is_refused(self, noise_std: float) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            load_loss(torch.randn(2, 4), torch.randn(2, 4), noise_std, 2)


class TestBoundaryLoss:
    def test_it_is_zero_for_equals_and_one_for_the_mean(self) -> None:
        target = torch.randn(4, 5, 6) * 3 + 2
        assert boundary_loss(target, target) == 0
        mean = target.mean(dim=(0, 1)).expand_as(target)
        torch.testing.assert_close(boundary_loss(mean, target), torch.tensor(1.0))

    def test_logits_are_a_boundary_too_and_the_target_gets_no_gradient(self) -> None:
        states, target = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
        boundary_loss(states, target).backward()
        assert states.grad is not None and target.grad is None

    def test_scale_does_not_matter(self) -> None:
        states, target = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
        torch.testing.assert_close(boundary_loss(7 * states, 7 * target), boundary_loss(states, target))


class TestBoundaryErrors:
    def test_their_mean_is_the_loss(self) -> None:
        states, target = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
        errors = per_sample_boundary_error(states, target)
        assert errors.shape == (4,)
        assert errors.mean().item() == pytest.approx(boundary_loss(states, target).item(), rel=1e-5)
        expected = (states[2] - target[2]).square().mean() / target.flatten(end_dim=1).var(dim=0, correction=0).mean()
        assert errors[2].item() == pytest.approx(expected.item(), rel=1e-5)


class TestPooledTokens:
    def test_as_many_stay_as_they_are_and_one_is_the_class_token(self) -> None:
        states = torch.randn(2, 17, 6)
        assert pool_tokens(states, 17) is states
        assert torch.equal(pool_tokens(states, 1), states[:, :1])

    def test_the_others_are_means_of_consecutive_patches(self) -> None:
        states = torch.randn(2, 17, 6)
        pooled = pool_tokens(states, 5)
        assert torch.equal(pooled[:, 0], states[:, 0])
        for index in range(4):
            expected = states[:, 1 + 4 * index : 5 + 4 * index].mean(dim=1)
            torch.testing.assert_close(pooled[:, 1 + index], expected)
