"""The configurations of a recipe's networks."""

import re
from typing import Any

import pytest
from testing_utils import vit

from m2mkd import VMoEConfig
from m2mkd.data.config import DataConfig
from m2mkd.errors import RecipeError
from m2mkd.experiment.networks import build_config, fit_to_data
from m2mkd.experiment.recipe import NetworkSpec


DATA, CLASSES = DataConfig(source="x", image_size=16), ["blue", "green", "red"]


def built(**spec: Any) -> Any:
    return build_config(NetworkSpec(**spec), DATA, CLASSES)


def test_size_and_classes_come_from_the_data() -> None:
    config = built(model_type="vit", config={"hidden_size": 12, "num_attention_heads": 2})
    assert (config.image_size, config.hidden_size) == (16, 12)
    assert config.id2label == {0: "blue", 1: "green", 2: "red"} and config.label2id["red"] == 2


def test_a_preset_gives_what_the_recipe_does_not() -> None:
    config = built(model_type="vmoe", preset="tiny", config={"num_experts": 2})
    assert config.num_experts == 2 and config.hidden_size == VMoEConfig.from_preset("tiny").hidden_size


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"config": {"num_labels": 4}}, "sets ['num_labels'], but these come from the data"),
        ({"config": {"hiden_size": 4}}, "has no field ['hiden_size']"),
        ({"preset": "tiny"}, "A vit has no `preset`, only nac and vmoe do"),
        ({"config": {"hidden_size": "wide"}}, "The `config` of the vit is not valid"),
    ],
)
def test_what_a_configuration_cannot_be_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        built(model_type="vit", **spec)


def test_a_trained_network_takes_the_images_and_names_of_the_data() -> None:
    teacher = vit(num_labels=3)
    fit_to_data(teacher, DATA, CLASSES)
    assert teacher.config.image_size == 16 and teacher.config.id2label == {0: "blue", 1: "green", 2: "red"}
