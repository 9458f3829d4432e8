import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import assert_equal, images, randomized, snapshot, vmoe
from transformers import AutoConfig

from m2mkd import split_into_stages
from m2mkd.modeling.pair_files import (
    PairFileError,
    keep_stitches,
    load_stage,
    load_stitches,
    read_contract,
    save_pair,
)
from m2mkd.modeling.stages import Stage
from m2mkd.modeling.stitched_student import StitchedStage


STITCH_SIZE = 12
DEPTHS = [1, 2, 1]


def stage(index: int = 1, seed: int = 0, depths: tuple[int, ...] = tuple(DEPTHS), **overrides) -> Stage:
    return split_into_stages(vmoe(seed, **overrides), depths)[index]


@pytest.fixture
def pair() -> StitchedStage:
    return randomized(StitchedStage(stage(), STITCH_SIZE), seed=4)


@pytest.fixture
def folder(pair: StitchedStage, tmp_path: Path) -> Path:
    save_pair(pair, tmp_path / "pairs" / "1", STITCH_SIZE)
    return tmp_path / "pairs" / "1"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


class TestSavePair:
    def test_the_folder_holds_the_stage_by_the_names_of_the_student(self, pair: StitchedStage, folder: Path) -> None:
        files = {"config.json", "model.safetensors", "stitches.safetensors", "pair.json"}
        assert {path.name for path in folder.iterdir()} == files
        saved = load_file(folder / "model.safetensors")
        assert_equal(saved, pair.stage.state_dict())
        assert all(name.startswith(("vmoe.layers.1.", "vmoe.layers.2.")) for name in saved)
        assert_equal(load_file(folder / "stitches.safetensors"), pair.stitch_state_dict())

    def test_the_contract_says_where_the_pair_belongs(self, folder: Path) -> None:
        assert read_contract(folder) == {
            "index": 1,
            "num_pairs": 3,
            "layers": [1, 2],
            "model_type": "vmoe",
            "hidden_size": 16,
            "stitch_size": 12,
        }

    def test_the_config_is_that_of_the_whole_student(self, folder: Path) -> None:
        assert AutoConfig.from_pretrained(folder).num_hidden_layers == 4

    def test_saving_again_replaces_the_files(self, pair: StitchedStage, folder: Path) -> None:
        randomized(pair, seed=9)
        save_pair(pair, folder, STITCH_SIZE)
        assert_equal(load_file(folder / "model.safetensors"), pair.stage.state_dict())


class TestLoadStage:
    def test_it_gives_back_the_same_bits_and_touches_nothing_else(self, pair: StitchedStage, folder: Path) -> None:
        model = vmoe(seed=7)
        before = snapshot(model)
        target = split_into_stages(model, DEPTHS)[1]
        assert load_stage(target, folder) == []
        assert_equal(target.state_dict(), pair.stage.state_dict())
        others = {name: value for name, value in model.state_dict().items() if name not in target.state_dict()}
        assert_equal(others, {name: before[name] for name in others})

    def test_all_pairs_together_make_the_student(self, tmp_path: Path) -> None:
        trained, assembled = vmoe(seed=1), vmoe(seed=2)
        for source in split_into_stages(trained, DEPTHS):
            save_pair(StitchedStage(source, STITCH_SIZE), tmp_path / str(source.index), STITCH_SIZE)
        for target in split_into_stages(assembled, DEPTHS):
            load_stage(target, tmp_path / str(target.index))
        assert torch.equal(assembled(images()).logits, trained(images()).logits)

    def test_the_stage_may_still_be_on_another_data_set_with_other_classes(self, tmp_path: Path) -> None:
        save_pair(StitchedStage(stage(index=2), STITCH_SIZE), tmp_path, STITCH_SIZE)
        target = stage(index=2, seed=5, num_labels=9)
        head = snapshot(target)
        skipped = load_stage(target, tmp_path, reinitialize=("classifier",))
        assert sorted(skipped) == ["classifier.bias", "classifier.weight"]
        assert torch.equal(target.state_dict()["classifier.weight"], head["classifier.weight"])
        assert torch.equal(
            target.state_dict()["vmoe.layernorm.bias"], stage(index=2).state_dict()["vmoe.layernorm.bias"]
        )

    def test_what_may_differ_in_shape_is_loaded_where_it_does_not(self, tmp_path: Path) -> None:
        save_pair(StitchedStage(stage(index=2), STITCH_SIZE), tmp_path, STITCH_SIZE)
        target = stage(index=2, seed=5)
        assert load_stage(target, tmp_path, reinitialize=("classifier",)) == []
        assert_equal(target.state_dict(), stage(index=2).state_dict())

    def test_another_shape_is_refused_with_both_shapes(self, tmp_path: Path) -> None:
        save_pair(StitchedStage(stage(index=2), STITCH_SIZE), tmp_path, STITCH_SIZE)
        target = stage(index=2, num_labels=9)
        before = snapshot(target)
        with pytest.raises(PairFileError, match=r"classifier.weight.*\(5, 16\), \(9, 16\)"):
            load_stage(target, tmp_path)
        assert_equal(target.state_dict(), before)

    @pytest.mark.parametrize(
        "target, field",
        [
            (lambda: stage(index=2), "index"),
            (lambda: stage(depths=(1, 2, 1, 1), num_hidden_layers=5), "num_pairs"),
            (lambda: stage(depths=(2, 1, 1)), "layers"),
            (lambda: stage(hidden_size=20), "hidden_size"),
        ],
        ids=["index", "num_pairs", "layers", "hidden_size"],
    )
    def test_the_pair_of_another_student_is_refused_by_what_differs(self, folder: Path, target, field: str) -> None:
        with pytest.raises(PairFileError, match=rf"pair.json says `{field}` is"):
            load_stage(target(), folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "pair.json"])
    def test_a_missing_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(PairFileError, match=f"{name} is missing"):
            load_stage(stage(), folder)

    def test_a_truncated_file_is_named_and_nothing_is_loaded(self, folder: Path) -> None:
        truncate(folder / "model.safetensors")
        target = stage(seed=7)
        before = snapshot(target)
        with pytest.raises(PairFileError, match="model.safetensors is damaged or truncated"):
            load_stage(target, folder)
        assert_equal(target.state_dict(), before)

    def test_an_empty_file_is_named(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(PairFileError, match="model.safetensors is damaged or truncated"):
            load_stage(stage(), folder)

    @pytest.mark.parametrize("content", ["{", "", "[]", "\xff\xfe"], ids=["cut", "empty", "list", "binary"])
    def test_a_damaged_contract_is_named(self, folder: Path, content: str) -> None:
        (folder / "pair.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(PairFileError, match="pair.json is damaged"):
            load_stage(stage(), folder)

    def test_a_tensor_too_few_or_too_many_is_named(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["vmoe.layers.1.extra"] = tensors.pop("vmoe.layers.1.attention.q_proj.bias")
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(PairFileError, match="lacks.*q_proj.bias.*unexpected.*vmoe.layers.1.extra"):
            load_stage(stage(), folder)


class TestLoadStitches:
    def test_it_gives_back_the_same_bits_and_leaves_the_stage_alone(self, pair: StitchedStage, folder: Path) -> None:
        other = StitchedStage(stage(seed=7), STITCH_SIZE)
        before = snapshot(other.stage)
        load_stitches(other, folder)
        assert_equal(other.stitch_state_dict(), pair.stitch_state_dict())
        assert_equal(other.stage.state_dict(), before)

    @pytest.mark.parametrize(
        "other",
        [
            lambda: StitchedStage(stage(), STITCH_SIZE + 1),
            lambda: StitchedStage(stage(), STITCH_SIZE, "linear"),
            lambda: StitchedStage(stage(index=0), STITCH_SIZE),
        ],
        ids=["width", "kind", "index"],
    )
    def test_stitches_that_do_not_fit_are_refused(self, folder: Path, other) -> None:
        with pytest.raises(PairFileError, match="stitches.safetensors holds .* but the pair's stitches are"):
            load_stitches(other(), folder)

    def test_a_missing_or_truncated_file_is_named(self, pair: StitchedStage, folder: Path) -> None:
        truncate(folder / "stitches.safetensors")
        with pytest.raises(PairFileError, match="stitches.safetensors is damaged or truncated"):
            load_stitches(pair, folder)
        (folder / "stitches.safetensors").unlink()
        with pytest.raises(PairFileError, match="stitches.safetensors is missing"):
            load_stitches(pair, folder)


class TestKeepStitches:
    def test_the_model_then_computes_what_the_stitched_stage_does(self, pair: StitchedStage, folder: Path) -> None:
        model = vmoe(seed=3, stitch_size=STITCH_SIZE, pre_stitch_layers=[1], post_stitch_layers=[2])
        layers = model.vmoe.layers
        for layer in (1, 2):
            prefix = f"vmoe.layers.{layer}."
            own = {k.removeprefix(prefix): v for k, v in pair.stage.state_dict().items() if k.startswith(prefix)}
            layers[layer].load_state_dict(own, strict=False)
        keep_stitches(model, folder)
        hidden_states = torch.randn(3, 5, STITCH_SIZE)
        assert torch.equal(layers[2](layers[1](hidden_states)), pair(hidden_states)[0])

    @pytest.mark.parametrize(
        "places",
        [
            {},
            {"stitch_size": STITCH_SIZE, "pre_stitch_layers": [1], "post_stitch_layers": [1]},
            {"stitch_size": STITCH_SIZE, "pre_stitch_layers": [1], "post_stitch_layers": []},
            {"stitch_size": STITCH_SIZE + 1, "pre_stitch_layers": [1], "post_stitch_layers": [2]},
        ],
        ids=["none", "another_layer", "one_side", "another_width"],
    )
    def test_a_stitch_without_a_place_is_refused_with_what_to_set(self, folder: Path, places: dict) -> None:
        with pytest.raises(
            PairFileError, match="student has places for .* Set `pre_stitch_layers`, `post_stitch_layers`"
        ):
            keep_stitches(vmoe(**places), folder)

    def test_a_place_without_a_stitch_is_refused(self, tmp_path: Path) -> None:
        save_pair(StitchedStage(stage(index=0), STITCH_SIZE), tmp_path, STITCH_SIZE)
        model = vmoe(stitch_size=STITCH_SIZE, pre_stitch_layers=[0], post_stitch_layers=[0])
        before = snapshot(model)
        with pytest.raises(PairFileError, match="places for .*pre.linear.weight"):
            keep_stitches(model, tmp_path)
        assert_equal(model.state_dict(), before)

    def test_linear_stitches_have_no_place_in_a_model_with_layer_norms(self, tmp_path: Path) -> None:
        linear = StitchedStage(stage(), STITCH_SIZE, "linear")
        save_pair(linear, tmp_path, STITCH_SIZE)
        model = vmoe(stitch_size=STITCH_SIZE, pre_stitch_layers=[1], post_stitch_layers=[2])
        with pytest.raises(PairFileError, match="places for .*pre.layernorm.weight.*layernorm_linear"):
            keep_stitches(model, tmp_path)


class TestReadContract:
    def test_it_is_the_json_of_the_folder(self, folder: Path) -> None:
        assert read_contract(str(folder)) == json.loads((folder / "pair.json").read_text())

    def test_a_folder_that_is_none_of_a_pair_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PairFileError, match="no folder of a distilled pair"):
            read_contract(tmp_path)
