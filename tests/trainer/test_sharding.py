from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sharded_script
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file
from sharded_script import PAIRS, WHOLE
from testing_utils import NoiseImages, assert_close, assert_equal, distillation_trainer, in_two_processes
from transformers import AutoModelForImageClassification

from m2mkd import M2MKDTrainer
from m2mkd.distillation.pair_folder import load_stage
from m2mkd.distillation.split import split_into_stages
from m2mkd.errors import StageError
from m2mkd.evaluation.predict import evaluate_model
from m2mkd.trainer.sharding import check_sharding


TEST_SET = NoiseImages(11, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes report; see sharded_script.py."""
    return in_two_processes(sharded_script.with_fsdp2, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> M2MKDTrainer:
    """The pairs, trained in one process with twice the batch."""
    trainer = distillation_trainer(folder / "a", per_device_train_batch_size=8, **PAIRS, eval_dataset=TEST_SET)
    trainer.train()
    return trainer


class TestCheckSharding:
    @pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
    def test_shards_are_refused_on_a_cpu(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = distillation_trainer(tmp_path)
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(StageError, match=f"{name} was asked for, .* not on cpu. Use DDP"):
            check_sharding(trainer)

    def test_what_mixes_pairs_is_refused(self) -> None:
        fsdp1 = Mock(is_fsdp_enabled=True, is_deepspeed_enabled=False, accelerator=Mock(is_fsdp2=False))
        with pytest.raises(StageError, match="FSDP is of version 1"):
            check_sharding(fsdp1)
        args = Mock(pair_indices=[0, 2], max_grad_norm=1.0)
        with pytest.raises(StageError, match=r"the pairs \[0, 2\] by one common norm"):
            check_sharding(Mock(is_fsdp_enabled=False, is_deepspeed_enabled=True, args=args))


@pytest.mark.slow
class TestFSDP2:
    def test_losses_norms_and_weights_are_those_of_one_process(self, ranks, alone, folder: Path) -> None:
        logs = [log for log in alone.state.log_history if "loss" in log]
        for rank in ranks:
            assert rank["pairs"]["losses"] == pytest.approx([log["loss"] for log in logs], rel=1e-4)
            assert rank["pairs"]["norms"] == pytest.approx([log["grad_norm"] for log in logs], rel=1e-3)
        assert_close(load_file(folder / "pairs.safetensors"), alone.stitched.state_dict(), atol=1e-5)

    @pytest.mark.parametrize("name", ["kd", "fed"])
    def test_losses_and_weights_are_those_of_ddp(self, name: str, ranks, folder: Path) -> None:
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(rank[f"ddp_{name}"]["losses"], rel=1e-4)
        # AdamW makes steps of the size of the learning rate out of gradients that are round-off
        atol = WHOLE["learning_rate"] * 4 if name == "kd" else 1e-5
        assert_close(load_file(folder / f"{name}.safetensors"), load_file(folder / f"ddp_{name}.safetensors"), atol)

    def test_every_layer_with_its_experts_is_a_shard_of_its_own(self, ranks) -> None:
        for rank in ranks:
            assert rank["pairs"]["units"].count("FSDPVMoELayer") == 4
            # a stage calls the parts of the other layers itself, which are shards of the whole
            assert {"FSDPNACReadIn", "FSDPNACImageTokenizer"} <= set(rank["kd"]["units"])
            assert rank["pairs"]["whole_weights"] == rank["kd"]["whole_weights"] == []

    @pytest.mark.parametrize("name", ["pairs", "kd", "fed"])
    def test_the_frozen_networks_are_whole_and_never_trained(self, name: str, ranks) -> None:
        for rank in ranks:
            assert rank[name]["frozen"] > 0
            assert rank[name]["sharded_frozen"] == 0
            assert rank[name]["changed_frozen"] == []

    def test_a_checkpoint_has_the_trained_weights_alone_and_training_goes_on_from_it(
        self, ranks, folder: Path
    ) -> None:
        saved = load_file(folder / "kd" / "checkpoint-4" / "model.safetensors")
        assert_equal(saved, load_file(folder / "kd.safetensors"))
        for rank in ranks:
            assert rank["resumed"]["losses"] == ranks[0]["kd"]["losses"]
            assert rank["resumed"]["checksum"] == rank["kd"]["checksum"] == ranks[0]["kd"]["checksum"]

    def test_what_is_saved_loads_like_any_model(self, ranks, alone, folder: Path) -> None:
        student = AutoModelForImageClassification.from_pretrained(folder / "student")
        assert_close(student.state_dict(), alone.student.state_dict(), atol=1e-5)
        stages = split_into_stages(AutoModelForImageClassification.from_config(student.config), [1, 2, 1])
        assert load_stage(stages[1], folder / "student" / "pairs" / "1") == []
        accuracy = evaluate_model(
            AutoModelForImageClassification.from_pretrained(folder / "nac"), TEST_SET, 4, use_cpu=True
        )
        for rank in ranks:
            assert rank["accuracy"] == pytest.approx(accuracy, rel=1e-5)

    def test_the_meta_model_is_evaluated_with_the_weights_of_the_shards(self, ranks) -> None:
        before, after = ranks[0]["aligned"]
        assert before == after > 0

    def test_evaluation_is_exact(self, ranks, alone) -> None:
        expected = alone.evaluate()
        for name in ("eval_pair_0_kl", "eval_pair_1_cross_entropy", "eval_pair_2_accuracy"):
            for rank in ranks:
                assert rank["evaluation"][name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not is_deepspeed_available(), reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_resumes_as_ddp(stage: int, ranks, folder: Path, tmp_path: Path) -> None:
    for rank in in_two_processes(partial(sharded_script.with_deepspeed, stage), tmp_path):
        assert rank["zero"] == stage
        for own in (rank["kd"], rank["resumed"]):
            assert own["losses"] == pytest.approx(ranks[0]["ddp_kd"]["losses"], rel=1e-4)
            assert own["norms"] == pytest.approx(ranks[0]["ddp_kd"]["norms"], rel=1e-4)
            assert own["checksum"] == pytest.approx(ranks[0]["ddp_kd"]["checksum"], abs=1e-3)
            assert own["changed_frozen"] == []
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_close(saved, load_file(folder / "ddp_kd.safetensors"), atol=1e-5)
