import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published_sets import picture
from scipy import stats
from testing_utils import NoiseImages, nac, snapshot, vit, vit_config, vmoe
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.data import DataConfig, DataError, build_image_processor
from m2mkd.evaluation import few_shot as few_shot_module
from m2mkd.evaluation.few_shot import ADAMW, NAC_SGD, few_shot, interval_95, train_head
from m2mkd.screen import Screen


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Six colours, ten shades of each."""
    for label in range(6):
        for index in range(10):
            picture(tmp_path / "images" / f"colour{label}" / f"{index}.png", value=40 * label + index)
    return f"imagefolder:{tmp_path / 'images'}"


def saved(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    build_image_processor(DataConfig(source="x", image_size=8)).save_pretrained(folder)
    return folder


class TestFewShot:
    @pytest.mark.parametrize("model", [vit, vmoe, nac])
    def test_accuracy_and_interval(self, tmp_path, images, model):
        folder = saved(tmp_path / "model", model())
        result = few_shot(folder, images, ways=4, shots=2, episodes=5)
        assert len(result["episodes"]) == 5 and result["accuracy"] == pytest.approx(np.mean(result["episodes"]))
        assert result["interval"] == pytest.approx(interval_95(result["episodes"]))
        assert result["head"]["optimizer"] == ("sgd" if model is nac else "adamw")
        assert few_shot(folder, images, ways=4, shots=2, episodes=5) == result
        assert few_shot(folder, images, ways=4, shots=2, episodes=2)["episodes"] == result["episodes"][:2]

    @pytest.mark.parametrize("name", ["ensemble", "two heads"])
    def test_a_head_reads_all_members_or_all_tokens(self, tmp_path, images, name):
        if name == "ensemble":
            model = vmoe(num_ensemble_members=2, num_experts_per_tok=1)
        else:
            model = DeiTForImageClassificationWithTeacher(DeiTConfig(**vit_config().to_dict())).eval()
        dataset = NoiseImages(6)
        features = few_shot_module.classifier_inputs(model, dataset, [np.arange(6)], 4, Screen(sys.stderr))
        states = model.base_model(dataset.pixel_values).last_hidden_state
        read = states[:, 0].unflatten(0, (6, 2)) if name == "ensemble" else states[:, :2]
        torch.testing.assert_close(torch.stack(list(features.values())), read.flatten(1).detach())
        assert len(few_shot(saved(tmp_path / "model", model), images, ways=4, shots=2, episodes=2)["episodes"]) == 2

    def test_features_are_computed_once_and_the_model_stays(self, tmp_path, images, monkeypatch):
        folder = saved(tmp_path / "model", vit())
        model, pixels = few_shot_module.load_for_evaluation(folder)
        before, seen = snapshot(model), []
        monkeypatch.setattr(few_shot_module, "load_for_evaluation", lambda _: (model, pixels))
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        few_shot(folder, images, ways=5, shots=2, episodes=10)
        assert sum(seen) <= 2 * 60  # each image at most once to learn from and once to test on
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_what_a_head_can_tell_apart(self):
        """Class means far apart are learnt from one image each; features without information are not."""
        generator = torch.Generator().manual_seed(0)
        centres = 3 * torch.randn(5, 32, generator=generator)
        noise = [torch.randn(100, 32, generator=generator) for _ in range(2)]
        labels = torch.arange(5).repeat(20)
        head = train_head(centres, torch.arange(5), 5, ADAMW, seed=0)
        assert (head(centres[labels] + 0.3 * noise[0]).argmax(-1) == labels).float().mean() > 0.95
        head = train_head(noise[0], labels, 5, ADAMW, seed=0)
        assert (head(noise[1]).argmax(-1) == labels).float().mean() < 0.4

    def test_schedules(self):
        rates = [few_shot_module._learning_rate(ADAMW, step) for step in range(100)]
        assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[20] == pytest.approx(2e-3)
        assert 1e-5 < rates[99] < 2e-5
        assert {few_shot_module._learning_rate(NAC_SGD, step) for step in range(500)} == {3e-4}

    def test_too_few_images(self, tmp_path, images):
        with pytest.raises(DataError, match="shots is 3, so .*: set shots to 2 or fewer"):
            few_shot(saved(tmp_path / "model", vit()), images, ways=4, shots=3)


class TestInterval:
    @pytest.mark.parametrize("count", [2, 3, 20, 600])
    def test_against_scipy(self, count):
        values = np.random.default_rng(0).normal(size=count)
        low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
        assert interval_95(values.tolist()) == pytest.approx((high - low) / 2, rel=1e-12)

    def test_two_values(self):
        """Student's t of one degree of freedom is 12.706; the standard error of two values is half their distance."""
        assert interval_95([0.4, 0.6]) == pytest.approx(12.706 * 0.1, rel=1e-4)

    def test_one_value(self):
        assert interval_95([0.5]) is None


class TestCommand:
    def test_sentence_and_json(self, tmp_path, images):
        folder = str(saved(tmp_path / "model", vit()))
        options = ["few-shot", folder, "--data", images, "--ways", "3", "--shots", "1", "--episodes", "3"]
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 0 and "3-way 1-shot on" in done.stdout and "±" in done.stdout
        plain = CliRunner().invoke(app, [*options, "--json"])
        assert len(json.loads(plain.stdout)["episodes"]) == 3
        # at once, and beside the JSON
        assert plain.stderr.startswith(f"Few-shot test of {folder} on {images}: loading")

    def test_progress_is_shown(self, tmp_path, images, monkeypatch):
        shown = []
        monkeypatch.setattr(Screen, "advance", lambda _, name, step, total, values: shown.append((name, step, total)))
        few_shot(saved(tmp_path / "model", vit()), images, ways=3, shots=1, episodes=3, batch_size=4)
        assert shown[-4:] == [("episodes", step, 3) for step in range(4)]
        assert shown[0][0].startswith("features of ") and shown[0][1] == 0

    def test_error(self, tmp_path):
        done = CliRunner().invoke(app, ["few-shot", str(saved(tmp_path, vit())), "--data", "cifar100:nowhere"])
        assert done.exit_code == 1 and "Traceback" not in done.output
