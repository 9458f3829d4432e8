"""What test_m2mkd_trainer.py starts in two processes; each writes what it saw to `rank_<i>.json`."""

import json
import math
from pathlib import Path

from safetensors.torch import save_file
from testing_utils import NoiseImages, distillation_trainer, snapshot
from torch.nn.parallel import DistributedDataParallel

from m2mkd import M2MKDTrainer
from m2mkd.errors import NonFiniteError


class BadOnOneProcess(M2MKDTrainer):
    """The first process gets an image that is no number in the second step."""

    saw_it = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.args.process_index == 0 and self.state.global_step == 1:
            self.saw_it = True
            inputs["pixel_values"] = inputs["pixel_values"] * math.nan
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(folder: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}

    trainer = distillation_trainer(
        folder / "good", **settings, max_grad_norm=0.5, eval_dataset=NoiseImages(11, seed=3)
    )
    rank, start = trainer.args.process_index, snapshot(trainer.model)
    fresh = distillation_trainer(folder / "evaluated", **settings, eval_dataset=NoiseImages(11, seed=3))
    evaluation = fresh.evaluate()
    trainer.train()
    wrapped = trainer.model_wrapped
    frozen = {id(parameter) for parameter in trainer.frozen.parameters()}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    report = {
        "evaluation": evaluation,
        "is_ddp": isinstance(wrapped, DistributedDataParallel),
        "ddp_parameters": sorted(name.removeprefix("module.") for name, _ in wrapped.named_parameters()),
        "trained_parameters": sorted(start),
        "frozen_in_ddp": sum(id(parameter) in frozen for parameter in wrapped.parameters()),
        "losses": [log["loss"] for log in logs],
        "pair_losses": [log["pair_1_loss"] for log in logs],
        "checksum": [parameter.double().sum().item() for parameter in trainer.model.parameters()],
    }
    if rank == 0:
        save_file(snapshot(trainer.model), folder / "weights.safetensors")

    bad = distillation_trainer(folder / "bad", trainer_class=BadOnOneProcess, **settings)
    try:
        bad.train()
        report["error"] = "none"
    except NonFiniteError as error:
        report["error"] = str(error)
    report["bad_image_here"] = bad.saw_it
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
