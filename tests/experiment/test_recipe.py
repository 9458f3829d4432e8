"""Recipes are checked key by key, and every message names the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_run import recipe_content, tiny_recipe

from m2mkd.errors import RecipeError
from m2mkd.experiment.recipe import NetworkSpec
from m2mkd.experiment.recipe_file import load_recipe, parse_recipe, parse_value


RECIPES = Path(__file__).parents[2] / "recipes"


class TestLoadRecipe:
    def test_the_embedded_default_is_valid_and_runs_all_arms(self) -> None:
        recipe = load_recipe()
        assert list(recipe.arms) == ["kd", "m2mkd_kd"]
        assert recipe.data[recipe.evaluation.ood].source == "uci_digits"

    def test_every_recipe_of_the_repository_is_valid(self) -> None:
        recipes = sorted(RECIPES.glob("*.yaml"))
        assert recipes
        for path in recipes:
            load_recipe(path)

    def test_overrides_replace_values_by_dotted_key(self) -> None:
        recipe = load_recipe(None, {"seed": 7, "finetune.training.num_train_epochs": 3, "data.iid.image_size": 32})
        assert (recipe.seed, recipe.finetune.training["num_train_epochs"]) == (7, 3)
        assert recipe.data["iid"].image_size == 32

    def test_a_number_with_an_exponent_is_a_number(self, tmp_path: Path) -> None:
        content = recipe_content(tmp_path)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content).replace("learning_rate: 0.001", "learning_rate: 1e-3"))
        assert "1e-3" in path.read_text()
        assert load_recipe(path).training["learning_rate"] == 0.001

    @pytest.mark.parametrize(
        "text, message",
        [
            (
                "a: [1",
                "recipe.yaml cannot be read as YAML: line 1, column 6: expected ',' or '\\]'.* Check the colons",
            ),
            ("a: 1\n  b: 2", "line 2, column 4: mapping values are not allowed here. Check the colons"),
            ("a:\n\tb: 2", "line 2, column 1: found character .* indent with spaces"),
            ("- 1\n- 2", "is not a mapping"),
            ("seed: 1\nseed: 2", "line 2, column 1: `seed` is given twice. Keep one of them"),
        ],
    )
    def test_a_file_that_is_no_recipe_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="There is no recipe .*nowhere.yaml"):
            load_recipe(tmp_path / "nowhere.yaml")

    def test_a_recipe_that_extends_another_says_only_what_differs(self, tmp_path: Path) -> None:
        content = recipe_content(tmp_path)
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
        own = (
            "extends: ../base.yaml\nseed: 3\narms: [e2e]\nstudent: {model: {config: {num_experts: 4}}}\n"
            "meta: {init: from_teacher, model: null}\nteacher: {incubation: null}\n"
        )
        path = tmp_path / "more" / "own.yaml"
        path.parent.mkdir()
        path.write_text(own)
        recipe = load_recipe(path, {"distill.pairs": [1]})
        assert (recipe.seed, list(recipe.arms), recipe.distill.pairs) == (3, ["e2e"], [1])
        expected = {**content["student"]["model"]["config"], "num_experts": 4}
        assert recipe.student.model.config == expected and recipe.name == "tiny"
        assert recipe.meta.model is None and recipe.teacher.incubation == {}

    @pytest.mark.parametrize(
        "extends, message",
        [
            ("own.yaml", "own.yaml extends itself"),
            ("nowhere.yaml", "There is no recipe .*nowhere.yaml"),
            ("[1]", r"`extends` is \[1\]; give the path of one recipe"),
        ],
    )
    def test_what_cannot_be_extended_is_refused(self, tmp_path: Path, extends: str, message: str) -> None:
        (tmp_path / "own.yaml").write_text(f"extends: {extends}\nseed: 1\n")
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "own.yaml")

    def test_another_architecture_replaces_the_whole_network(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe_content(tmp_path)))
        path = tmp_path / "own.yaml"
        path.write_text("extends: base.yaml\nstudent: {model: {model_type: nac, preset: tiny}}\n")
        for recipe in (
            load_recipe(path),
            load_recipe(tmp_path / "base.yaml", {"student.model.preset": "tiny", "student.model.model_type": "nac"}),
        ):
            assert recipe.student.model == NetworkSpec(model_type="nac", preset="tiny")

    @pytest.mark.parametrize(
        "own, dropped",
        [
            ({"meta": {"init": "from_teacher"}}, {"meta.model": None, "teacher.incubation": {}}),
            ({"teacher": {"pretrained": "x"}}, {"teacher.model": None, "teacher.incubation": {}}),
        ],
    )
    def test_what_a_value_leaves_no_place_for_is_dropped(
        self, tmp_path: Path, own: dict[str, Any], dropped: dict[str, Any]
    ) -> None:
        content = recipe_content(tmp_path)
        content["teacher"]["incubation"] = {"num_train_epochs": 1}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(content))
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({"extends": "base.yaml", **own}))
        ((section, values),) = own.items()
        overrides = {f"{section}.{key}": value for key, value in values.items()}
        for recipe in (load_recipe(path), load_recipe(tmp_path / "base.yaml", overrides)):
            found = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in dropped}
            assert found == dropped

    def test_and_the_other_way_round(self, tmp_path: Path) -> None:
        content = recipe_content(tmp_path)
        base = {**content, "meta": {"init": "from_teacher", "data": "train"}}
        base["teacher"] = {"pretrained": "x", "depths": [2, 1], "data": "train"}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        overrides = {f"{section}.model": content[section]["model"] for section in ("meta", "teacher")}
        recipe = load_recipe(tmp_path / "base.yaml", overrides)
        assert (recipe.meta.init, recipe.teacher.pretrained) == ("random", None)

    def test_what_the_recipe_itself_gives_is_not_dropped(self, tmp_path: Path) -> None:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe_content(tmp_path)))
        model = {"model_type": "vit"}
        with pytest.raises(RecipeError, match="meta: give either `model` .* or `init: from_teacher`"):
            load_recipe(tmp_path / "base.yaml", {"meta.init": "from_teacher", "meta.model": model})

    def test_an_override_inside_a_value_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="seed.x: `seed` is a value"):
            load_recipe(None, {"seed.x": 1})


PAPER = sorted(RECIPES.glob("nac_*imagenet_*.yaml")) + [RECIPES / "vmoe_base_imagenet.yaml"]


class TestRecipesOfThePaper:
    def test_there_is_one_for_each_experiment(self) -> None:
        assert len(PAPER) == 2 * 4 + 1
        students = {(recipe.student.model.preset, recipe.name) for recipe in map(load_recipe, PAPER)}
        assert len(students) == len(PAPER)

    @pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
    def test_learning_rates_on_8_gpus_are_those_of_the_official_code(self, path: Path) -> None:
        recipe = load_recipe(path)
        kind = (recipe.student.model.model_type, recipe.data[recipe.finetune.data].source)
        end_to_end = {
            ("vmoe", "imagenet-1k"): (1024, 1e-3, 100),
            ("nac", "imagenet-1k"): (256, 6e-4, 110),
            ("nac", "tiny-imagenet"): (1024, 2.4e-3, 400),
        }
        phases = {
            "meta": (recipe.meta.training, (2048, 2e-3, 300)),
            "incubation": (recipe.teacher.incubation, (2048, 2e-3, 100)),
            "finetuning": (recipe.teacher.finetuning, (1024, 1e-3, 100)),
            "distill": (recipe.distill.training, (2048, 2e-3, 100)),
            "finetune": (recipe.finetune.training, end_to_end[kind]),
        }
        for name, (own, expected) in phases.items():
            training = {**recipe.training, **own}
            batch = 8 * training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
            peak = training["base_learning_rate"] * batch / 512
            assert (batch, pytest.approx(peak), training["num_train_epochs"]) == expected, name

    @pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
    def test_accelerate_reads_its_configuration(self, path: Path) -> None:
        config = load_config_from_file(str(path))
        assert config.num_processes == (1 if path.stem == "single" else 8)


# the sets that the tiny recipe uses
SETS = {name: {"source": f"imagefolder:{name}"} for name in ("train", "labelled", "iid", "ood")}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"sede": 1}, "sede: there is no such key"),
    "unknown nested key": ({"distill": {"data": "train", "pair": [0]}}, "distill.pair: there is no such key"),
    "missing key": ({"evaluation": {}}, "evaluation.iid: this key is missing"),
    "wrong type": ({"seed": "zero"}, "seed: Input should be a valid integer .*'zero'"),
    "unknown training argument": ({"training": {"lr": 1}}, "training: `lr` is not an argument"),
    "training argument of another type": (
        {"training": {"num_train_epochs": "ten"}},
        "training: `num_train_epochs` is 'ten'",
    ),
    "training argument of the runner": (
        {"training": {"output_dir": "x"}},
        "training: `output_dir` is set by the runner",
    ),
    "a phase that pushes itself": (
        {"training": {"push_to_hub": True}},
        "push an arm with `m2mkd push`",
    ),
    "loss argument where no teacher is": (
        {"finetune": {"data": "labelled", "training": {"alpha": 0.3}}},
        "finetune.training: `alpha` needs a teacher",
    ),
    "unknown data set": ({"finetune": {"data": "nothing"}}, "`finetune.data` is 'nothing', but `data` has only"),
    "unknown arm": ({"arms": ["e2e", "magic"]}, "arms: 'magic' is not a preset"),
    "depths of different lengths": (
        {"teacher": {"pretrained": "x", "depths": [1, 1, 1]}},
        r"`student.depths` \[1, 1\] makes 2 stages, but `teacher.depths` \[1, 1, 1\] makes 3",
    ),
    "teacher from nowhere": ({"teacher": {"depths": [2, 1]}}, "teacher: give either `pretrained`"),
    "training argument that is none of a list": (
        {"training": {"eval_strategy": "never"}},
        "training: `eval_strategy` is 'never'; use one of no, steps, epoch",
    ),
    "YAML 1.1's truth": ({"equal_compute": "yes"}, "equal_compute: it should be true or false .*'yes'"),
    "a training argument's truth": ({"training": {"bf16": "on"}}, "`bf16` is 'on': it should be true or false"),
    "a holdout of the test folder alone": (
        {"data": {**SETS, "iid": {"source": "imagefolder:test", "split": "test", "holdout": 0.1}}},
        r"`data.iid` has `holdout: 0.1` .* of 'imagefolder:test', but .* set data.iid.holdout to 0 and data.iid.split",
    ),
    "a holdout that no set is tested on": (
        {"data": {**SETS, "train": {"source": "imagefolder:train", "split": "train", "holdout": 0.1}}},
        "no other set of this recipe is split 'test' of that folder",
    ),
    "two holdouts of one folder": (
        {
            "data": {
                **SETS,
                "train": {"source": "imagefolder:a", "split": "train", "holdout": 0.1},
                "iid": {"source": "imagefolder:a", "split": "test", "holdout": 0.2},
            }
        },
        "with the same `holdout`",
    ),
    "seeds that repeat": ({"repeat_seeds": [0, 1]}, "must all be different"),
}


class TestParseRecipe:
    @pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG.keys())
    def test_what_is_wrong_is_named_by_its_key(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(tmp_path, **changes)

    def test_a_holdout_beside_the_rest_of_its_folder_is_fine(self, tmp_path: Path) -> None:
        one = {"holdout": 0.1}
        data = {
            **SETS,
            "train": {"source": "imagefolder:own/", "split": "train", **one},
            "iid": {"source": "imagefolder:./own", "split": "test", **one},
        }
        assert tiny_recipe(tmp_path, data=data).used_data()["iid"].holdout == 0.1

    def test_all_problems_are_listed_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError) as caught:
            parse_recipe({**recipe_content(tmp_path), "seed": "x", "nonsense": 1}, "this recipe")
        assert "seed:" in str(caught.value) and "nonsense:" in str(caught.value)


class TestParseValue:
    @pytest.mark.parametrize(
        "text, value", [("3", 3), ("1e-3", 0.001), ("true", True), ("[0, 1]", [0, 1]), ("runs/x", "runs/x")]
    )
    def test_values_are_read_as_yaml(self, text: str, value: Any) -> None:
        assert parse_value(text) == value

    @pytest.mark.parametrize("text", ["no", "off", "on", "yes"])
    def test_what_transformers_takes_as_text_stays_text(self, tmp_path: Path, text: str) -> None:
        assert parse_value(text) == text
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_content(tmp_path)).replace("name: tiny", f"name: {text}"))
        assert load_recipe(path).name == text

    def test_a_broken_value_is_refused(self) -> None:
        with pytest.raises(RecipeError, match=r"'\[0' cannot be read as YAML. Close its brackets"):
            parse_value("[0")
