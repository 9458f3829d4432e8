"""google-research/vmoe and big_vision: `m2mkd convert` gives folders that answer as the JAX models do."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax_vmoe
import numpy as np
import pytest
import torch
from jax_files import write_checkpoint
from jax_vmoe import forward, tree
from official_files import config_file, left
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
from typer.testing import CliRunner
from vmoe_jax_cases import BFLOAT16_TOLERANCE, FOLDER, FORWARD_TOLERANCE, assert_close, model_config, names

from m2mkd import VMoEForImageClassification
from m2mkd.cli import app
from m2mkd.conversion.convert import convert
from m2mkd.conversion.vmoe_jax_published import PUBLISHED
from m2mkd.errors import ConversionError
from m2mkd.evaluation.saved_model import load_for_evaluation


FILES = Path(__file__).parent / "vmoe_jax"
VARIANTS = [
    (name, variant)
    for name in names("model")
    for variant in json.loads((FOLDER / name / "config.json").read_text())["eval_variants"]
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "converted"


def merged(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(section))
    for name, value in changes.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def loaded(out: Path) -> VMoEForImageClassification:
    model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert type(model) is VMoEForImageClassification and not any(info.values()), info
    return model.eval()


class TestCasesOfTheCode:
    @pytest.mark.parametrize(("name", "variant"), VARIANTS)
    def test_every_router_head_and_ensemble(self, tmp_path: Path, out: Path, name: str, variant: str) -> None:
        content = json.loads((FOLDER / name / "config.json").read_text())
        inputs, outputs = (load_file(FOLDER / name / f"{part}.safetensors") for part in ("inputs", "outputs"))
        model = merged(content["model"], content["eval_variants"][variant])
        image_size = list(inputs["images"].shape[1:3])
        config = config_file(tmp_path, {"model": model, "image_size": image_size})
        convert("vmoe-jax", config, FOLDER / name / "params.safetensors", out)
        ours = loaded(out)
        with torch.no_grad():
            answer = ours(inputs["images"].permute(0, 3, 1, 2))
        members = answer.member_logits if ours.config.num_ensemble_members > 1 else answer.logits
        expected = outputs[f"{variant}/logits"]
        tolerance = BFLOAT16_TOLERANCE if name.endswith("_bf16") and "no_bf16" not in name else FORWARD_TOLERANCE
        assert_close(members.reshape(expected.shape), expected, "logits", tolerance)
        # what logits do not show: noise and losses
        expected_config = model_config(model, load_file(FOLDER / name / "params.safetensors"), image_size)
        for field in ("router_noise_std", *(f"router_{loss}_loss_coef" for loss in ("importance", "load", "gshard"))):
            assert getattr(ours.config, field) == pytest.approx(getattr(expected_config, field)), field

    @pytest.mark.parametrize("name", ["checkpoint_v1_sharded", "checkpoint_v1_unsharded"])
    def test_checkpoint_files(self, out: Path, name: str) -> None:
        case = FILES / name
        result = CliRunner().invoke(
            app, ["convert", "--kind=vmoe-jax", f"--config={case / 'config.json'}", str(case / "ckpt"), str(out)]
        )
        assert result.exit_code == 0, result.output
        images = load_file(case / "inputs.safetensors")["images"]
        with torch.no_grad():
            logits = loaded(out)(images.permute(0, 3, 1, 2)).logits
        assert_close(logits, load_file(case / "outputs.safetensors")["logits"])

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("checkpoint_unknown_version_trainstate", torch.float32),
            ("checkpoint_v1_bf16_trainstate", torch.bfloat16),
        ],
    )
    def test_train_states_keep_their_dtype(self, out: Path, name: str, dtype: torch.dtype) -> None:
        convert("vmoe-jax", FILES / name / "config.json", FILES / name / "ckpt", out)
        model, state = loaded(out), load_file(FILES / name / "params.safetensors")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        expected = state["params/Encoder/encoderblock_1/Moe/Mlp/Dense_1/kernel"].mT
        assert torch.equal(model.vmoe.layers[1].mlp.experts.down_proj.float(), expected)
        assert torch.equal(model.pooler.pre_logits.weight.float(), state["params/pre_logits/kernel"].T)

    @pytest.mark.parametrize("damage", ["missing", "cut off"])
    def test_nothing_is_left_of_a_damaged_checkpoint(self, tmp_path: Path, out: Path, damage: str) -> None:
        for path in (FILES / "checkpoint_v1_sharded").glob("ckpt.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        shard = tmp_path / "ckpt.data-00001-of-00003"
        content = shard.read_bytes()
        shard.unlink()
        if damage == "cut off":
            shard.write_bytes(content[:-1])
        with pytest.raises(ConversionError, match=re.escape(shard.name)):
            convert("vmoe-jax", FILES / "checkpoint_v1_sharded" / "config.json", tmp_path / "ckpt", out)
        assert left(out) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux shows the peak")
def test_the_whole_conversion_takes_one_copy_and_one_shard(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_vmoe, "WIDTH", 512)
    monkeypatch.setattr(jax_vmoe, "MLP", 2048)
    arrays = tree()
    prefix = write_checkpoint(tmp_path / "vmoe_s32_last2_ilsvrc2012_randaug_light1", arrays, 2, pieces=4)
    script = """
import re, sys
from pathlib import Path
from m2mkd.conversion.convert import convert
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
convert("vmoe-jax", None, Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(prefix), str(out)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    copy = sum(array.nbytes for array in arrays.values())
    assert copy / 2 < taken < copy + copy / 2, taken / copy


class TestBadValues:
    @pytest.mark.parametrize(
        ("router", "message"),
        [
            ({"num_selected_experts": 5}, "`num_experts_per_tok` is 5"),
            ({"dispatcher": {"capacity_factor": 0}}, "`capacity_factor` must be positive, but is 0"),
            ({"dispatcher": {"capacity_factor": 1, "capacity": 3}}, "both given"),
            ({"dispatcher": {"batch_priority": True}}, "Set `capacity_factor`"),
            ({"noise_std": -1}, "`router_noise_std` must not be negative, but is -1"),
            ({"noise_std": "much"}, "router_noise_std"),
            ({"name": "NoisyTopItemsPerExpertRouter"}, "needs `capacity_factor`"),
        ],
    )
    def test_of_the_router(self, tmp_path: Path, out: Path, router: dict[str, Any], message: str) -> None:
        np.savez(tmp_path / "params.npz", **tree())
        config = config_file(tmp_path, {"model": {"encoder": {"moe": {"router": router}}}})
        with pytest.raises(ConversionError, match=message):
            convert("vmoe-jax", config, tmp_path / "params.npz", out)
        assert left(out) == []

    def test_members_must_divide_the_experts(self, tmp_path: Path, out: Path) -> None:
        np.savez(tmp_path / "params.npz", **tree())
        config = config_file(tmp_path, {"model": {"encoder": {"moe": {"ensemble_size": 3}}}})
        with pytest.raises(ConversionError, match="`num_ensemble_members` must be at least 1 and divide"):
            convert("vmoe-jax", config, tmp_path / "params.npz", out)


class TestPublishedNames:
    def test_a_published_name_needs_no_config(self, tmp_path: Path, out: Path) -> None:
        prefix = write_checkpoint(tmp_path / "vmoe_s32_last2_ilsvrc2012_randaug_light1", tree(), 2, pieces=2)
        convert("vmoe-jax", None, prefix, out)
        model = loaded(out)
        assert (model.config.router_group_size, model.config.capacity_factor) == (400, 4.0)
        # three images of five tokens do not fill a group of its 400; this capacity drops nothing
        model.set_router(router_group_size=None)
        pixels = np.random.default_rng(1).normal(size=(3, 8, 8, 3))
        with torch.no_grad():
            ours = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).logits.numpy()
        expected = forward(tree(), pixels)
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_every_one(self, tmp_path: Path, out: Path, name: str) -> None:
        np.savez(tmp_path / f"{name}.npz", **tree())
        convert("vmoe-jax", None, tmp_path / f"{name}.npz", out)
        config = loaded(out).config
        assert (config.num_experts_per_tok, config.num_ensemble_members) == ((1, 2) if "eee" in name else (2, 1))
        assert (config.router_noise_std, config.router_load_loss_coef) == (1.0, pytest.approx(0.01))

    def test_another_name_needs_one(self, tmp_path: Path, out: Path) -> None:
        prefix = write_checkpoint(tmp_path / "mine", tree())
        with pytest.raises(ConversionError, match="Give --config .* or keep the name of .*vmoe_b16_imagenet21k"):
            convert("vmoe-jax", None, prefix, out)
        assert left(out) == []

    def test_other_kinds_need_one(self, tmp_path: Path, out: Path) -> None:
        np.savez(tmp_path / "params.npz", **tree())
        with pytest.raises(ConversionError, match="--kind vmoe needs --config"):
            convert("vmoe", None, tmp_path / "params.npz", out)
        result = CliRunner().invoke(app, ["convert", "--to-official", "--kind=vmoe", str(tmp_path), str(out)])
        assert result.exit_code == 2 and "--to-official needs --config" in result.output


class TestNamedArrays:
    """google-research/vmoe's parameter tree, in a file of named arrays."""

    def arrays(self, path: Path, **changes: Any) -> Path:
        arrays = {name: array for name, array in {**tree(), **changes}.items() if array is not None}
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
        return path

    @pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
    def test_the_folder_loads_and_gives_the_logits_of_the_code(self, tmp_path: Path, out: Path, name: str) -> None:
        config = config_file(tmp_path, {"num_selected_experts": 2}, "router.json")
        said = convert("vmoe-jax", config, self.arrays(tmp_path / name), out)
        assert said.startswith("VMoEForImageClassification of ")
        pixels = np.random.default_rng(1).normal(size=(2, 8, 8, 3))
        with torch.no_grad():
            model = AutoModelForImageClassification.from_pretrained(out).eval()
            ours = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).logits.numpy()
        expected = forward(tree(), pixels)
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()

    def test_a_pipeline_takes_the_folder(self, tmp_path: Path, out: Path) -> None:
        config = config_file(tmp_path, {"num_selected_experts": 2}, "router.json")
        convert("vmoe-jax", config, self.arrays(tmp_path / "params.npz"), out)
        image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        answer = pipeline("image-classification", model=str(out), top_k=None, function_to_apply="none")(image)
        # value_range(-1, 1) there
        expected = forward(tree(), np.asarray(image)[None] / 127.5 - 1)[0]
        ours = {entry["label"]: entry["score"] for entry in answer}
        assert ours == pytest.approx({f"LABEL_{i}": value for i, value in enumerate(expected)}, abs=1e-4)
        assert load_for_evaluation(out)[1] == {
            "image_size": 8, "center_crop": None, "resample": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3
        }  # fmt: skip

    def test_what_is_missing_is_listed_by_its_name(self, tmp_path: Path, out: Path) -> None:
        config = config_file(tmp_path, {"num_selected_experts": 2}, "router.json")
        lost = "Encoder/encoderblock_1/Moe/Mlp/Dense_1/kernel"
        checkpoint = self.arrays(tmp_path / "params.npz", **{lost: None})
        with pytest.raises(ConversionError, match="encoderblock_1/Moe/Mlp/Dense_1/kernel: missing"):
            convert("vmoe-jax", config, checkpoint, out)
        assert not out.exists()
