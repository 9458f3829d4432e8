import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import assert_equal, images, randomized, snapshot, vmoe
from transformers import AutoConfig

from m2mkd import split_into_stages
from m2mkd.distillation.pair_folder import (
    keep_stitches,
    load_stage,
    load_stitches,
    match_pairs,
    read_contract,
    save_pair,
    tensors_sha256,
    unknown_networks,
)
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_student import StitchedStage
from m2mkd.errors import PairFileError


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
            "stitches": {
                "post.linear.bias": [12],
                "post.linear.weight": [12, 16],
                "post.layernorm.bias": [16],
                "post.layernorm.weight": [16],
                "pre.linear.bias": [16],
                "pre.linear.weight": [16, 12],
                "pre.layernorm.bias": [12],
                "pre.layernorm.weight": [12],
            },
            "teacher_sha256": None,
            "meta_sha256": None,
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
        with pytest.raises(PairFileError, match=rf"`{field}` is .* in .*pair.json, but"):
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
        with pytest.raises(PairFileError, match="missing: .*q_proj.bias.*unexpected.*vmoe.layers.1.extra"):
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
        with pytest.raises(PairFileError, match="stitches.safetensors has .* but the pair's stitches are"):
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
        with pytest.raises(PairFileError, match="not the folder of a distilled pair"):
            read_contract(tmp_path)


class TestMatchPairs:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> list[Path]:
        """Three pairs of one distillation, last one first."""
        folders = [tmp_path / str(index) for index in (2, 1, 0)]
        for folder, index in zip(folders, (2, 1, 0), strict=True):
            save_pair(StitchedStage(stage(index), STITCH_SIZE), folder, STITCH_SIZE, "a" * 64, "b" * 64)
        return folders

    def change(self, path: Path, **fields: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def test_they_come_back_in_their_order(self, folders: list[Path]) -> None:
        assert match_pairs(folders) == folders[::-1]
        assert unknown_networks(folders) == []

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("num_pairs", 4),
            ("model_type", "nac"),
            ("hidden_size", 32),
            ("stitch_size", 13),
            ("teacher_sha256", "c" * 64),
            ("meta_sha256", "c" * 64),
        ],
    )
    def test_a_contract_of_another_student_is_refused(self, folders: list[Path], field: str, value: object) -> None:
        self.change(folders[1] / "pair.json", **{field: value})
        with pytest.raises(PairFileError, match=rf"`{field}` is .* in {folders[0]}/pair.json .* in {folders[1]}/pair"):
            match_pairs(folders)

    def test_so_is_another_student_s_configuration(self, folders: list[Path]) -> None:
        self.change(folders[2] / "config.json", num_experts=8, transformers_version="1")
        with pytest.raises(PairFileError, match=f"`num_experts` is 4 in {folders[0]}/config.json and 8 in"):
            match_pairs(folders)

    def test_and_other_pixels(self, folders: list[Path]) -> None:
        (folders[0] / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        (folders[2] / "preprocessor_config.json").write_text('{"image_mean": [0.4]}')
        with pytest.raises(PairFileError, match="`image_mean`"):
            match_pairs(folders)

    def test_every_place_is_taken_once(self, folders: list[Path]) -> None:
        with pytest.raises(PairFileError, match=r"missing: \[1\]"):
            match_pairs([folders[0], folders[2]])
        self.change(folders[0] / "pair.json", index=1)
        with pytest.raises(
            PairFileError, match=f"{folders[0]}/pair.json and {folders[1]}/pair.json both have `index` 1"
        ):
            match_pairs(folders)
        self.change(folders[0] / "pair.json", index=7)
        with pytest.raises(PairFileError, match=r"pairs are \[0, 1, 7\]"):
            match_pairs(folders)
        with pytest.raises(PairFileError, match="no pair"):
            match_pairs([])

    def test_stages_cut_in_another_way_do_not_join(self, folders: list[Path]) -> None:
        self.change(folders[1] / "pair.json", layers=[1])
        with pytest.raises(PairFileError, match=f"`layers` in {folders[1]}/pair.json end with 1"):
            match_pairs(folders)

    def test_an_unknown_network_is_said_and_no_contradiction(self, folders: list[Path]) -> None:
        self.change(folders[1] / "pair.json", teacher_sha256=None)
        assert match_pairs(folders) == folders[::-1]
        (said,) = unknown_networks(folders)
        assert str(folders[1]) in said and "teacher" in said

    @pytest.mark.parametrize("fields", [{"index": "1"}, {"layers": []}, {"num_pairs": None}])
    def test_a_damaged_contract_is_refused(self, folders: list[Path], fields: dict[str, object]) -> None:
        self.change(folders[1] / "pair.json", **fields)
        with pytest.raises(PairFileError, match="is damaged"):
            match_pairs(folders)


class TestTensorsSha256:
    def test_it_is_of_types_shapes_and_values(self) -> None:
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16)}
        others = [
            {**tensors, "a": tensors["a"].reshape(3, 2)},
            {**tensors, "a": tensors["a"].int()},
            {**tensors, "a": tensors["a"] + 1e-6},
            {"a": tensors["a"]},
        ]
        hashes = {tensors_sha256(item) for item in [tensors, *others]}
        assert len(hashes) == 5
        # neither names nor order nor memory matter
        again = {"c": tensors["b"], "a": tensors["a"].T.contiguous().T}
        assert tensors_sha256(again) == tensors_sha256(tensors)

    def test_what_is_not_there_has_none(self) -> None:
        assert tensors_sha256({"a": torch.empty(2, device="meta")}) is None
