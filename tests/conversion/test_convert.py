"""`m2mkd convert`: official checkpoints in, folders out that the Auto classes load; or one message and nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from official_cases import Case, assert_close, stage_of, student_model, student_names, vit_stage
from official_files import config_file, left, save, with_stitches
from official_nac_cases import nac_case
from PIL import Image
from safetensors.torch import load_file
from testing_utils import assert_equal
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification, pipeline
from typer.testing import CliRunner, Result

from m2mkd import NACConfig, NACForImageClassification, VMoEForImageClassification, split_into_stages
from m2mkd.cli import app
from m2mkd.conversion.convert import convert
from m2mkd.conversion.nac_kinds import graph_loss_fields
from m2mkd.conversion.official_models import transformer_to_ours, without_aliases
from m2mkd.conversion.official_nac import convert_nac_student
from m2mkd.conversion.official_pixels import M2MKD_PIXELS
from m2mkd.data.processing import pixels_of_processor
from m2mkd.distillation.pair_folder import load_stage, load_stitches, read_contract
from m2mkd.distillation.stitched_student import StitchedStage
from m2mkd.errors import ConversionError, WriteError
from m2mkd.evaluation.saved_model import load_for_evaluation
from m2mkd.modeling import modeling_nac


NAC_ROLES = ["readin", "mediator", "readout"]
# What the official trainers save beside the model.
TRAINING_STATE = {
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "lr_scheduler": {"base_values": [0.1], "noise_range_t": None},
    "epoch": 99,
    "scaler": {"scale": 65536.0},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "converted"


class TestNAC:
    def layouts(self, state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "bare.pth": state_dict,
            "bare.safetensors": state_dict,
            "finished_checkpoint.pth": {"model": state_dict, "model_stages": [], **TRAINING_STATE},
            "checkpoint_best.pt": {
                "model": state_dict,
                "model_ema": None,
                **TRAINING_STATE,
                "best_acc1": 0.6,
                "step": 7,
                "current_val_stats": {"acc1": 0.6},
                "current_ood_stats": {},
            },
        }

    @pytest.mark.parametrize("name", ["bare.pth", "bare.safetensors", "finished_checkpoint.pth", "checkpoint_best.pt"])
    def test_every_layout_loads_with_the_official_logits(
        self, tmp_path: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("signatures were fitted")

        monkeypatch.setattr(modeling_nac, "signatures_for", refuse)
        case = nac_case("nac_small_eval")
        checkpoint = save(tmp_path / name, self.layouts(case.state_dict)[name])
        said = convert("nac", case.folder / "config.json", checkpoint, out)
        assert said == f"NACForImageClassification of 0.0 M parameters is in {out}."
        model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
        assert type(model) is NACForImageClassification and not any(info.values()), info
        with torch.no_grad():
            assert_close(model(case.inputs["pixel_values"]).logits, case.outputs["noise_free.logits"], "logits")
        assert model.config.graph_prior == "planted_partition"
        assert (model.config.graph_prior_truncation, model.config.kernel_truncation) == (0.8, 0.9)
        files = ["config.json", "model.safetensors", "preprocessor_config.json"]
        assert sorted(path.name for path in out.iterdir()) == files

    def test_the_official_yaml_brings_the_losses_of_the_graph(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_small_eval")
        regulariser = {"use": True, "type": "signature_hinge_repulsion", "hinge": 0.3, "weight": 0.2}
        content = {
            "criterion": {"graph_sparsity": regulariser, "label_smoothing": 0.1},
            "model": {"kwargs": case.config["kwargs"], "name": "NeuralCompiler"},
            "optimizer": {"name": "AdamW"},
        }
        path = config_file(tmp_path, content, "nac.yml")
        convert("nac", path, case.folder / "state_dict.safetensors", out)
        config = NACForImageClassification.from_pretrained(out).config
        assert (config.signature_repulsion_coef, config.signature_repulsion_hinge) == (0.2, 0.3)

    @pytest.mark.parametrize(
        "loss, fields",
        [
            ({}, {}),
            ({"use": False, "hinge": 0.4}, {}),
            (
                {
                    "use": True,
                    "type": "stochastic_block_model_regularization",
                    "kwargs": {
                        "num_clusters": 8,
                        "p_in": 0.9,
                        "p_out": 0.2,
                        "regularize_input_latents": False,
                        "regularize_mediator_latents": True,
                        "regularize_output_latents": False,
                    },
                },
                {
                    "block_model_coef": 1.0,
                    "block_model_num_clusters": 8,
                    "block_model_p_in": 0.9,
                    "block_model_p_out": 0.2,
                },
            ),
        ],
    )
    def test_losses_of_the_graph(self, loss: dict[str, Any], fields: dict[str, Any]) -> None:
        assert graph_loss_fields({"graph_sparsity": loss}) == fields

    @pytest.mark.parametrize(
        "loss, said",
        [
            ({"type": "signature_distribution_regularization"}, "is not known"),
            ({"type": "stochastic_block_model_regularization"}, "mediators only"),
            ({"hinge": 0.4, "kwargs": {"reduction": "mean"}}, "reduction` is 'mean'"),
            ({"hinge": 0.4, "power": 2}, "criterion.graph_sparsity.power"),
            ({}, "hinge` is missing"),
        ],
    )
    def test_losses_that_we_do_not_have_are_named(self, loss: dict[str, Any], said: str) -> None:
        with pytest.raises(ConversionError, match=said):
            graph_loss_fields({"graph_sparsity": {"use": True, **loss}})


class TestNACStudents:
    @pytest.mark.parametrize("role", NAC_ROLES)
    def test_a_student_becomes_a_pair_s_folder(self, out: Path, role: str) -> None:
        case = nac_case(f"nac_student_{role}")
        checkpoint = case.folder / "state_dict.safetensors"
        convert("nac-student", case.folder / "config.json", checkpoint, out, num_stages=4)
        index = {"readin": 0, "mediator": 1, "readout": 3}[role]
        tensors, stitches = convert_nac_student(case.state_dict, index, 4)
        assert_equal(load_file(out / "model.safetensors"), tensors)
        assert_equal(load_file(out / "stitches.safetensors"), stitches)
        assert read_contract(out) == {
            "index": index, "num_pairs": 4, "layers": [index], "model_type": "nac", "hidden_size": 48,
            "stitch_size": 56, "stitches": {name: list(tensor.shape) for name, tensor in stitches.items()},
            # the official files do not say
            "teacher_sha256": None, "meta_sha256": None,
        }  # fmt: skip

        model = AutoModelForImageClassification.from_pretrained(out)
        assert type(model) is NACForImageClassification and model.config.num_hidden_layers == 2
        assert_equal({name: model.state_dict()[name] for name in tensors}, tensors)
        fresh = NACForImageClassification(model.config)
        stage = split_into_stages(fresh, [1] * 4)[index].distilled()
        assert load_stage(stage, out) == []
        assert_equal(stage.state_dict(), tensors)

    def test_a_read_out_whose_head_is_pooled(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_student_readout")
        share, own = case.config["share_kwargs"], case.config["role_kwargs"]
        sizes = {"use_head": True, "pre_output_layernorm": True, "output_dim": 7}
        own = {**own, **sizes, "tokenizer_kwargs": {"softmax_type": "vanilla", "state_dim": 7, "output_dim": 11}}
        head = {
            "head.0.module.weight": (48,),
            "head.0.module.bias": (48,),
            "head.1.native_weight": (7, 48),
            "head.1.native_bias": (7,),
            "head.1.scale.weight": (48, 32),
            "head.1.scale_gain": (),
            "tokenizer.confidence_scorer.weight": (1, 7),
            "tokenizer.confidence_scorer.bias": (1,),
            "tokenizer.to_logits.weight": (11, 7),
            "tokenizer.to_logits.bias": (11,),
        }
        tensors = {**case.state_dict, **{name: torch.randn(shape) for name, shape in head.items()}}
        checkpoint = save(tmp_path / "ReadOutStudent.pth", {"model": tensors})
        config = config_file(tmp_path, {"share_kwargs": share, "readout": own, "stitch_dim": 56})
        convert("nac-student", config, checkpoint, out, num_stages=4)
        model = NACForImageClassification.from_pretrained(out)
        assert (model.config.latent_head_size, model.config.num_labels) == (7, 11)
        stage = split_into_stages(model, [1] * 4)[3].distilled()
        assert load_stage(stage, out) == []
        # before the head it is the student of the case
        plain, _ = convert_nac_student(case.state_dict, 3, 4)
        assert_equal({name: value for name, value in stage.state_dict().items() if "read_out" in name}, {
            name: value for name, value in plain.items() if "read_out" in name
        })  # fmt: skip
        states, codes, norm = torch.randn(3, 2, 48), torch.randn(2, 32), nn.functional.layer_norm
        inputs = norm(states, (48,), tensors["head.0.module.weight"], tensors["head.0.module.bias"])
        scale = tensors["head.1.scale_gain"] * norm(codes @ tensors["head.1.scale.weight"].T, (48,)) + 1
        latents = (inputs * scale) @ tensors["head.1.native_weight"].T + tensors["head.1.native_bias"]
        weights = (latents @ tensors["tokenizer.confidence_scorer.weight"][0]).softmax(-1)
        pooled = (latents * weights[..., None]).sum(1)
        expected = pooled @ tensors["tokenizer.to_logits.weight"].T + tensors["tokenizer.to_logits.bias"]
        with torch.no_grad():
            assert_close(model.classify(states, codes), expected, "logits")

    @pytest.fixture
    def official_yaml(self, tmp_path: Path) -> Path:
        configs = {role: nac_case(f"nac_student_{role}").config for role in NAC_ROLES}
        content = {role: config["role_kwargs"] for role, config in configs.items()}
        return config_file(tmp_path, {"share_kwargs": configs["readin"]["share_kwargs"], **content}, "student.yml")

    @pytest.mark.parametrize(
        "name, role, options, index, num_stages",
        [
            ("ReadInStudent.pth", "readin", {}, 0, 10),
            ("MediatorStudent_3.pth", "mediator", {}, 3, 10),
            ("MediatorStudent_8.pth", "mediator", {}, 8, 10),
            ("ReadOutStudent.pth", "readout", {}, 9, 10),
            ("finished_checkpoint.pth", "mediator", {"stage": 2}, 2, 10),
            ("finished_checkpoint.pth", "readout", {"stage": 4, "num_stages": 5}, 4, 5),
        ],
    )
    def test_the_file_s_name_or_an_option_says_which_one_it_is(
        self,
        tmp_path: Path,
        out: Path,
        official_yaml: Path,
        name: str,
        role: str,
        options: dict[str, int],
        index: int,
        num_stages: int,
    ) -> None:
        state_dict = nac_case(f"nac_student_{role}").state_dict
        checkpoint = save(tmp_path / name, {"model": state_dict, "model_stages": [], **TRAINING_STATE})
        said = convert("nac-student", official_yaml, checkpoint, out, **options)
        assert said.startswith(f"Stage {index} of {num_stages} ")
        contract = read_contract(out)
        assert (contract["index"], contract["num_pairs"], contract["stitch_size"]) == (index, num_stages, 56)
        config = AutoModelForImageClassification.from_pretrained(out).config
        # one configuration for all of them
        assert (config.num_hidden_layers, config.image_size, config.num_labels) == (num_stages - 2, 32, 10)

    def test_a_mediator_of_no_number_is_taken_for_the_first_and_it_is_said(self, out: Path) -> None:
        case = nac_case("nac_student_mediator")
        said = convert("nac-student", case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        assert read_contract(out)["index"] == 1 and "taken for the first mediator" in said

    @pytest.mark.parametrize(
        "name, options, said",
        [
            ("finished_checkpoint.pth", {}, "Give --stage"),
            ("finished_checkpoint.pth", {"stage": 10}, "no stage 10 of 10"),
            ("MediatorStudent_3.pth", {"num_stages": 3}, "no stage 3 of 3"),
            ("MediatorStudent_3.pth", {"num_stages": 2}, "--num-stages must be at least 3"),
            ("ReadInStudent.pth", {}, "unexpected: latent_attention.exit_layer.native_bias"),
            ("MediatorStudent_9.pth", {}, "missing: tokenizer.to_logits.weight"),
        ],
    )
    def test_another_place_than_the_student_s_is_refused(
        self, tmp_path: Path, out: Path, official_yaml: Path, name: str, options: dict[str, int], said: str
    ) -> None:
        checkpoint = save(tmp_path / name, {"model": nac_case("nac_student_mediator").state_dict})
        with pytest.raises(ConversionError, match=said):
            convert("nac-student", official_yaml, checkpoint, out, **options)
        assert left(out) == []

    def test_a_role_that_the_configuration_lacks_is_named(self, out: Path) -> None:
        case = nac_case("nac_student_mediator")
        with pytest.raises(ConversionError, match=r"stage 0 of 10 is a readin.*\['mediator'\] only"):
            convert("nac-student", case.folder / "config.json", case.folder / "state_dict.safetensors", out, stage=0)


class TestVMoE:
    def test_a_checkpoint_with_aliases_loads_with_the_official_logits(self, tmp_path: Path, out: Path) -> None:
        case = Case("vmoe_full")
        plain = without_aliases(case.state_dict)
        twice = {**plain, **{f"stages.0.{name}": tensor for name, tensor in plain.items()}}
        checkpoint = save(tmp_path / "checkpoint-99.pth", {"model": twice, "model_stages": [], **TRAINING_STATE})
        convert("vmoe", case.folder / "config.json", checkpoint, out)
        model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
        assert type(model) is VMoEForImageClassification and not any(info.values()), info
        with torch.no_grad():
            assert_close(model(case.inputs["input"]).logits, case.outputs["output"], "logits")

    @pytest.mark.parametrize("is_said", [True, False])
    def test_kept_stitches_survive(self, tmp_path: Path, out: Path, is_said: bool) -> None:
        case = Case("vmoe_full")
        state_dict = with_stitches(case.state_dict)
        stitches = {"pre_stitch_pos": [2], "post_stitch_pos": [1], "stitch_dim": 40} if is_said else {}
        content = {**case.config, "kwargs": {**case.config["kwargs"], **stitches}}
        checkpoint = save(tmp_path / "vmoe.pth", {"model": state_dict})
        convert("vmoe", config_file(tmp_path, content), checkpoint, out)
        model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        config = model.config
        assert (config.stitch_size, config.pre_stitch_layers, config.post_stitch_layers) == (40, [2], [1])
        stitch = model.vmoe.layers[1].post_stitch
        assert torch.equal(stitch.linear.weight, state_dict["blocks.1.post_stitch.fc.weight"])
        assert torch.equal(stitch.layernorm.bias, state_dict["blocks.1.post_stitch.ln.bias"])
        hidden_states = model(case.inputs["input"], output_hidden_states=True).hidden_states
        assert [h.shape[-1] for h in hidden_states] == [32, 32, 40, 32, 32]

    def test_stitches_elsewhere_than_said_are_listed(self, tmp_path: Path, out: Path) -> None:
        case = Case("vmoe_full")
        kwargs = {**case.config["kwargs"], "pre_stitch_pos": [3], "post_stitch_pos": [1], "stitch_dim": 40}
        config = config_file(tmp_path, {**case.config, "kwargs": kwargs})
        checkpoint = save(tmp_path / "vmoe.pth", with_stitches(case.state_dict))
        with pytest.raises(ConversionError) as error:
            convert("vmoe", config, checkpoint, out)
        for part in ("ln.weight", "ln.bias", "fc.weight", "fc.bias"):
            assert f"missing: blocks.3.pre_stitch.{part}" in str(error.value)
            assert f"unexpected: blocks.2.pre_stitch.{part}" in str(error.value)
        assert "post_stitch" not in str(error.value)

    @pytest.mark.parametrize("name", ["vmoe_student_first", "vmoe_student_middle", "vmoe_student_last"])
    def test_a_student_becomes_a_pair_s_folder(self, tmp_path: Path, out: Path, name: str) -> None:
        case = Case(name)
        kwargs = case.config["kwargs"]
        content = {"model": case.state_dict, "model_stages": [case.state_dict], **TRAINING_STATE}
        checkpoint = save(tmp_path / "finished_checkpoint.pth", content)
        convert("vmoe-student", case.folder / "config.json", checkpoint, out, num_stages=3)
        model, index = student_model(kwargs, case.config["norm_eps"])
        pair = StitchedStage(stage_of(model, kwargs, index), kwargs["stitch_dim"])
        assert load_stage(pair.stage, out) == []
        load_stitches(pair, out)
        assert_equal(pair.state_dict(), student_names(kwargs, case.state_dict))
        with torch.no_grad():
            assert_close(pair.eval()(case.inputs["input"])[0], case.outputs["output"], "output")
        assert type(AutoModelForImageClassification.from_pretrained(out)) is VMoEForImageClassification

    def test_a_student_of_the_paper_is_one_of_four(self, out: Path) -> None:
        case = Case("vmoe_student_last")
        convert("vmoe-student", case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        contract = read_contract(out)
        assert (contract["index"], contract["num_pairs"], contract["layers"]) == (3, 4, [6, 7])

    def test_a_student_in_another_student_s_place_is_refused(self, out: Path) -> None:
        case = Case("vmoe_student_middle")
        with pytest.raises(ConversionError, match="missing: head.weight 10x32"):
            convert("vmoe-student", case.folder / "config.json", case.folder / "state_dict.safetensors", out, stage=3)


class TestViT:
    def stages(self, state_dict: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """`model_stages` of the incubated ViT, whose depths are 2, 1, 2."""
        stages: list[dict[str, torch.Tensor]] = [{}, {}, {}]
        for name, tensor in without_aliases(state_dict).items():
            if name.startswith("blocks."):
                _, block, rest = name.split(".", 2)
                stage = (0, 0, 1, 2, 2)[int(block)]
                stages[stage][f"blocks.{int(block) - (0, 2, 3)[stage]}.{rest}"] = tensor
            else:
                stages[2 if name.startswith(("norm", "head")) else 0][name] = tensor
        return stages

    @pytest.mark.parametrize("layout", ["model", "model_stages", "bare"])
    def test_it_loads_with_the_official_logits(self, tmp_path: Path, out: Path, layout: str) -> None:
        case = Case("incubated_vit")
        content = {
            "model": {"model": case.state_dict, "model_stages": self.stages(case.state_dict), **TRAINING_STATE},
            "model_stages": {"model_stages": self.stages(case.state_dict)},
            "bare": case.state_dict,
        }[layout]
        convert("vit", case.folder / "config.json", save(tmp_path / "vit.pth", content), out)
        model, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
        assert type(model) is ViTForImageClassification and not any(info.values()), info
        with torch.no_grad():
            assert_close(model(case.inputs["pixel_values"]).logits, case.outputs["logits"], "logits")

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_a_stage_of_a_split_teacher(self, tmp_path: Path, out: Path, index: int) -> None:
        case = Case(["m2mkd_vmoe_0", "m2mkd_vmoe_1", "m2mkd_vmoe_last"][index])
        official, kwargs = case.teacher_block_state_dict, case.config["teacher"]
        block = {
            "model_name": "vit_tiny",
            "block_index": index,
            "block_state_dict": official,
            "divided_depths": [2, 1, 2],
        }
        own = ("norm_eps", "block_index", "start", "end")
        arguments = {name: value for name, value in kwargs.items() if name not in own}
        config = config_file(tmp_path, {"kwargs": arguments, "norm_eps": 1e-6}, "teacher.yaml")
        convert("vit", config, save(tmp_path / f"vit_{index}.pth", block), out)
        stage = vit_stage(kwargs, 1e-6, index, official)
        assert_equal(load_file(out / "model.safetensors"), stage.state_dict())
        assert load_file(out / "stitches.safetensors") == {}
        contract = read_contract(out)
        assert (contract["index"], contract["layers"]) == (index, [[0, 1], [2], [3, 4]][index])
        assert (contract["model_type"], contract["stitch_size"]) == ("vit", 40)
        model = AutoModelForImageClassification.from_pretrained(out)
        assert load_stage(split_into_stages(model, [2, 1, 2])[index], out) == []

    @pytest.mark.parametrize("layout", ["model_stages", "bare"])
    def test_one_stage_can_be_taken_from_a_whole_checkpoint(self, tmp_path: Path, out: Path, layout: str) -> None:
        case = Case("incubated_vit")
        stages = self.stages(case.state_dict)
        content = {"model": case.state_dict, "model_stages": stages} if layout == "model_stages" else stages[2]
        convert("vit", case.folder / "config.json", save(tmp_path / "meta.pth", content), out, stage=2)
        assert_equal(load_file(out / "model.safetensors"), transformer_to_ours("vit", stages[2], layer_offset=3))

    @pytest.mark.parametrize(
        "content, options, said",
        [
            ({"block_index": 1, "block_state_dict": {}}, {"stage": 2}, "--stage is 2, but.* stage 1"),
            ({"block_index": 5, "block_state_dict": {}}, {}, "no stage 5; the depths"),
            ({"block_index": 0, "block_state_dict": {}, "divided_depths": [2, 2]}, {}, r"depths are \[2, 2\]"),
            ({"block_index": 0, "block_state_dict": {}}, {}, "missing: cls_token 1x1x32"),
            ({"model_stages": [{}, {}]}, {}, "2 `model_stages` for the depths"),
            ({"model": [1]}, {}, "`model`.*is not a state dict, but a list"),
            ({"model_stages": [1]}, {}, "not a list of state dicts"),
            ({"model": {}}, {"stage": 3}, "no stage 3"),
            ([1, 2], {}, "must hold a state dict, but holds a list"),
        ],
    )
    def test_a_layout_that_does_not_fit_is_explained(
        self, tmp_path: Path, out: Path, content: Any, options: dict[str, int], said: str
    ) -> None:
        case = Case("incubated_vit")
        with pytest.raises(ConversionError, match=said):
            convert("vit", case.folder / "config.json", save(tmp_path / "x.pth", content), out, **options)
        assert left(out) == []

    def test_the_epsilon_has_to_be_said(self, tmp_path: Path, out: Path) -> None:
        case = Case("incubated_vit")
        config = config_file(tmp_path, {"kwargs": case.config["kwargs"]})
        with pytest.raises(ConversionError, match="no `norm_eps`.*1e-5 in ViT-Huge"):
            convert("vit", config, case.folder / "state_dict.safetensors", out)


class Code:
    """A pickle of it calls a function when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


class TestStrictness:
    def test_every_wrong_tensor_is_in_one_message_and_nothing_is_written(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_small_eval")
        tensors = dict(case.state_dict)
        missing = ["latent_graphs.0.read_out.ffn.ffn.2.native_bias", "input_tokenizer.positional_grid.grid"]
        for name in missing:
            del tensors[name]
        tensors["latent_graphs.0.stitch_norm.weight"] = torch.rand(3)
        tensors["module.extra"] = torch.rand(2, 2)
        tensors["output_tokenizer.to_logits.weight"] = torch.rand(7, 24)
        checkpoint = save(tmp_path / "nac.pth", {"model": tensors})
        with pytest.raises(ConversionError) as error:
            convert("nac", case.folder / "config.json", checkpoint, out)
        text = str(error.value)
        assert "5 of its tensors do not fit" in text and str(checkpoint) in text
        for name in missing:
            assert f"missing: {name} " in text
        assert "unexpected: latent_graphs.0.stitch_norm.weight 3" in text and "unexpected: module.extra 2x2" in text
        assert "shape: output_tokenizer.to_logits.weight is 7x24, must be 5x24" in text
        assert left(out) == []

    def test_a_bias_of_keys_that_the_configuration_rules_out_is_unexpected(self, tmp_path: Path, out: Path) -> None:
        case = nac_case("nac_small_train")
        name = "latent_graphs.0.read_in.read_in_attention.key_compiler.native_bias"
        checkpoint = save(tmp_path / "nac.pth", {**case.state_dict, name: torch.rand(24)})
        with pytest.raises(ConversionError, match=f"unexpected: {name} 24"):
            convert("nac", case.folder / "config.json", checkpoint, out)

    def test_a_folder_that_holds_something_is_left_alone(self, out: Path) -> None:
        case = nac_case("nac_small_eval")
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(ConversionError, match="not empty"):
            convert("nac", case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        assert [path.name for path in out.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_is_filled(self, out: Path) -> None:
        case = nac_case("nac_small_eval")
        out.mkdir()
        convert("nac", case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        assert left(out) == ["converted"] and (out / "model.safetensors").is_file()

    def test_a_write_that_fails_leaves_nothing(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Any, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise OSError("No space left on device")

        monkeypatch.setattr(NACForImageClassification, "save_pretrained", fail)
        case = nac_case("nac_small_eval")
        with pytest.raises(WriteError, match="No space left"):
            convert("nac", case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        assert left(out) == []

    def test_a_pickle_with_code_is_refused_and_not_run(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        case = nac_case("nac_small_eval")
        checkpoint = save(tmp_path / "nac.pth", {"model": case.state_dict, "args": Code()})
        with pytest.raises(ConversionError, match="nothing in it is executed"):
            convert("nac", case.folder / "config.json", checkpoint, out)
        assert not (tmp_path / "pwned").exists() and left(out) == []

    @pytest.mark.parametrize("name", ["nac.pth", "nac.pt", "nac.safetensors"])
    @pytest.mark.parametrize("size", [0, 20, 30000])
    def test_a_damaged_file_is_named(self, tmp_path: Path, out: Path, name: str, size: int) -> None:
        case = nac_case("nac_small_eval")
        checkpoint = save(tmp_path / name, case.state_dict)
        checkpoint.write_bytes(checkpoint.read_bytes()[:size])
        with pytest.raises(ConversionError, match=name):
            convert("nac", case.folder / "config.json", checkpoint, out)
        assert left(out) == []

    @pytest.mark.parametrize(
        "kind, text, said",
        [
            ("nac", "model: {name: x}", "no section `model.kwargs`; it has"),
            ("nac", "share_kwargs: {}", "no section `kwargs`"),
            ("nac", "- 1", "must hold sections, but is list"),
            ("nac", "model: [", "cannot be read"),
            ("nac", "model: {kwargs: {state_dim: 24}}", "`output_dim` is missing"),
            ("nac-student", "readin: {}", "no section `share_kwargs`"),
            ("vit", "norm_eps: 1.0e-6", "no section `kwargs`"),
            ("vit", "norm_eps: 1.0e-6\nkwargs: {}", "`divided_depths` is missing"),
            ("vmoe", "norm_eps: 1.0e-6\nkwargs: {divided_depths: [1], num_experts: 4}", "not known.*'num_experts'"),
            ("vmoe", "norm_eps: 1.0e-6\nkwargs: {divided_depths: [1], embed_dim: 13}", "`hidden_size`.*multiple"),
            ("vmoe", "norm_eps: 1.0e-6\nkwargs: {divided_depths: [1], img_size: 'large'}", "image_size"),
            ("vmoe-student", "norm_eps: 1.0e-6\nkwargs: {embed_dim: 8}", "divided_depths"),
        ],
    )
    def test_a_configuration_that_describes_nothing_is_explained(
        self, tmp_path: Path, out: Path, kind: str, text: str, said: str
    ) -> None:
        config = tmp_path / "config.yml"
        config.write_text(text)
        checkpoint = save(tmp_path / "model.pth", {"model": {"a": torch.rand(1)}})
        options = {"stage": 0} if kind.endswith("student") else {}
        with pytest.raises(ConversionError, match=said):
            convert(kind, config, checkpoint, out, **options)
        assert left(out) == []

    @pytest.mark.parametrize("name", ["config.json", "state_dict.safetensors"])
    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path, out: Path, name: str) -> None:
        folder = nac_case("nac_small_eval").folder
        files = {n: folder / n for n in ("config.json", "state_dict.safetensors")} | {name: tmp_path / name}
        with pytest.raises(ConversionError, match=name):
            convert("nac", files["config.json"], files["state_dict.safetensors"], out)

    def test_an_unknown_kind_is_refused_with_the_known_ones(self, out: Path) -> None:
        with pytest.raises(ConversionError, match="'deit'.*nac, nac-student, vmoe, vmoe-student, vit"):
            convert("deit", out, out, out)


class TestCommandLine:
    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["convert", *arguments])

    def test_it_converts_and_says_where(self, out: Path) -> None:
        folder = nac_case("nac_student_mediator").folder
        files = [str(folder / "state_dict.safetensors"), str(out)]
        options = ["--kind", "nac-student", "--config", str(folder / "config.json")]
        done = self.run(*options, "--stage", "2", "--num-stages", "4", *files)
        assert done.exit_code == 0, done.stderr
        assert "Stage 2 of 4 of a NACForImageClassification" in done.stdout and str(out) in done.stdout
        again = self.run(*options, *files)
        assert again.exit_code == 1
        assert again.stderr.startswith("Error: ") and "not empty" in again.stderr and "Traceback" not in again.stderr


class TestPixels:
    """What is written takes images as the code that it comes from does when it tests."""

    IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "resample": "bicubic"}

    @pytest.mark.parametrize(
        "kind, name", [("nac", "nac_small_train"), ("vmoe", "vmoe_full"), ("vit", "incubated_vit")]
    )
    def test_a_pipeline_and_the_evaluation_take_the_folder(self, out: Path, kind: str, name: str) -> None:
        case = nac_case(name)
        convert(kind, case.folder / "config.json", case.folder / "state_dict.safetensors", out)
        image = Image.new("RGB", (50, 40), "red")
        answer = pipeline("image-classification", model=str(out))(image)
        model, pixels = load_for_evaluation(out)
        assert answer[0]["label"] in model.config.id2label.values()
        # images of up to 32 pixels are not cropped
        assert model.config.image_size <= 32
        assert pixels == {"image_size": model.config.image_size, "center_crop": None, **self.IMAGENET}

    @pytest.mark.parametrize("size, short", [(224, 256), (64, 73)])
    def test_the_middle_of_larger_images_is_cut_out(self, size: int, short: int) -> None:
        said = M2MKD_PIXELS.processor(NACConfig(image_size=size)).to_dict()
        assert said["size"] == {"shortest_edge": short} and said["crop_size"] == {"height": size, "width": size}
        assert said["do_center_crop"] and said["do_normalize"] and said["rescale_factor"] == pytest.approx(1 / 255)

    def test_images_that_are_not_square_are_resized_as_a_whole(self) -> None:
        processor = M2MKD_PIXELS.processor(NACConfig(image_size=[64, 128]))
        pixel_values = processor(Image.new("RGB", (300, 90), "red"), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, 64, 128)

    @pytest.mark.parametrize(
        "kind, name", [("nac-student", "nac_student_readin"), ("vmoe-student", "vmoe_student_middle")]
    )
    def test_modules_have_one_too(self, out: Path, kind: str, name: str) -> None:
        case = nac_case(name)
        convert(kind, case.folder / "config.json", case.folder / "state_dict.safetensors", out, num_stages=3)
        pixels = pixels_of_processor(AutoImageProcessor.from_pretrained(out), "it")
        assert {name: pixels[name] for name in self.IMAGENET} == self.IMAGENET
