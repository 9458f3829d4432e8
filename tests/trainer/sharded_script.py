"""What test_sharding.py starts in two processes; each writes what it saw to `rank_<i>.json`."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from alignment_case import alignment_trainer
from numpy.linalg import norm
from safetensors.torch import save_file
from testing_utils import NoiseImages, distillation_trainer, nac, snapshot, teacher
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from m2mkd import M2MKDTrainer
from m2mkd.evaluation.predict import evaluate_model


# torch cannot load the whole state of an optimizer that has none, as SGD without momentum
WHOLE = {"student_depths": None, "teacher_depths": None, "meta": None, "optim": "adamw_torch", "learning_rate": 1e-3}
PAIRS = {"max_grad_norm": 0.5}
FED = {"context": "teacher", "match": "boundary", "feed": "student", "meta": None, "stitch_init": "least_squares"}
# The settings of recipes/accelerate/fsdp2.yaml, and gloo.
SHARDED = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
    "ddp_backend": "gloo",
    "per_device_train_batch_size": 4,
}


def shard_on_cpu() -> None:
    """accelerate's state takes no notice of FSDP on CPUs; from here on it does, in this process."""
    as_given = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        as_given(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def outcome_of(trainer: M2MKDTrainer, start: dict[str, Any]) -> dict[str, Any]:
    logs = [log for log in trainer.state.log_history if "loss" in log]
    frozen = trainer.frozen.state_dict()
    return {
        "losses": [log["loss"] for log in logs],
        "norms": [log["grad_norm"] for log in logs],
        "units": sorted(type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)),
        "whole_weights": [name for name, p in trainer.model.named_parameters() if not isinstance(p, DTensor)],
        "frozen": len(frozen),
        "sharded_frozen": sum(isinstance(tensor, DTensor) for tensor in frozen.values()),
        "changed_frozen": [name for name in frozen if not frozen[name].equal(start[name])],
        "checksum": [parameter.double().sum().item() for parameter in trainer.student.parameters()],
    }


def with_fsdp2(folder: Path) -> None:
    # the reference where random numbers or the loss depend on a process's own images
    ddp = {name: SHARDED[name] for name in ("ddp_backend", "per_device_train_batch_size")}
    references = {
        "kd": distillation_trainer(folder / "ddp_kd", model=nac(), **WHOLE, **ddp),
        "fed": distillation_trainer(folder / "ddp_fed", **FED, **ddp, teacher=teacher()),
    }
    report = {}
    for name, trainer in references.items():
        start = snapshot(trainer.frozen)
        trainer.train()
        report[f"ddp_{name}"] = outcome_of(trainer, start)
        if trainer.args.process_index == 0:
            save_file(snapshot(trainer.stitched), folder / f"ddp_{name}.safetensors")
    shard_on_cpu()
    saving = {"save_strategy": "steps", "save_steps": 2}

    pairs = distillation_trainer(folder / "pairs", **SHARDED, **PAIRS, eval_dataset=NoiseImages(11, seed=3))
    start = snapshot(pairs.frozen)
    pairs.train()
    report |= {"pairs": outcome_of(pairs, start), "evaluation": pairs.evaluate()}
    pairs.save_model(str(folder / "student"))

    whole = distillation_trainer(folder / "kd", model=nac(), **WHOLE, **SHARDED, **saving)
    start = snapshot(whole.frozen)
    whole.train()
    report["kd"] = outcome_of(whole, start)
    whole.save_model(str(folder / "nac"))
    resumed = distillation_trainer(folder / "kd", model=nac(), **WHOLE, **SHARDED)
    resumed.train(resume_from_checkpoint=str(folder / "kd" / "checkpoint-2"))
    report["resumed"] = outcome_of(resumed, start)
    report["accuracy"] = evaluate_model(whole.student, NoiseImages(11, seed=3), 4, use_cpu=True)

    fed = distillation_trainer(folder / "fed", **FED, **SHARDED, teacher=teacher())
    start = snapshot(fed.frozen)
    fed.train()
    report["fed"] = outcome_of(fed, start)

    aligned, meta, _ = alignment_trainer(folder / "meta", lambda found: {"norm": norm(found.predictions)}, **SHARDED)
    aligned.train()
    before = aligned.evaluate(NoiseImages())["eval_norm"]
    for weights in meta.vit.layers.parameters():
        weights.data.zero_()
    # as in the middle of training, the weights of the shards count and not those that came back last
    report["aligned"] = [before, aligned.evaluate(NoiseImages())["eval_norm"]]
    if fed.args.process_index == 0:
        for name, trainer in (("pairs", pairs), ("kd", whole), ("fed", fed)):
            save_file(snapshot(trainer.stitched), folder / f"{name}.safetensors")
    (folder / f"rank_{fed.args.process_index}.json").write_text(json.dumps(report))


def with_deepspeed(stage: int, folder: Path) -> None:
    """The settings of recipes/accelerate/deepspeed_zero<stage>.yaml, with the optimizer of the recipe on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # accelerate's state starts no DeepSpeed on CPUs
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu")
    config = {
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(auto, "auto"),
    }
    settings = {**WHOLE, "deepspeed": config, "use_cpu": False, "per_device_train_batch_size": 4}

    trainer = distillation_trainer(folder, model=nac(), **settings, save_strategy="steps", save_steps=2)
    start = snapshot(trainer.frozen)
    trainer.train()
    report = {"kd": outcome_of(trainer, start), "zero": trainer.model_wrapped.zero_optimization_stage()}
    resumed = distillation_trainer(folder, model=nac(), **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    report["resumed"] = outcome_of(resumed, start)
    (folder / f"rank_{trainer.args.process_index}.json").write_text(json.dumps(report))
