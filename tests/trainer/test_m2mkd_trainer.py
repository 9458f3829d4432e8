import json
import math
import re
from pathlib import Path

import distributed_script
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from testing_utils import (
    STUDENT_DEPTHS,
    TEACHER_DEPTHS,
    NoiseImages,
    assert_close,
    assert_equal,
    changed,
    distillation_trainer,
    images,
    in_two_processes,
    meta_model,
    nac,
    on_meta,
    randomized,
    snapshot,
    teacher,
    vit,
    vmoe,
    vmoe_config,
)
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

from m2mkd import M2MKDTrainer, VMoEForImageClassification, split_into_stages
from m2mkd.distillation.meta_from_teacher import meta_from_teacher
from m2mkd.distillation.pair_folder import load_stage, load_stitches
from m2mkd.distillation.split import initialize_stage
from m2mkd.errors import DataError, NonFiniteError, StageError
from m2mkd.hub.assemble import assemble
from m2mkd.trainer.statistics_trainer import STATISTICS
from m2mkd.trainer.student_trainer import COMPLETE_MARKER


STOCHASTIC = {"drop_path_rate": 0.4, "router_noise_std": 2.0, "hidden_dropout_prob": 0.1}
# A constant added to all keys does not change a softmax: key biases have no gradient but round-off.
NO_GRADIENT = "k_proj.bias"
DEIT = {
    "hidden_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}


def convnext() -> ConvNextForImageClassification:
    return on_meta(lambda: ConvNextForImageClassification(ConvNextConfig()))


def final_weights(trainer: M2MKDTrainer) -> dict[str, torch.Tensor]:
    return snapshot(trainer.model)


def count_forwards(stages) -> list[int]:
    counted = [0] * len(stages)

    def count(index: int) -> None:
        counted[index] += 1

    for index, stage in enumerate(stages):
        stage.register_forward_hook(lambda *_, index=index: count(index))
    return counted


class StopAfter(TrainerCallback):
    """A process that ends after a step, as a killed one does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


class TestPairs:
    def test_all_at_once_and_one_after_the_other_give_the_same_weights(self, tmp_path) -> None:
        # the clipping norm is one that some pairs exceed
        settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim": "adamw_torch"}
        together = vmoe(**STOCHASTIC)
        trainer = distillation_trainer(tmp_path, together, **settings)
        trainer.train()
        expected = final_weights(trainer)
        apart, ours = vmoe(**STOCHASTIC), {}
        for index in (2, 0, 1):
            trainer = distillation_trainer(tmp_path, apart, pairs=[index], **settings)
            trainer.train()
            ours |= final_weights(trainer)
        assert_equal(ours, expected)
        assert_equal(apart.state_dict(), together.state_dict())

    @pytest.mark.parametrize("noise, distinct", [(STOCHASTIC, 8), ({}, 1)], ids=["stochastic", "deterministic"])
    def test_every_batch_draws_its_own_random_numbers(self, tmp_path, noise: dict, distinct: int) -> None:
        trainer = distillation_trainer(tmp_path, vmoe(**noise), gradient_accumulation_steps=2)
        seeds = []
        trainer.model.register_forward_pre_hook(lambda _m, _i, kwargs: seeds.append(kwargs["seed"]), with_kwargs=True)
        trainer.train()
        assert len(seeds) == 8
        assert len(set(seeds)) == distinct

    def test_each_pair_is_clipped_by_its_own_norm(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, max_steps=1, max_grad_norm=0.01, learning_rate=1.0)
        before = {index: snapshot(pair) for index, pair in trainer.trained_pairs().items()}
        trainer.train()
        for index, pair in trainer.trained_pairs().items():
            step = torch.cat([(v - before[index][k]).flatten() for k, v in pair.state_dict().items()])
            assert step.norm().item() == pytest.approx(0.01, rel=1e-3)

    def test_every_trained_parameter_changes_and_nothing_else_does(self, tmp_path) -> None:
        student, teacher_model, meta = vmoe(num_experts_per_tok=4), teacher(), meta_model()
        before = [snapshot(model) for model in (student, teacher_model, meta)]
        trainer = distillation_trainer(tmp_path, student, pairs=[1], teacher=teacher_model, meta=meta)
        stitched = snapshot(trainer.model)
        trainer.train()
        still = set(stitched) - changed(trainer.model, stitched)
        assert {name for name in still if not name.endswith(NO_GRADIENT)} == set()
        own = split_into_stages(student, STUDENT_DEPTHS)[1].state_dict().keys()
        assert changed(student, before[0]) <= own
        assert changed(teacher_model, before[1]) == changed(meta, before[2]) == set()
        assert all(p.grad is None for model in (teacher_model, meta) for p in model.parameters())

    def test_the_meta_model_runs_once_before_all_pairs(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, max_steps=2)
        counted = count_forwards(trainer.frozen.meta)
        trainer.train()
        # prefix: stages 0 and 1 once; suffixes: stage 1 of pair 0, stage 2 of pairs 0 and 1, for teacher and student
        assert counted == [2 * 1, 2 * (1 + 2), 2 * 4]

    def test_the_stages_of_other_pairs_need_no_memory(self, tmp_path) -> None:
        student = on_meta(lambda: VMoEForImageClassification(vmoe_config()))
        stages = split_into_stages(student, STUDENT_DEPTHS)
        initialize_stage(student, stages[1], seed=0)
        # with a teacher of which only the stage in use is there
        source, big = teacher(), on_meta(teacher)
        piece = split_into_stages(big, TEACHER_DEPTHS)[1].to_empty(device="cpu")
        piece.load_state_dict(split_into_stages(source, TEACHER_DEPTHS)[1].state_dict())
        trainer = distillation_trainer(tmp_path, student, pairs=[1], teacher=big)
        before = snapshot(trainer.model)
        trainer.train()
        assert changed(trainer.model, before)
        assert all(p.is_meta for stage in (stages[0], stages[2]) for p in stage.parameters())
        assert not any(p.is_meta for p in stages[1].parameters())
        trainer.save_model(tmp_path / "out")
        assert {path.name for path in (tmp_path / "out" / "pairs").iterdir()} == {"1"}


class TestAccumulation:
    def test_two_images_four_times_are_eight_images_once(self, tmp_path) -> None:
        runs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            trainer = distillation_trainer(
                tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
            )
            losses = trainer.train().training_loss
            runs.append((losses, final_weights(trainer), trainer.state.log_history))
        assert runs[1][0] == pytest.approx(runs[0][0], abs=1e-5)
        assert_close(runs[1][1], runs[0][1], atol=1e-6)
        for ours, expected in zip(runs[1][2], runs[0][2], strict=True):
            for name in expected:
                if name in ("loss", "grad_norm") or name.startswith("pair_"):
                    assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name

    def test_the_last_batches_of_an_epoch_count_by_their_own_number(self, tmp_path) -> None:
        # 12 images: one step of 8, one of 4
        runs = []
        for batch, accumulation in ((8, 1), (4, 2)):
            trainer = distillation_trainer(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                train_dataset=NoiseImages(12),
            )
            trainer.train()
            runs.append(final_weights(trainer))
        assert_close(runs[1], runs[0], atol=1e-6)


class TestWhatIsTrained:
    def test_optimizer_and_checkpoint_hold_no_frozen_tensor(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=4)
        trainer.train()
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert optimized == {id(p) for p in trainer.model.parameters()}
        assert not optimized & {id(p) for p in trainer.frozen.parameters()}
        saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        assert_equal(saved, trainer.model.state_dict())
        assert {name.split(".")[2] for name in saved} == {"stage", "pre", "post"}
        state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == len(optimized)

    def test_frozen_networks_never_leave_evaluation(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, teacher=teacher(hidden_dropout_prob=0.5))
        seen = []
        trainer.frozen.teacher["1"].register_forward_hook(lambda module, *_: seen.append(module.training))
        trainer.train()
        assert seen == [False] * 4


def one_step(tmp_path: Path, **overrides) -> tuple[dict, M2MKDTrainer]:
    """The log of a single step on eight images."""
    trainer = distillation_trainer(
        tmp_path, max_steps=1, per_device_train_batch_size=8, train_dataset=NoiseImages(8), **overrides
    )
    trainer.train()
    return trainer.state.log_history[0], trainer


def by_hand(tmp_path: Path, data: NoiseImages, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of student and teacher of a pair on all images, from the equations."""
    trainer = distillation_trainer(tmp_path)
    meta, cut = split_into_stages(meta_model(), [1, 1, 1]), split_into_stages(teacher(), TEACHER_DEPTHS)
    hidden = data.pixel_values
    for stage in meta[:index]:
        hidden = stage(hidden)
    logits = []
    for first in (lambda x: trainer.trained_pairs()[index].eval()(x)[0], cut[index]):
        output = first(hidden)
        for stage in meta[index + 1 :]:
            output = stage(output)
        logits.append(output.detach())
    return logits[0], logits[1]


class TestLoss:
    @pytest.mark.parametrize("index", [0, 1, 2])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"alpha": 0.3, "temperature": 2.0},
            {"alpha": 1.0},
            {"alpha": 0.3, "kl_reduction": "mean"},
            {"alpha": 0.3, "distillation_type": "hard"},
            {"label_smoothing_factor": 0.2},
        ],
        ids=["default", "soft_tau2", "teacher_alone", "official_reduction", "hard", "label_smoothing"],
    )
    def test_the_loss_of_each_pair_is_that_of_the_paper(self, tmp_path, settings: dict, index: int) -> None:
        log, _ = one_step(tmp_path, **settings)
        data = NoiseImages(8)
        student, teacher_logits = by_hand(tmp_path, data, index)
        alpha, tau = settings.get("alpha", 0.5), settings.get("temperature", 1.0)
        smoothing = settings.get("label_smoothing_factor", 0.0)
        cross_entropy = F.cross_entropy(student, data.labels, label_smoothing=smoothing)
        if settings.get("distillation_type") == "hard":
            distillation = F.cross_entropy(student, teacher_logits.argmax(dim=-1))
        else:
            p, q = (teacher_logits / tau).softmax(dim=-1), (student / tau).softmax(dim=-1)
            distillation = tau**2 * (p * (p / q).log()).sum(dim=-1).mean()
            if settings.get("kl_reduction") == "mean":
                distillation = distillation / student.shape[-1]
        expected = (1 - alpha) * cross_entropy + alpha * distillation
        assert log[f"pair_{index}_loss"] == pytest.approx(expected.item(), rel=1e-4)

    def test_the_logged_loss_is_the_sum_over_the_pairs(self, tmp_path) -> None:
        log, _ = one_step(tmp_path)
        assert log["loss"] == pytest.approx(sum(log[f"pair_{index}_loss"] for index in range(3)), abs=1e-3)

    def test_the_log_tells_the_statistics_of_each_pair(self, tmp_path) -> None:
        log, _ = one_step(tmp_path)
        data = NoiseImages(8)
        student, teacher_logits = by_hand(tmp_path, data, 1)
        assert log["pair_1_accuracy"] == pytest.approx((student.argmax(-1) == data.labels).float().mean().item())
        agreement = (student.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
        assert log["pair_1_agreement"] == pytest.approx(agreement)
        assert log["pair_1_cross_entropy"] == pytest.approx(F.cross_entropy(student, data.labels).item(), rel=1e-4)

    def test_without_weight_the_teacher_is_not_needed(self, tmp_path) -> None:
        log, trainer = one_step(tmp_path, alpha=0.0, teacher=None)
        student, _ = by_hand(tmp_path, NoiseImages(8), 1)
        expected = F.cross_entropy(student, NoiseImages(8).labels).item()
        assert log["pair_1_loss"] == log["pair_1_cross_entropy"] == pytest.approx(expected, rel=1e-4)
        assert "pair_1_kl" not in log and "pair_1_agreement" not in log
        assert len(trainer.frozen.teacher) == 0

    def test_without_weight_a_given_teacher_is_not_run(self, tmp_path) -> None:
        log, trainer = one_step(tmp_path, alpha=0.0)
        assert len(trainer.frozen.teacher) == 0
        assert "pair_1_kl" not in log

    def test_soft_labels_weigh_the_classes(self, tmp_path) -> None:
        data = NoiseImages(8, soft=True)
        trainer = distillation_trainer(
            tmp_path, max_steps=1, per_device_train_batch_size=8, train_dataset=data, eval_dataset=data, alpha=0.0
        )
        student, _ = by_hand(tmp_path, data, 1)
        metrics = trainer.evaluate()
        trainer.train()
        expected = -(data.labels * student.log_softmax(dim=-1)).sum(dim=-1).mean().item()
        assert trainer.state.log_history[-2]["pair_1_loss"] == pytest.approx(expected, rel=1e-4)
        assert metrics["eval_pair_1_cross_entropy"] == pytest.approx(expected, rel=1e-4)
        accuracy = (student.argmax(-1) == data.labels.argmax(-1)).float().mean().item()
        assert metrics["eval_pair_1_accuracy"] == pytest.approx(accuracy)

    def test_the_balance_loss_of_a_pair_is_added_to_its_loss(self, tmp_path) -> None:
        student = vmoe(router_importance_loss_coef=0.7)
        log, _ = one_step(tmp_path, model=student, alpha=0.0, teacher=None)
        for index in (1, 2):
            total = log[f"pair_{index}_cross_entropy"] + 0.7 * log[f"pair_{index}_importance_loss"]
            assert log[f"pair_{index}_loss"] == pytest.approx(total, rel=1e-4)
            assert log[f"pair_{index}_importance_loss"] > 0
        assert "pair_0_importance_loss" not in log

    def test_the_teacher_of_a_pair_that_is_not_trained_is_not_kept(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, pairs=[1])
        assert list(trainer.frozen.teacher) == ["1"]


class TestWholeStudent:
    def test_one_stage_is_a_step_of_ordinary_distillation(self, tmp_path) -> None:
        data, student, reference, teacher_model = NoiseImages(8), vmoe(), vmoe(), vit(seed=5, num_hidden_layers=2)
        trainer = distillation_trainer(
            tmp_path,
            student,
            student_depths=None,
            teacher_depths=None,
            teacher=teacher_model,
            meta=None,
            max_steps=1,
            per_device_train_batch_size=8,
            train_dataset=data,
            max_grad_norm=0.0,
            temperature=2.0,
            alpha=0.3,
            learning_rate=0.1,
        )
        trainer.train()
        logits = reference(data.pixel_values).logits
        with torch.no_grad():
            target = (teacher_model(data.pixel_values).logits / 2).softmax(dim=-1)
        kl = F.kl_div((logits / 2).log_softmax(dim=-1), target, reduction="batchmean") * 4
        (0.7 * F.cross_entropy(logits, data.labels) + 0.3 * kl).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
        assert_close(student.state_dict(), reference.state_dict(), atol=1e-6)
        log = trainer.state.log_history[0]
        assert "accuracy" in log and not any(name.startswith("pair_") for name in log)

    def test_it_is_saved_as_an_ordinary_folder(self, tmp_path) -> None:
        student = vmoe()
        trainer = distillation_trainer(
            tmp_path, student, student_depths=None, teacher_depths=None, alpha=0.0, teacher=None, meta=None,
            processing_class=ViTImageProcessor(),
        )  # fmt: skip
        trainer.save_model(tmp_path / "out")
        assert not (tmp_path / "out" / "pairs").exists()
        assert (tmp_path / "out" / "preprocessor_config.json").is_file()
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert_equal(loaded.state_dict(), student.state_dict())

    def test_its_teacher_may_be_of_another_width(self, tmp_path) -> None:
        trainer = distillation_trainer(
            tmp_path, student_depths=None, teacher_depths=None, meta=None, teacher=vit(hidden_size=20)
        )
        trainer.train()
        assert not trainer.trained_pairs()[0].stitch_state_dict()


class TestDeiT:
    """A DeiT with two heads as teacher, of whose distillation token the student has none."""

    @staticmethod
    def networks() -> dict:
        config = DeiTConfig(**DEIT)
        teacher = randomized(DeiTForImageClassificationWithTeacher(config), seed=2)
        return {"teacher": teacher, "meta": meta_from_teacher(teacher, TEACHER_DEPTHS, [1, 1, 1])}

    def test_the_loss_falls_and_pairs_apart_are_pairs_together(self, tmp_path) -> None:
        settings = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 5e-3}
        together = vmoe()
        trainer = distillation_trainer(tmp_path, together, **settings, **self.networks())
        trainer.train()
        for index in range(3):
            losses = [log[f"pair_{index}_loss"] for log in trainer.state.log_history if "loss" in log]
            assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
        expected, apart, ours = final_weights(trainer), vmoe(), {}
        for index in range(3):
            trainer = distillation_trainer(tmp_path, apart, pairs=[index], **settings, **self.networks())
            trainer.train()
            ours |= final_weights(trainer)
            trainer.save_model(str(tmp_path))
        assert_equal(ours, expected)
        assemble(tmp_path / "student", [str(tmp_path / "pairs")])
        assembled = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
        assert_equal(assembled.state_dict(), together.state_dict())

    def test_a_nac_can_learn_from_it_too(self, tmp_path) -> None:
        networks = self.networks()
        networks["meta"] = meta_from_teacher(networks["teacher"], [1, 1, 1, 2], [1, 1, 1, 1])
        settings = {"student_depths": [1] * 4, "teacher_depths": [1, 1, 1, 2], "max_steps": 1}
        trainer = distillation_trainer(tmp_path, nac(), **settings, **networks)
        trainer.train()
        assert trainer.state.global_step == 1


CONTEXTS = [
    {"context": context, "match": match, "feed": feed}
    for context in ("meta", "teacher")
    for match in ("logits", "boundary")
    for feed in ("teacher", "student")
]


def in_context(tmp_path, model=None, **settings) -> M2MKDTrainer:
    networks = {"meta": None} if settings.get("context") == "teacher" else {}
    return distillation_trainer(tmp_path, model, **networks, **settings)


class TestContexts:
    """The cheaper members of the family: the teacher as context, boundaries as targets, the student's own prefix."""

    STUDENTS = {
        "vmoe": lambda: vmoe(**STOCHASTIC),
        "vit": lambda: vit(seed=4, num_hidden_layers=4),
        "nac": nac,
        "deit": lambda: randomized(DeiTForImageClassification(DeiTConfig(**{**DEIT, "num_hidden_layers": 4})), seed=4),
        "dinov2": lambda: randomized(
            Dinov2ForImageClassification(
                Dinov2Config(**{**DEIT, "num_hidden_layers": 4, "mlp_ratio": 2, "hidden_size": 8})
            ),
            seed=4,
        ),
    }

    @pytest.mark.parametrize(
        ("name", "settings"),
        [("vmoe", settings) for settings in CONTEXTS]
        + [(name, settings) for name in STUDENTS if name != "vmoe" for settings in CONTEXTS[6:]],
        ids=lambda given: given if isinstance(given, str) else "-".join(given.values()),
    )
    def test_pairs_apart_are_pairs_together(self, tmp_path, name: str, settings: dict) -> None:
        settings |= {"optim": "adamw_torch", "max_steps": 3, "max_grad_norm": 0.5, "read_in_latents": "all"}
        together = in_context(tmp_path, self.STUDENTS[name](), **settings)
        together.train()
        expected, ours = final_weights(together), {}
        chosen = ([2], [0], [1]) if settings["feed"] == "teacher" else ([0], [0, 1])
        for pairs in chosen:
            apart = in_context(tmp_path, self.STUDENTS[name](), pairs=pairs, **settings)
            apart.train()
            ours |= final_weights(apart)
        assert_equal(ours, {name: expected[name] for name in ours})
        assert len(ours) == len(expected) or settings["feed"] == "student"

    @pytest.mark.parametrize("feed", ["teacher", "student"])
    def test_the_loss_compares_the_boundaries_of_the_teacher(self, tmp_path, feed: str) -> None:
        settings = {"context": "teacher", "match": "boundary", "feed": feed, "alpha": 1.0, "max_steps": 1}
        student, data = vmoe(), NoiseImages(8)
        trainer = in_context(tmp_path, student, per_device_train_batch_size=8, train_dataset=data, **settings)
        stages, theirs = split_into_stages(student, STUDENT_DEPTHS), split_into_stages(teacher(), TEACHER_DEPTHS)
        hidden = own = torch.stack([data[index]["pixel_values"] for index in range(8)])
        expected = []
        with torch.no_grad():
            for index, pair in trainer.trained_pairs().items():
                target = theirs[index](hidden)
                own = stages[index](own if feed == "student" else pair.pre(hidden))
                output = pair.post(own)
                if index < 2:
                    spread = (target - target.mean(dim=(0, 1))).square().mean()
                    expected.append(((output - target).square().mean() / spread).item())
                else:
                    kl = F.kl_div(output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none")
                    expected.append(kl.sum(dim=-1).mean().item())
                hidden = target
        trainer.train()
        log = trainer.state.log_history[0]
        assert [log[f"pair_{index}_loss"] for index in range(3)] == pytest.approx(expected, rel=1e-4)
        assert log["pair_1_boundary_error"] == pytest.approx(expected[1], rel=1e-4)
        assert log["pair_2_kl"] == pytest.approx(expected[2], rel=1e-4)
        assert "pair_1_kl" not in log and "pair_2_boundary_error" not in log

    def test_one_pass_through_the_teacher_serves_all_pairs(self, tmp_path) -> None:
        trainer = in_context(tmp_path, context="teacher", match="boundary", max_steps=1)
        counted = count_forwards(trainer.frozen.meta)
        trainer.train()
        assert counted == [1, 1, 1]

    def test_a_single_pair_keeps_the_teacher_up_to_its_stage_only(self, tmp_path) -> None:
        trainer = in_context(tmp_path, context="teacher", match="boundary", pairs=[0])
        assert len(trainer.frozen.meta) == 1
        assert len(in_context(tmp_path, context="teacher", match="logits", pairs=[0]).frozen.meta) == 3

    def test_fed_by_itself_the_stages_are_the_student(self, tmp_path) -> None:
        student = vmoe()
        trainer = in_context(tmp_path, student, context="teacher", match="boundary", feed="student")
        assert not any(
            name.startswith("pre") for pair in trainer.trained_pairs().values() for name in pair.stitch_state_dict()
        )
        trainer.train()
        student.eval()
        trainer.model.eval()
        outputs = trainer.model({0: images()})
        assert torch.equal(outputs["2"][0], student(images()).logits)

    def test_no_gradient_passes_between_the_stages(self, tmp_path) -> None:
        trainer = in_context(tmp_path, vmoe(), context="teacher", match="boundary", feed="student")
        last = trainer.model({0: images()})["2"][0]
        last.sum().backward()
        touched = {name.split(".")[1] for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert touched == {"2"}

    def test_labels_are_not_needed_without_weight_on_them(self, tmp_path) -> None:
        trainer = in_context(tmp_path, context="teacher", match="boundary", alpha=1.0)
        assert torch.isfinite(trainer.compute_loss(trainer.model, {"pixel_values": images()}))
        whole = {"student_depths": None, "teacher_depths": None, "meta": None}
        kd = distillation_trainer(tmp_path, alpha=1.0, **whole)
        assert torch.isfinite(kd.compute_loss(kd.model, {"pixel_values": images()}))

    def test_the_metrics_of_boundary_matching_get_the_logits_of_the_last_pair(self, tmp_path) -> None:
        seen = []
        trainer = in_context(
            tmp_path,
            context="teacher",
            match="boundary",
            eval_dataset=NoiseImages(6),
            compute_metrics=lambda found: seen.append(found.predictions) or {},
        )
        metrics = trainer.evaluate()
        assert seen[0].shape == (6, 5)
        assert {"eval_pair_0_boundary_error", "eval_pair_2_accuracy"} <= metrics.keys()

    def test_least_squares_stitches_start_closer_and_are_kept_on_resume(self, tmp_path) -> None:
        settings = {
            "context": "teacher",
            "match": "boundary",
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        losses = {}
        for start in ("random", "least_squares"):
            trainer = in_context(tmp_path / start, stitch_init=start, **settings)
            trainer.train()
            losses[start] = [trainer.state.log_history[0][f"pair_{index}_loss"] for index in range(2)]
        assert all(fitted < drawn for fitted, drawn in zip(losses["least_squares"], losses["random"], strict=True))
        again = in_context(tmp_path / "least_squares", stitch_init="least_squares", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "least_squares" / "checkpoint-1"))
        assert_equal(final_weights(again), final_weights(trainer))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"context": "teacher"}, "a meta model is given as well"),
            ({"context": "teacher", "meta": None, "teacher": None, "alpha": 0.0}, "need a teacher, but there is none"),
            ({"match": "boundary", "teacher": None, "alpha": 0.0}, "need a teacher, but there is none"),
            ({"stitch_init": "least_squares", "alpha": 0.0}, "`alpha` is 0, so there is no teacher"),
        ],
        ids=["meta_too", "no_teacher", "no_target", "nothing_to_fit"],
    )
    def test_what_does_not_go_together_is_refused(self, tmp_path, settings: dict, message: str) -> None:
        with pytest.raises(StageError, match=message):
            distillation_trainer(tmp_path, **settings)

    def test_the_boundaries_of_a_nac_are_not_matched(self, tmp_path) -> None:
        with pytest.raises(StageError, match="a NACForImageClassification, are not tokens of an image"):
            in_context(tmp_path, context="teacher", match="boundary", teacher=nac(), teacher_depths=[1, 2, 1])


class TestIncubation:
    def test_a_student_of_the_meta_models_width_needs_no_stitch(self, tmp_path) -> None:
        student = vit(seed=6, num_hidden_layers=4)
        trainer = distillation_trainer(tmp_path, student, stitch="none", alpha=0.0, teacher=None)
        before = snapshot(student)
        trainer.train()
        still = set(before) - changed(student, before)
        assert {name for name in still if not name.endswith(NO_GRADIENT)} == set()
        assert set(trainer.model.state_dict()) == {
            f"pairs.{stage.index}.stage.{name}"
            for stage in split_into_stages(student, STUDENT_DEPTHS)
            for name in stage.state_dict()
        }


class TestEvaluate:
    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_it_is_exact_over_the_whole_set_with_a_last_batch_of_three(self, tmp_path, index: int) -> None:
        data = NoiseImages(11, seed=3)
        metrics = distillation_trainer(tmp_path, eval_dataset=data, temperature=2.0).evaluate()
        student, teacher_logits = by_hand(tmp_path, data, index)
        p, q = (teacher_logits / 2).softmax(dim=-1), (student / 2).softmax(dim=-1)
        expected = {
            "cross_entropy": F.cross_entropy(student, data.labels).item(),
            "accuracy": (student.argmax(-1) == data.labels).float().mean().item(),
            "kl": 4 * (p * (p / q).log()).sum(dim=-1).mean().item(),
            "agreement": (student.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item(),
        }
        assert set(expected) == set(STATISTICS) - {"boundary_error"}
        for name, value in expected.items():
            assert metrics[f"eval_pair_{index}_{name}"] == pytest.approx(value, rel=1e-4), name

    def test_its_loss_is_the_mean_over_the_images(self, tmp_path) -> None:
        metrics = distillation_trainer(tmp_path, eval_dataset=NoiseImages(11, seed=3)).evaluate()
        total = sum(
            0.5 * metrics[f"eval_pair_{index}_cross_entropy"] + 0.5 * metrics[f"eval_pair_{index}_kl"]
            for index in range(3)
        )
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-4)

    def test_it_draws_no_noise_and_can_run_while_training(self, tmp_path) -> None:
        trainer = distillation_trainer(
            tmp_path, vmoe(**STOCHASTIC), eval_dataset=NoiseImages(5), eval_strategy="steps", eval_steps=2
        )
        trainer.train()
        logged = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert len(logged) == 2
        again = trainer.evaluate()
        for name in again:
            if name.startswith("eval_pair_"):
                assert again[name] == logged[-1][name]

    def test_what_needs_a_teacher_is_left_out_without_one(self, tmp_path) -> None:
        metrics = distillation_trainer(tmp_path, eval_dataset=NoiseImages(5), alpha=0.0, teacher=None).evaluate()
        assert "eval_pair_0_accuracy" in metrics
        assert not any("kl" in name or "agreement" in name for name in metrics)

    def test_metrics_of_its_own_are_given_the_logits_of_each_pair(self, tmp_path) -> None:
        data, seen = NoiseImages(11, seed=3), []

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            seen.append(found)
            return {"mine": 0.5}

        own = {"eval_dataset": data, "compute_metrics": compute_metrics}
        metrics = distillation_trainer(tmp_path, pairs=[0, 2], **own).evaluate()
        assert metrics["eval_mine"] == 0.5 and "eval_pair_2_accuracy" in metrics
        np.testing.assert_array_equal(seen[0].label_ids, data.labels.numpy())
        for place, index in enumerate((0, 2)):
            expected, _ = by_hand(tmp_path, data, index)
            np.testing.assert_allclose(seen[0].predictions[:, place], expected.numpy(), atol=1e-4)

    def test_metrics_of_its_own_are_given_the_logits_of_a_whole_student(self, tmp_path) -> None:
        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            return {"top": float((found.predictions.argmax(axis=-1) == found.label_ids).mean())}

        whole = {"student_depths": None, "teacher_depths": None, "meta": None}
        own = {"eval_dataset": NoiseImages(11, seed=3), "compute_metrics": compute_metrics}
        metrics = distillation_trainer(tmp_path, **whole, **own).evaluate()
        assert metrics["eval_top"] == pytest.approx(metrics["eval_accuracy"])


class TestResume:
    @pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
    def test_from_the_middle_of_an_epoch_it_ends_with_the_same_weights(self, tmp_path, optimizer: str) -> None:
        # 16 images in 4 steps an epoch; the checkpoint is in the second epoch
        settings = {
            "optim": optimizer,
            "max_steps": 9,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
            "save_strategy": "steps",
            "save_steps": 6,
        }
        whole = distillation_trainer(tmp_path / "whole", vmoe(**STOCHASTIC), **settings)
        whole.train()
        stopped = distillation_trainer(tmp_path / "cut", vmoe(**STOCHASTIC), callbacks=[StopAfter(6)], **settings)
        stopped.train()
        assert (tmp_path / "cut" / "checkpoint-6" / COMPLETE_MARKER).is_file()
        resumed = distillation_trainer(tmp_path / "cut", vmoe(seed=9, **STOCHASTIC), **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 9
        assert_equal(final_weights(resumed), final_weights(whole))
        assert_equal(resumed.student.state_dict(), whole.student.state_dict())


class BadImage(NoiseImages):
    """One image of the set is not a number."""

    def __init__(self, count: int = 16, bad: int = 9):
        super().__init__(count)
        self.pixel_values[bad] = math.nan


def checkpoint_of(error: NonFiniteError) -> Path:
    return Path(re.search(r"The last good state is (\S+)\.", str(error)).group(1))


class TestNonFiniteError:
    def test_a_bad_image_stops_with_step_pair_and_learning_rate_and_leaves_a_checkpoint(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, train_dataset=BadImage(), learning_rate=0.0123)
        with pytest.raises(NonFiniteError) as error:
            trainer.train()
        step = trainer.state.global_step
        assert f"The loss of pair 0, 1, 2 is not finite at step {step}, learning rate 0.0123." in str(error.value)
        assert "Lower `learning_rate`" in str(error.value)
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        folder = checkpoint_of(error.value)
        assert folder == tmp_path / f"checkpoint-{step}"
        assert (folder / COMPLETE_MARKER).is_file()
        assert_equal(load_file(folder / "model.safetensors"), trainer.model.state_dict())

    def test_training_goes_on_from_its_checkpoint_with_good_data(self, tmp_path) -> None:
        bad = distillation_trainer(tmp_path / "bad", train_dataset=BadImage(), optim="adamw_torch")
        with pytest.raises(NonFiniteError) as error:
            bad.train()
        good = BadImage()
        good.pixel_values = NoiseImages().pixel_values
        resumed = distillation_trainer(tmp_path / "bad", vmoe(seed=9), train_dataset=good, optim="adamw_torch")
        resumed.train(resume_from_checkpoint=str(checkpoint_of(error.value)))
        whole = distillation_trainer(tmp_path / "good", train_dataset=good, optim="adamw_torch")
        whole.train()
        assert_equal(final_weights(resumed), final_weights(whole))

    def test_only_the_pairs_that_are_not_finite_are_named(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path)
        trainer.trained_pairs()[1].post.register_forward_hook(lambda _m, _i, output: output * math.inf)
        with pytest.raises(NonFiniteError, match="The loss of pair 1 is not finite at step 0"):
            trainer.train()

    def test_a_student_in_one_piece_is_no_pair(self, tmp_path) -> None:
        trainer = distillation_trainer(
            tmp_path, student_depths=None, teacher_depths=None, alpha=0.0, teacher=None, meta=None
        )
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
        with pytest.raises(NonFiniteError, match="The gradient norm is not finite at step 0"):
            trainer.train()

    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not_clipped"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_stops_before_the_update(self, tmp_path, value, max_grad_norm) -> None:
        trainer = distillation_trainer(tmp_path, max_grad_norm=max_grad_norm)
        parameter = trainer.trained_pairs()[1].pre.linear.weight
        parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
        before = final_weights(trainer)
        with pytest.raises(NonFiniteError, match="The gradient norm is not finite at step 0"):
            trainer.train()
        assert_equal(final_weights(trainer), before)
        assert_equal(load_file(tmp_path / "checkpoint-0" / "model.safetensors"), before)

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path)
        with torch.no_grad():
            trainer.trained_pairs()[1].pre.linear.weight[0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="not finite either, so they were not saved"):
            trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))


class TestPrecisionAndMemory:
    def test_under_bf16_the_frozen_networks_are_bf16_and_the_student_float32(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, bf16=True, eval_dataset=NoiseImages(5))
        before = final_weights(trainer)
        assert {p.dtype for p in trainer.frozen.parameters()} == {torch.bfloat16}
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        still = set(before) - changed(trainer.model, before)
        assert not any(name.startswith(("pairs.0.post", "pairs.1.pre", "pairs.2.pre")) for name in still)
        exact = distillation_trainer(tmp_path)
        exact.train()
        ours, expected = trainer.state.log_history[0]["loss"], exact.state.log_history[0]["loss"]
        assert ours == pytest.approx(expected, rel=0.05)
        assert math.isfinite(trainer.evaluate()["eval_pair_1_kl"])

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    @pytest.mark.filterwarnings("error:.*only defines:FutureWarning")
    @pytest.mark.parametrize(
        "argument",
        [
            "gradient_checkpointing",
            pytest.param(
                "activation_checkpointing",
                marks=pytest.mark.skipif(
                    Version(transformers.__version__) < Version("5.23"),
                    reason="the Trainer knows only the old name",
                ),
            ),
        ],
    )
    def test_recomputing_activations_gives_the_same_weights(self, tmp_path, argument: str) -> None:
        runs = []
        for switched_on in (False, True):
            student = vmoe(**STOCHASTIC)
            calls = []
            student.vmoe.layers[2].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            trainer = distillation_trainer(tmp_path, student, **{argument: switched_on})
            trainer.train()
            assert len(calls) == 4 * (2 if switched_on else 1)
            runs.append(final_weights(trainer))
        assert_close(runs[1], runs[0], atol=1e-6)

    @pytest.mark.slow
    def test_compiled_it_gives_the_same_weights(self, tmp_path) -> None:
        runs = []
        for switched_on in (False, True):
            trainer = distillation_trainer(tmp_path, pairs=[1], torch_compile=switched_on, max_steps=2)
            trainer.train()
            runs.append(snapshot(trainer.trained_pairs()[1]))
        assert_close(runs[1], runs[0], atol=1e-5)


class TestSaveModel:
    def test_all_pairs_give_the_student_and_a_folder_a_pair(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, processing_class=ViTImageProcessor())
        trainer.train()
        trainer.save_model(tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "config.json",
            "model.safetensors",
            "pairs",
            "preprocessor_config.json",
        ]
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(images()).logits, trainer.student.eval()(images()).logits)
        assert sorted(path.name for path in (tmp_path / "out" / "pairs").iterdir()) == ["0", "1", "2"]
        fresh = vmoe(seed=9)
        for stage in split_into_stages(fresh, STUDENT_DEPTHS):
            load_stage(stage, tmp_path / "out" / "pairs" / str(stage.index))
        assert_equal(fresh.state_dict(), trainer.student.state_dict())
        other = distillation_trainer(tmp_path, seed=5).trained_pairs()
        for index, pair in trainer.trained_pairs().items():
            load_stitches(other[index], tmp_path / "out" / "pairs" / str(index))
            assert_equal(other[index].stitch_state_dict(), pair.stitch_state_dict())
        assert json.loads((tmp_path / "out" / "pairs" / "1" / "pair.json").read_text())["stitch_size"] == 12

    def test_some_pairs_give_their_folders_alone(self, tmp_path) -> None:
        trainer = distillation_trainer(tmp_path, pairs=[0, 2])
        trainer.save_model()
        assert [path.name for path in tmp_path.iterdir()] == ["pairs"]
        assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["0", "2"]


class TestRefusals:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"teacher": None}, "`alpha` is 0.5, but there is no teacher"),
            ({"meta": None}, r"\[1, 2, 1\] makes 3 pairs, but there is no meta model"),
            ({"student_depths": [1, 1, 1]}, r"add up to 3 layers, but VMoEForImageClassification has 4"),
            ({"teacher_depths": [1, 1, 1]}, r"add up to 3 layers, but ViTForImageClassification has 5"),
            ({"meta_depths": [2, 1, 1]}, r"add up to 4 layers, but ViTForImageClassification has 3"),
            ({"stitch": "none"}, "`stitch` is 'none', but the student is 16 wide and the meta model 12"),
            ({"teacher": vit(num_hidden_layers=5, hidden_size=14)}, "teacher is 14 wide and the meta model 12"),
            ({"teacher": vit(num_hidden_layers=5, num_labels=3)}, "student has 5 classes and the teacher 3"),
            ({"meta": vit(patch_size=2)}, "student has 4 patches .* the meta model 16"),
        ],
        ids=[
            "teacher",
            "meta",
            "student_depths",
            "teacher_depths",
            "meta_depths",
            "stitch",
            "width",
            "classes",
            "patches",
        ],
    )
    def test_networks_that_do_not_fit_are_refused_before_training(self, tmp_path, overrides, message: str) -> None:
        with pytest.raises(StageError, match=message):
            distillation_trainer(tmp_path, **overrides)

    @pytest.mark.parametrize("role", ["model", "teacher", "meta"])
    def test_classifiers_without_stages_are_named(self, tmp_path, role: str) -> None:
        with pytest.raises(StageError, match=r"ConvNextForImageClassification cannot be cut into stages\. These can"):
            distillation_trainer(tmp_path, **{role: convnext()})

    def test_plain_training_arguments_are_refused(self, tmp_path) -> None:
        with pytest.raises(TypeError, match="of type TrainingArguments, but this trainer needs an `M2MKDConfig`"):
            M2MKDTrainer(vmoe(), TrainingArguments(str(tmp_path), use_cpu=True), teacher=teacher())

    @pytest.mark.parametrize("lost", ["pixel_values", "labels"])
    def test_batches_without_images_or_labels_are_refused(self, tmp_path, lost: str) -> None:
        items = [{name: value for name, value in item.items() if name != lost} for item in list(NoiseImages(4))]
        items = [{**item, "weight": torch.ones(1)} for item in items]
        with pytest.raises(DataError, match=f"but not {lost}. Each item of the data set must have `pixel_values`"):
            distillation_trainer(tmp_path, train_dataset=items).train()
        with pytest.raises(DataError, match=f"but not {lost}"):
            distillation_trainer(tmp_path, eval_dataset=items).evaluate()


class TestDistributed:
    @pytest.fixture(scope="class")
    @staticmethod
    def outcome(tmp_path_factory) -> dict:
        """What two processes report; see distributed_script.py."""
        folder = tmp_path_factory.mktemp("distributed")
        return {"folder": folder, "ranks": in_two_processes(distributed_script.main, folder)}

    def test_two_processes_are_one_with_twice_the_batch(self, outcome, tmp_path) -> None:
        # the script trains on the same images in the same order
        single = distillation_trainer(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.5)
        single.train()
        assert_close(load_file(outcome["folder"] / "weights.safetensors"), final_weights(single), atol=1e-5)
        expected = [log["loss"] for log in single.state.log_history if "loss" in log]
        assert outcome["ranks"][0]["losses"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        pairs = [log["pair_1_loss"] for log in single.state.log_history if "loss" in log]
        assert outcome["ranks"][0]["pair_losses"] == pytest.approx(pairs, rel=1e-4)

    def test_both_processes_hold_the_same_weights(self, outcome) -> None:
        assert outcome["ranks"][0]["checksum"] == outcome["ranks"][1]["checksum"]

    def test_the_gradient_buckets_hold_what_is_trained_alone(self, outcome) -> None:
        for rank in outcome["ranks"]:
            assert rank["is_ddp"]
            assert rank["ddp_parameters"] == rank["trained_parameters"]
            assert rank["frozen_in_ddp"] == 0

    def test_evaluation_is_exact_although_the_set_does_not_divide(self, outcome, tmp_path) -> None:
        single = distillation_trainer(tmp_path, eval_dataset=NoiseImages(11, seed=3)).evaluate()
        for rank in outcome["ranks"]:
            for name, value in single.items():
                # `eval_loss` is the Trainer's: on several processes it counts the images that fill the last batch
                if name.startswith("eval_pair_"):
                    assert rank["evaluation"][name] == pytest.approx(value, rel=1e-4), name

    def test_all_processes_stop_when_one_sees_a_loss_that_is_not_finite(self, outcome) -> None:
        assert [rank["bad_image_here"] for rank in outcome["ranks"]] == [True, False]
        for rank in outcome["ranks"]:
            assert "The loss of pair 0, 1, 2 is not finite at step 1" in rank["error"]
        assert (outcome["folder"] / "bad" / "checkpoint-1" / COMPLETE_MARKER).is_file()
