"""`m2mkd convert --to-official`: the official fixtures through our folders and back; or one message and nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_cases import Case
from official_files import config_file, left, save, with_stitches
from official_nac_cases import nac_case
from safetensors.torch import load_file
from testing_utils import assert_equal, nac, vit
from typer.testing import CliRunner, Result

from m2mkd import NACForImageClassification
from m2mkd.cli import app
from m2mkd.conversion.convert import convert
from m2mkd.conversion.official_models import without_aliases
from m2mkd.conversion.official_nac import nac_config
from m2mkd.conversion.to_official import to_official
from m2mkd.errors import ConversionError, StageError


CASES = {"nac": "nac_small_train", "vmoe": "vmoe_full", "vit": "incubated_vit"}
# The bias that our read-in does not have, since no output depends on it.
KEY_BIAS = "latent_graphs.0.read_in.read_in_attention.key_compiler.native_bias"


def case_of(kind: str) -> Case:
    return nac_case(CASES[kind]) if kind == "nac" else Case(CASES[kind])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "official.pth"


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    """The official weights as our folder."""
    case = case_of(kind)
    convert(kind, case.folder / "config.json", case.folder / "state_dict.safetensors", tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("kind", list(CASES))
class TestThereAndBack:
    def test_safetensors_hold_the_official_tensors(self, folder: Path, tmp_path: Path, kind: str) -> None:
        case, out = case_of(kind), tmp_path / "new" / "official.safetensors"
        said = to_official(kind, case.folder / "config.json", folder, out)
        assert said.endswith(f"M parameters is in {out}.")
        assert_equal(load_file(out), without_aliases(case.state_dict))
        assert [path.name for path in out.parent.iterdir()] == [out.name]

    def test_a_pth_has_the_layout_of_the_official_trainer(self, folder: Path, out: Path, kind: str) -> None:
        case = case_of(kind)
        to_official(kind, case.folder / "config.json", folder, out)
        content = torch.load(out, weights_only=True)
        plain = without_aliases(case.state_dict)
        assert_equal(without_aliases(content["model"]), plain)
        if kind == "nac":
            assert content.keys() == {"model"} and content["model"].keys() == plain.keys()
            return
        depths, stages = case.config["kwargs"]["divided_depths"], content["model_stages"]
        assert len(stages) == len(depths)
        aliases = {f"stages.{i}.{name}": value for i, stage in enumerate(stages) for name, value in stage.items()}
        # each tensor twice, and a second time in the file for none
        assert content["model"].keys() == plain.keys() | aliases.keys() and len(aliases) == len(plain)
        assert_equal({name: content["model"][name] for name in aliases}, aliases)
        assert {name.split(".")[1] for name in stages[1] if name.startswith("blocks.")} == {"0"}
        assert "pos_embed" in stages[0] and "head.weight" in stages[-1]
        assert out.stat().st_size < 1.5 * sum(value.nbytes for value in plain.values()) + 1e5

    def test_what_was_written_can_be_read_again(self, folder: Path, out: Path, kind: str) -> None:
        config = case_of(kind).folder / "config.json"
        to_official(kind, config, folder, out)
        convert(kind, config, out, out.with_name("again"))
        assert_equal(load_file(out.with_name("again") / "model.safetensors"), load_file(folder / "model.safetensors"))


class TestNAC:
    def test_the_bias_that_ours_does_not_have_is_zero(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_small_eval")
        config = case.folder / "config.json"
        convert("nac", config, case.folder / "state_dict.safetensors", tmp_path / "ours")
        to_official("nac", config, tmp_path / "ours", out)
        given = dict(case.state_dict)
        assert_equal(torch.load(out)["model"], {**given, KEY_BIAS: torch.zeros_like(given[KEY_BIAS])})

    @pytest.mark.parametrize(
        "modulation, head, tokenizer",
        [
            *(({"scale_normalization_type": name}, {}, {}) for name in ("l2", "none", "sigmoid", "tanh")),
            ({}, {"use_head": True, "output_dim": 7}, {"state_dim": 7, "output_dim": 11}),
        ],
    )
    def test_options_that_the_paper_does_not_use(
        self, tmp_path: Path, out: Path, modulation: dict[str, Any], head: dict[str, Any], tokenizer: dict[str, Any]
    ) -> None:
        kwargs = nac_case("nac_small_train").config["kwargs"]
        graph = kwargs["latent_graph_kwargs"]
        graph["mod_fc_kwargs"].update(modulation)
        graph["read_out_kwargs"].update(head)
        kwargs["output_tokenizer_kwargs"].update(tokenizer)
        config = config_file(tmp_path, {"kwargs": kwargs})
        model = NACForImageClassification(nac_config(kwargs))
        model.save_pretrained(tmp_path / "ours")
        to_official("nac", config, tmp_path / "ours", out)
        official = torch.load(out)["model"]
        assert ("latent_graphs.0.read_out.head.1.native_weight" in official) == bool(head)
        convert("nac", config, out, tmp_path / "again")
        assert_equal(load_file(tmp_path / "again" / "model.safetensors"), model.state_dict())
        # without the options it is another model
        plain = nac_case("nac_small_train").folder / "config.json"
        with pytest.raises(ConversionError, match="code_scale_normalization|unexpected: .*read_out.head"):
            to_official("nac", plain, tmp_path / "ours", out.with_name("other.pth"))

    def test_one_with_the_official_noise_in_evaluation(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_small_train")
        config = case.folder / "config.json"
        convert("nac", config, case.folder / "state_dict.safetensors", tmp_path / "ours")
        fields = json.loads((tmp_path / "ours" / "config.json").read_text())
        (tmp_path / "ours" / "config.json").write_text(json.dumps({**fields, "sample_in_eval": True}))
        to_official("nac", config, tmp_path / "ours", out)
        assert_equal(torch.load(out)["model"], case.state_dict)


class TestVMoE:
    def test_kept_stitches_go_along(self, tmp_path: Path, out: Path) -> None:
        case = Case("vmoe_full")
        tensors = with_stitches(case.state_dict)
        config, checkpoint = case.folder / "config.json", save(tmp_path / "stitched.pth", {"model": tensors})
        convert("vmoe", config, checkpoint, tmp_path / "ours")
        to_official("vmoe", config, tmp_path / "ours", out)
        assert_equal(without_aliases(torch.load(out)["model"]), tensors)


@pytest.mark.parametrize("kind", ["vmoe"])
class TestStrictness:
    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"num_heads": 2}, r"logits.*num_attention_heads \(4, described as 2\)"),
            ({"num_classes": 7}, "shape: head.weight is 10x32, must be 7x32"),
            ({"moe_pos": [1]}, "missing: blocks.3.mlp.fc1.weight"),
            ({"depth": 3, "window": 2}, "not known.*'window'"),
        ],
    )
    def test_arguments_of_another_model_are_refused(
        self, folder: Path, out: Path, kind: str, changes: dict[str, Any], said: str
    ) -> None:
        content = Case("vmoe_full").config
        config = config_file(out.parent, {**content, "kwargs": {**content["kwargs"], **changes}})
        with pytest.raises(ConversionError, match=said):
            to_official(kind, config, folder, out)
        assert left(out) == []

    def test_another_epsilon_is_another_model(self, folder: Path, out: Path, kind: str) -> None:
        config = config_file(out.parent, {**Case("vmoe_full").config, "norm_eps": 1e-5})
        with pytest.raises(ConversionError, match="layer_norm_eps"):
            to_official(kind, config, folder, out)

    def test_experts_that_the_official_code_does_not_choose(self, folder: Path, out: Path, kind: str) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "num_experts_per_tok": 1}))
        with pytest.raises(ConversionError, match="num_experts_per_tok"):
            to_official(kind, Case("vmoe_full").folder / "config.json", folder, out)

    def test_a_model_of_another_kind(self, tmp_path: Path, out: Path, kind: str) -> None:
        config = Case("vmoe_full").folder / "config.json"
        for other in (vit(), nac()):
            other.save_pretrained(tmp_path / "other")
            with pytest.raises(ConversionError, match=f"holds a {type(other).__name__}, but --kind vmoe is VMoE"):
                to_official(kind, config, tmp_path / "other", out)
        with pytest.raises(ConversionError, match="holds a NACForImageClassification, but --kind vit is ViT"):
            to_official("vit", config, tmp_path / "other", out)

    def test_a_folder_without_all_tensors_or_none(self, folder: Path, out: Path, kind: str) -> None:
        config = Case("vmoe_full").folder / "config.json"
        tensors = load_file(folder / "model.safetensors")
        save(
            folder / "model.safetensors", {name: value for name, value in tensors.items() if "classifier" not in name}
        )
        with pytest.raises(StageError, match="has no weights for classifier.bias"):
            to_official(kind, config, folder, out)
        with pytest.raises(StageError, match="There is no folder .*nothing, and it is not a valid Hub id"):
            to_official(kind, config, folder / "nothing", out)
        assert left(out) == []

    def test_a_file_that_is_there_is_left_alone(self, folder: Path, out: Path, kind: str) -> None:
        out.write_text("mine")
        with pytest.raises(ConversionError, match="already exists"):
            to_official(kind, Case("vmoe_full").folder / "config.json", folder, out)
        assert out.read_text() == "mine"

    def test_a_name_and_a_kind_that_are_not_possible(self, folder: Path, out: Path, kind: str) -> None:
        config = Case("vmoe_full").folder / "config.json"
        with pytest.raises(ConversionError, match="must end in .pth"):
            to_official(kind, config, folder, out.with_suffix(".npz"))
        with pytest.raises(ConversionError, match="'vmoe-jax'.*one of nac, vmoe, vit"):
            to_official("vmoe-jax", config, folder, out)


@pytest.mark.parametrize("kind", ["vit"])
class TestCommandLine:
    def cli(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["convert", "--to-official", *map(str, arguments)])

    def test_it_converts_and_says_where(self, folder: Path, out: Path, kind: str) -> None:
        config = Case("incubated_vit").folder / "config.json"
        done = self.cli("--kind", kind, "--config", config, folder, out)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("ViTForImageClassification of ") and out.is_file()
        again = self.cli("--kind", kind, "--config", config, folder, out)
        assert again.exit_code == 1 and "already exists" in again.output

    def test_a_stage_is_refused(self, folder: Path, out: Path, kind: str) -> None:
        config = Case("incubated_vit").folder / "config.json"
        done = self.cli("--kind", kind, "--config", config, "--stage", "1", folder, out)
        assert done.exit_code == 2 and not out.exists()
