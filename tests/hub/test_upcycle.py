"""`m2mkd upcycle`: the folder of a V-MoE from the folder of a dense model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from testing_utils import images, nac, randomized, vit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    pipeline,
)
from typer.testing import CliRunner, Result

from m2mkd import VMoEForImageClassification
from m2mkd.cli import app
from m2mkd.data import DataConfig, build_image_processor


def saved(folder: Path, model: PreTrainedModel, **pixels: Any) -> Path:
    model.save_pretrained(folder)
    config = DataConfig(source="x", **{"image_size": 8, "mean": (0.4, 0.5, 0.6), **pixels})
    build_image_processor(config).save_pretrained(folder)
    return folder


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["upcycle", *map(str, arguments)])


def difference_in(output: str) -> float:
    return float(output.split("differ from the dense model's by at most ")[1].split()[0])


class TestFolder:
    def test_it_is_loaded_by_transformers_and_answers_as_the_dense_model(self, tmp_path: Path):
        dense, out = saved(tmp_path / "dense", vit()), tmp_path / "out"
        done = cli(dense, out, "--experts", "4", "--layers", "all", "--experts-per-token", "3")
        assert done.exit_code == 0, done.output
        model = AutoModelForImageClassification.from_pretrained(out)
        assert type(model) is VMoEForImageClassification
        config = model.config
        assert (config.num_experts, config.num_experts_per_tok, config.moe_layers) == (4, 3, [0, 1, 2])
        torch.testing.assert_close(model(images()).logits, vit()(images()).logits)
        assert AutoImageProcessor.from_pretrained(out).image_mean == (0.4, 0.5, 0.6)
        assert difference_in(done.output) < 1e-5 and "16 images of noise" in done.output
        assert len(pipeline("image-classification", model=str(out))(Image.new("RGB", (20, 30)))) == 5

    def test_its_card_says_what_it_was_made_from(self, tmp_path: Path):
        out = tmp_path / "out"
        done = cli(saved(tmp_path / "dense-vit", vit()), out, "--layers", "[0,2]")
        card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
        assert card.data.base_model is None and card.data.model_name == "out"
        assert "`dense-vit`" in card.text and str(tmp_path) not in card.content
        assert "8 experts in layers [0, 2]" in card.text and done.output.splitlines()[1] in card.text
        assert "2212.05055" in card.text and "2106.05974" in card.text

    def test_images_and_centroids(self, tmp_path: Path):
        dense = saved(tmp_path / "dense", vit())
        seen = []
        for name, options in {"random": [], "clustered": ["--centroids"], "noisy": ["--noise-std", "0.1"]}.items():
            done = cli(dense, tmp_path / name, "--data", "uci_digits", "--layers", "last-2", *options)
            assert done.exit_code == 0 and "On 256 given images" in done.output, done.output
            assert (difference_in(done.output) < 1e-5) == (name != "noisy")
            seen.append(AutoModelForImageClassification.from_pretrained(tmp_path / name).vmoe.layers[1].mlp)
        random, clustered, noisy = seen
        assert not torch.equal(random.router.weight, clustered.router.weight)
        # the same seed draws the same routers
        assert torch.equal(random.router.weight, noisy.router.weight)
        assert not torch.equal(*noisy.experts.up_proj[:2]) and torch.equal(*random.experts.up_proj[:2])

    def test_a_dinov2_for_smaller_images_than_it_was_trained_on(self, tmp_path: Path):
        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
        dense = randomized(Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=16, num_labels=5)), seed=1)
        saved(tmp_path / "dense", dense)
        refused = cli(tmp_path / "dense", tmp_path / "out")
        assert refused.exit_code == 1 and "--approximate" in refused.output and not (tmp_path / "out").exists()
        done = cli(tmp_path / "dense", tmp_path / "out", "--approximate")
        assert done.exit_code == 0 and difference_in(done.output) > 1e-3
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        ours, theirs = model.vmoe(images()).last_hidden_state, dense.dinov2(images()).last_hidden_state
        torch.testing.assert_close(ours, theirs)

    def test_without_an_image_processor_it_says_so(self, tmp_path: Path):
        vit().save_pretrained(tmp_path / "dense")
        done = cli(tmp_path / "dense", tmp_path / "out")
        assert done.exit_code == 0 and "has no image processor" in done.output
        refused = cli(tmp_path / "dense", tmp_path / "other", "--data", "uci_digits")
        assert refused.exit_code == 1 and "has no image processor" in refused.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "last-3"], "'last-3'; it must be one of every-other, last-2, all"),
        (["--layers", "[0,3]"], "different layer indices from 0 to 2"),
        (["--layers", "[0.5]"], "`layers` is [0.5]"),
        (["--layers", "[0"], "`layers` is '[0'"),
        (["--experts-per-token", "9"], "`num_experts_per_tok` is 9"),
        (["--centroids"], "--centroids needs images"),
        (["--noise-std", "-1"], "`noise_std` must be 0 (no noise) or a positive number, but is -1.0"),
        (["--data", "imagefolder:nowhere"], "nowhere"),
    ],
)
def test_a_wrong_option_leaves_nothing(options: list[str], message: str, tmp_path: Path):
    done = cli(saved(tmp_path / "dense", vit()), tmp_path / "out", *options)
    assert done.exit_code == 1 and message in done.output, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_model_that_is_missing_or_no_transformer(tmp_path: Path):
    done = cli(tmp_path / "nothing", tmp_path / "out")
    assert done.exit_code == 1 and "There is no folder" in done.output
    done = cli(saved(tmp_path / "nac", nac()), tmp_path / "out")
    assert done.exit_code == 1 and "A nac has no layers" in done.output


def test_what_is_there_stays(tmp_path: Path):
    dense, out = saved(tmp_path / "dense", vit()), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    done = cli(dense, out)
    assert done.exit_code == 1 and "already exists and is not empty" in done.output
    assert json.loads((out / "config.json").read_text()) == {}
