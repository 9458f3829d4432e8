"""Saved networks: a classifier that was never trained as one is refused wherever it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from testing_utils import vit, vit_config
from transformers import ViTModel

from m2mkd.distillation.load import load_network, load_network_config, load_processor
from m2mkd.errors import DataError, StageError


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    ViTModel(vit_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


class TestLoadNetwork:
    @pytest.mark.parametrize("load", [load_network, load_network_config])
    def test_a_head_that_was_never_trained_is_refused(self, backbone: Path, load) -> None:
        with pytest.raises(StageError, match="no weights for classifier.bias, classifier.weight.*Train it first"):
            load(backbone)

    @pytest.mark.parametrize("load", [load_network, load_network_config])
    def test_unused_weights_do_no_harm(self, backbone: Path, load) -> None:
        model = vit()
        model.vit.pooler = ViTModel(vit_config()).pooler
        model.save_pretrained(backbone)
        assert load(backbone)

    def test_a_model_in_the_cache_is_looked_at_too(
        self, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        repository = tmp_path / "hub" / "models--alice--backbone"
        shutil.copytree(backbone, repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        with pytest.raises(StageError, match="^alice/backbone is not .* for classifier.bias, classifier.weight"):
            load_network_config("alice/backbone")

    def test_of_a_model_that_is_not_downloaded_the_configuration_tells(self, backbone: Path) -> None:
        (backbone / "model.safetensors").unlink()
        with pytest.raises(StageError, match="no weights for classifier"):
            load_network_config(backbone)
        content = json.loads((backbone / "config.json").read_text())
        for architectures in (["ViTForImageClassification"], None):
            (backbone / "config.json").write_text(json.dumps({**content, "architectures": architectures}))
            assert load_network_config(backbone).hidden_size == 12


def test_a_missing_image_processor_is_explained(backbone: Path) -> None:
    with pytest.raises(DataError, match="so its input size and normalization are unknown"):
        load_processor(backbone)
