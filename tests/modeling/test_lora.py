from pathlib import Path
from typing import Any

import pytest
import torch
from testing_utils import NoiseImages, changed, images, nac, randomized, snapshot, vmoe
from transformers import PreTrainedModel, Trainer, TrainingArguments


peft = pytest.importorskip("peft")

TARGETS = {
    "vmoe": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.up_proj", "experts.down_proj"],
    },
    "nac": {"target_modules": [], "target_parameters": ["attention.q_proj.weight", "attention.v_proj.weight"]},
}


def plain(name: str) -> PreTrainedModel:
    return vmoe() if name == "vmoe" else randomized(nac(), seed=0)


def adapted(name: str) -> Any:
    """The model with its adapters, which do not change the outputs yet."""
    return peft.get_peft_model(plain(name), peft.LoraConfig(r=2, modules_to_save=["classifier"], **TARGETS[name]))


@pytest.mark.parametrize("name", TARGETS)
class TestLora:
    def test_the_adapters_alone_learn(self, name: str, tmp_path: Path) -> None:
        lora = adapted(name)
        before = snapshot(lora)
        args = TrainingArguments(
            tmp_path, use_cpu=True, max_steps=3, per_device_train_batch_size=8, learning_rate=0.05, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(lora, args, train_dataset=NoiseImages()).train()
        moved = changed(lora, before)
        assert moved and all("lora_" in key or "modules_to_save" in key for key in moved)

    def test_it_starts_as_the_model_and_merges_into_it(self, name: str, tmp_path: Path) -> None:
        model, lora = plain(name), adapted(name).eval()
        expected = model(images()).logits
        assert torch.allclose(lora(images()).logits, expected, atol=1e-6)
        with torch.no_grad():
            for key, parameter in lora.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)
        adapted_logits = lora(images()).logits
        assert not torch.allclose(adapted_logits, expected, atol=1e-2)
        lora.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        assert torch.allclose(loaded(images()).logits, adapted_logits, atol=1e-5)
        assert torch.allclose(lora.merge_and_unload()(images()).logits, adapted_logits, atol=1e-5)

    def test_each_target_counts(self, name: str) -> None:
        lora = adapted(name).eval()
        last = lora(images()).logits
        for key, parameter in lora.named_parameters():
            if "lora_B" in key:
                with torch.no_grad():
                    parameter.normal_()
                logits, last = last, lora(images()).logits
                assert not torch.equal(logits, last), key
