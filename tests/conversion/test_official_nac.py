import copy
import json
from typing import Any

import pytest
import torch
from official_nac_cases import SHARED, nac, nac_case
from testing_utils import assert_equal
from transformers import ViTForImageClassification

from m2mkd import NACConfig, NACForImageClassification, VMoEForImageClassification, split_into_stages
from m2mkd.conversion.official_models import (
    check_tensors,
    shapes_of,
    transformer_to_official,
    transformer_to_ours,
    vit_config,
    vmoe_config,
    without_aliases,
)
from m2mkd.conversion.official_nac import (
    convert_nac,
    convert_nac_student,
    nac_config,
    nac_student_shapes,
    nac_students_config,
    nac_to_official,
)
from m2mkd.errors import ConversionError


MODULATION = {"add_one_to_scale": True, "learnable_scale_gain": True, "scale_gain": 0.1}
HEADS = {"num_heads": 6, "head_dim": 64}
SHARE = {
    "state_dim": 384,
    "code_dim": 384,
    "layer_scale_initial_value": 0.1,
    "use_geglu": True,
    "qkv_bias_in_attention": False,
    "ffn_capacity_factor": 2.0,
    "mod_fc_kwargs": MODULATION,
}
ROLES: dict[str, dict[str, Any]] = {
    "readin": {
        **HEADS,
        "input_dim": 3,
        "tokenizer_kwargs": {
            "num_stages": 2,
            "capacity_preset": "tiny",
            "positional_grid_kwargs": {"dim": 64, "grid_size": [28, 28]},
        },
        "tokenizer_type": "ConvNeXtImageTokenizer",
        "include_residual_in_read_in_attention": True,
        "path_drop_prob": 0.0,
    },
    "mediator": {**HEADS, "path_drop_prob": 0.1, "latent_attention_kwargs": {"share_layernorm": True}},
    "readout": {
        **HEADS,
        "include_residual_in_latent_attention": False,
        "path_drop_prob": 0.0,
        "pre_output_layernorm": False,
        "output_dim": 1000,
        "use_head": False,
        "tokenizer_kwargs": {"softmax_type": "gumbel"},
        "tokenizer_type": "OutputLatentPooling",
    },
}
GRAPH = "latent_graph_kwargs"
KERNEL = f"{GRAPH}.propagator_kwargs.latent_attention_kwargs.kernel_kwargs"


def official(**changes: Any) -> dict[str, Any]:
    """Arguments of the NAC for Tiny-ImageNet; a change is given by its dotted path, with `__` for a dot."""
    kwargs: dict[str, Any] = {
        "input_dim": 3,
        "output_dim": 200,
        "state_dim": 384,
        "simplified_interface": True,
        "input_tokenizer_type": "ConvNeXtImageTokenizer",
        "input_tokenizer_kwargs": {
            "num_stages": 2,
            "positional_grid_kwargs": {"dim": 64, "grid_size": [8, 8]},
        },
        "latent_graph_type": "LatentGraph",
        "latent_graph_kwargs": {
            **{name: value for name, value in SHARE.items() if name != "state_dim"},
            **HEADS,
            "code_noise_scale": 0.05,
            "input_latent_kwargs": None,
            "mediator_latent_kwargs": {
                "graph_preset": "barabasi-albert",
                "graph_generator_kwargs": {"m": 2, "n": 256},
            },
            "num_input_latents": 64,
            "num_iterations": 8,
            "num_mediator_latents": 256,
            "num_output_latents": 64,
            "path_drop_prob": 0.1,
            "propagator_kwargs": {
                "latent_attention_kwargs": {
                    "kernel_kwargs": {
                        "stochastic_kernel": True,
                        "stochastic_sampling_temperature": 0.5,
                        "truncation": 0.9,
                    },
                    "kernel_type": "DotProductKernel",
                    "share_layernorm": True,
                }
            },
            "read_in_kwargs": {
                "include_residual_in_read_in_attention": True,
                "num_heads": 6,
                "path_drop_prob": 0.0,
            },
            "read_out_kwargs": {
                "include_residual_in_latent_attention": False,
                "path_drop_prob": 0.0,
                "pre_output_layernorm": False,
                "use_head": False,
            },
            "share_propagator_weights": False,
            "signature_dim": 64,
            "use_code_noise_in_latent_seeder": True,
        },
        "output_tokenizer_kwargs": {"softmax_type": "gumbel"},
        "output_tokenizer_type": "OutputLatentPooling",
    }
    return changed_at(kwargs, {path.replace("__", "."): value for path, value in changes.items()})


def changed_at(kwargs: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    kwargs = copy.deepcopy(kwargs)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = kwargs
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return kwargs


def on_meta(config: NACConfig) -> NACForImageClassification:
    with torch.device("meta"):
        return NACForImageClassification(config)


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


class TestNACConfig:
    def test_the_official_nac_for_tiny_imagenet_is_our_preset(self) -> None:
        ours, preset = nac_config(official()), NACConfig.from_preset("tiny_imagenet", num_labels=200)
        fields = {"graph_prior_truncation": 0.8, "signature_repulsion_coef": 0.0, "head_layernorm": False}
        assert {**preset.to_dict(), **fields} == ours.to_dict()

    def test_the_paper_s_graph_is_fitted_where_the_official_code_fits_it(self) -> None:
        config = nac_config(official())
        assert (config.graph_prior, config.graph_prior_kwargs) == ("barabasi_albert", {"m": 2})
        assert (config.fit_truncation, config.kernel_truncation) == (0.8, 0.9)
        plain = nac_config(official(latent_graph_kwargs__mediator_latent_kwargs=None))
        assert plain.graph_prior is None and plain.graph_prior_truncation is None

    @pytest.mark.parametrize(
        "path, value, field, expected",
        [
            (f"{KERNEL}.truncation_implementation", "masked", "kernel_truncation_type", "masked"),
            (f"{KERNEL}.truncation", None, "kernel_truncation", None),
            (f"{KERNEL}.initial_bandwidth", 0.5, "kernel_bandwidth", 0.5),
            (f"{KERNEL}.learnable_bandwidth", False, "learnable_bandwidth", False),
            (f"{GRAPH}.use_geglu", False, "use_geglu", False),
            (f"{GRAPH}.qkv_bias_in_attention", True, "qkv_bias", True),
            (f"{GRAPH}.use_latent_seeder", False, "use_latent_seeder", False),
            (f"{GRAPH}.code_noise_scale", None, "code_noise_scale", 0.0),
            (f"{GRAPH}.share_propagator_weights", True, "share_propagators", True),
            (f"{GRAPH}.enable_persistent_input_mediator_communication", False, "input_to_mediator", "first"),
            (f"{GRAPH}.disable_input_mediator_communication", True, "input_to_mediator", "none"),
            (f"{GRAPH}.enable_input_output_communication", False, "input_to_output", False),
            (f"{GRAPH}.latent_seeder_kwargs", {"use_state_noise": False}, "use_state_noise", False),
            (f"{GRAPH}.mod_fc_kwargs.learnable_scale_gain", False, "learnable_code_scale_gain", False),
            (f"{GRAPH}.read_out_kwargs.include_residual_in_latent_attention", True, "read_out_residual", True),
            *(
                (f"{GRAPH}.mod_fc_kwargs.scale_normalization_type", theirs, "code_scale_normalization", ours)
                for theirs, ours in {
                    "ln": "layer_norm",
                    "l2": "l2",
                    "none": "none",
                    "sigmoid": "sigmoid",
                    "tanh": "tanh",
                }.items()
            ),
            ("output_tokenizer_kwargs.softmax_type", "gumbel-hard", "pooling", "gumbel_hard"),
            ("output_tokenizer_kwargs.softmax_type", "vanilla", "pooling", "softmax"),
            ("output_tokenizer_kwargs.softmax_temperature", 2.0, "pooling_temperature", 2.0),
            ("input_tokenizer_kwargs.capacity_preset", "femto", "tokenizer_depths", [1, 0]),
            ("input_tokenizer_kwargs.positional_grid_kwargs.grid_size", [8, 4], "image_size", [64, 32]),
        ],
        ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else None,
    )
    def test_an_option_has_its_field(self, path: str, value: Any, field: str, expected: Any) -> None:
        kwargs = changed_at(official(), {path: value})
        if value is None and "truncation" in path:
            kwargs[GRAPH]["mediator_latent_kwargs"] = None  # a graph needs one
        assert getattr(nac_config(kwargs), field) == expected

    @pytest.mark.parametrize(
        "path, value, said",
        [
            ("depth", 3, "not known.*'depth'"),
            (f"{GRAPH}.mod_fc_kwargs.rank", 3, "latent_graph_kwargs.mod_fc_kwargs.rank"),
            (f"{KERNEL}.use_gumbel_along_functions", True, "kernel_kwargs.use_gumbel_along_functions` is True"),
            (f"{GRAPH}.read_in_cls", "ProjectionReadIn", "read_in_cls` is 'ProjectionReadIn'"),
            (f"{GRAPH}.mediator_latent_kwargs.graph_preset", "star", "graph_preset` is 'star'"),
            (f"{GRAPH}.mediator_latent_kwargs.graph_generator_kwargs.n", 255, "not the number of mediators"),
            (f"{GRAPH}.read_in_kwargs.num_heads", 3, "read_in_kwargs.num_heads` is 3"),
            (
                f"{GRAPH}.mod_fc_kwargs.scale_normalization_type",
                "max",
                "scale_normalization_type` is 'max'; known are",
            ),
            (f"{GRAPH}.read_out_kwargs.use_head", True, "given 200 channels, but its.*state_dim` is 384"),
            ("output_tokenizer_kwargs.state_dim", 200, "use_head` is False.*given 384 channels.*is 200"),
            ("output_tokenizer_type", "FirstSlotAsLogits", "output_tokenizer_kwargs.softmax_type"),
            (f"{GRAPH}.num_iterations", None, "latent_graph_kwargs.num_iterations` is missing"),
            ("state_dim", None, "state_dim` is missing"),
            ("output_tokenizer_kwargs.softmax_type", "sparsemax", "softmax_type` is 'sparsemax'"),
            ("output_tokenizer_type", "Mean", "'Mean' cannot be converted"),
            ("input_tokenizer_kwargs.capacity_preset", "zetta", "capacity_preset` is 'zetta'"),
            ("input_tokenizer_kwargs", [1], "input_tokenizer_kwargs` must be a section"),
            ("stitch_dim", 1280, "stitch_dim` is 1280"),
        ],
    )
    def test_what_cannot_be_expressed_is_named(self, path: str, value: Any, said: str) -> None:
        with pytest.raises(ConversionError, match=said):
            nac_config(changed_at(official(), {path: value}))

    def test_overrides_win(self) -> None:
        assert nac_config(official(), num_hidden_layers=2).num_hidden_layers == 2


class TestOutput:
    """Head and output tokenizer; each of them may say its own sizes."""

    @pytest.mark.parametrize(
        "head, tokenizer, expected",
        [
            ({"use_head": False}, {"output_dim": 7}, ("gumbel", None, 7)),
            ({"use_head": False}, {"state_dim": 384, "output_dim": 7}, ("gumbel", None, 7)),
            ({"use_head": True}, {"state_dim": 200}, ("gumbel", 200, 200)),
            ({"use_head": True, "output_dim": 9}, {"state_dim": 9, "output_dim": 7}, ("gumbel", 9, 7)),
            ({"use_head": True}, None, ("first", None, 200)),
            ({"use_head": True, "output_dim": 9}, None, ("first", None, 9)),
        ],
    )
    @pytest.mark.parametrize("is_student", [False, True])
    def test_sizes(
        self, head: dict[str, Any], tokenizer: dict[str, Any] | None, expected: tuple[Any, ...], is_student: bool
    ) -> None:
        kind = "FirstSlotAsLogits" if tokenizer is None else "OutputLatentPooling"
        if is_student:
            # the official default is the role's, and need not be given if the tokenizer has it and there is no head
            default = {} if tokenizer and "output_dim" in tokenizer and not head["use_head"] else {"output_dim": 200}
            own = {**ROLES["readout"], "tokenizer_type": kind, "tokenizer_kwargs": tokenizer}
            del own["output_dim"]
            config = nac_students_config(SHARE, {"readout": {**own, **default, **head}})
        else:
            changes = {f"{GRAPH}.read_out_kwargs.{name}": value for name, value in head.items()}
            changes |= {"output_tokenizer_type": kind, "output_tokenizer_kwargs": tokenizer}
            config = nac_config(changed_at(official(), changes))
        assert (config.pooling, config.latent_head_size, config.num_labels) == expected


class TestStudentConfig:
    def test_all_roles_make_one_configuration(self) -> None:
        config = nac_students_config(SHARE, ROLES, num_hidden_layers=8)
        assert (config.image_size, config.num_labels, config.share_layernorm) == (224, 1000, True)
        assert (config.drop_path_rate, config.read_in_drop_path_rate, config.read_out_drop_path_rate) == (0.1, 0, 0)
        assert config.graph_prior is None
        for role, own in ROLES.items():
            alone = nac_students_config(SHARE, {role: own})
            assert (alone.hidden_size, alone.intermediate_size, alone.num_attention_heads) == (384, 768, 6)

    def test_roles_that_no_single_nac_has_are_refused(self) -> None:
        roles = {**ROLES, "mediator": {**ROLES["mediator"], "num_heads": 3, "head_dim": 128}}
        with pytest.raises(ConversionError, match="`mediator` gives `num_attention_heads` as 3"):
            nac_students_config(SHARE, roles)

    @pytest.mark.parametrize(
        "role, own, said",
        [
            ("reader", {}, "'readin', 'mediator' or 'readout', not 'reader'"),
            ("mediator", {"depth": 2}, "mediator.depth"),
            ("mediator", {"latent_attention_kwargs": {"dropout": 0.1}}, "mediator.latent_attention_kwargs.dropout"),
            ("readout", {"use_head": False}, "readout.output_dim` is missing"),
            ("readout", {"tokenizer_kwargs": {"output_dim": 3}}, "readout.output_dim` is missing"),
            ("readout", {"use_head": False, "output_dim": 3}, "readout.use_head` is False"),
        ],
    )
    def test_what_is_not_known_is_named(self, role: str, own: dict[str, Any], said: str) -> None:
        with pytest.raises(ConversionError, match=said):
            nac_students_config(SHARE, {role: own})


# Every form of an official NAC that has other tensors.
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"qkv_bias": True},
    "own_layernorms": {"share_layernorm": False},
    "no_seeder": {"use_latent_seeder": False},
    "no_state_noise": {"use_state_noise": False},
    "codes_by_round": {"share_codes_between_layers": False},
    "fixed_gain": {"learnable_code_scale_gain": False},
    "first_latent": {"pooling": "first"},
    "pooled_heads": {"latent_head_size": 7},
    "pooled_heads_without_layernorm": {"latent_head_size": 7, "head_layernorm": False},
    "no_positions": {"position_embedding_size": 0},
    "three_tokenizer_stages": {"tokenizer_depths": [1, 0, 1]},
    "shared_propagators": {"share_propagators": True},
}


class TestConvertNAC:
    @pytest.mark.parametrize("form", FORMS)
    def test_names_go_there_and_back(self, form: str) -> None:
        config = NACConfig.from_preset("tiny", **FORMS[form])
        # bandwidths are positive
        ours = {name: 0.1 + torch.rand(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
        official = nac_to_official(ours, config)
        assert not official.keys() & ours.keys()
        assert_equal(convert_nac(official, config.share_propagators), ours)

    @pytest.mark.parametrize("is_learned", [True, False])
    def test_a_learned_bandwidth_goes_as_what_it_counts_as(self, is_learned: bool) -> None:
        config = NACConfig.from_preset("tiny", learnable_bandwidth=is_learned)
        ours = NACForImageClassification(config).state_dict()
        rounds = [name for name in ours if name.endswith("kernel.bandwidth") and "read_out" not in name]
        ours.update({name: torch.tensor(-0.2 if is_learned else 0.001) for name in rounds})
        official = convert_nac(nac_to_official(ours, config))
        assert rounds and all(official[name] == torch.tensor(0.01 if is_learned else 0.001) for name in rounds)

    def test_a_tensor_that_the_official_code_does_not_have_is_named(self) -> None:
        with pytest.raises(ConversionError, match="nac.registers of our NAC has no official counterpart"):
            nac_to_official({"nac.registers": torch.rand(1)}, NACConfig.from_preset("tiny"))

    def test_every_number_of_an_official_checkpoint_is_there_once(self) -> None:
        given = nac_case("nac_small_train").state_dict
        converted = convert_nac(given)
        assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in given.values())
        total = sum(v.double().sum() for v in given.values())
        assert torch.allclose(sum(v.double().sum() for v in converted.values()), total)

    def test_the_bias_of_the_read_in_s_keys_is_left_out(self) -> None:
        case = nac_case("nac_small_eval")
        name = "latent_graphs.0.read_in.read_in_attention.key_compiler.native_bias"
        assert case.state_dict[name].abs().max() > 0
        assert "nac.read_in.attention.k_proj.bias" not in convert_nac(case.state_dict)
        model = nac(case)
        check_tensors(case.state_dict, shapes_of(nac_to_official(model.state_dict(), model.config)), "the NAC")

    @pytest.mark.parametrize(
        "name",
        [
            "mediator_states",
            "latent_graphs.1.read_in.ffn.layernorm.weight",
            "latent_graphs.0.stitch_norm.weight",
            "latent_graphs.0.propagators.x.ffn.layernorm.weight",
            "latent_graphs.0.read_in.ffn.ffn.1.native_weight",
            "latent_graphs.0.read_out.head.0.weight",
            "output_tokenizer.to_logits.scale",
        ],
    )
    def test_an_unknown_tensor_is_named(self, name: str) -> None:
        with pytest.raises(ConversionError, match=f"not part of an official NAC.*{name}"):
            convert_nac({"output_tokenizer.to_logits.weight": torch.rand(1), name: torch.rand(1)})

    def test_shared_propagators_are_stored_once(self) -> None:
        config = NACConfig.from_preset("tiny", share_propagators=True, num_hidden_layers=3)
        ours = NACForImageClassification(config).state_dict()
        shapes = shapes_of(nac_to_official(ours, config))
        rounds = [{n for n in shapes if f".propagators.{layer}." in n} for layer in range(4)]
        assert len(rounds[0]) == len(rounds[1]) == len(rounds[2]) > 20 and not rounds[3]
        given = {name: torch.ones(shape) for name, shape in shapes.items()}
        assert convert_nac(given, share_propagators=True).keys() == ours.keys()
        name = "latent_graphs.0.propagators.2.ffn.layernorm.weight"
        with pytest.raises(ConversionError, match="nac.layers.2.ffn.layernorm.weight differs from nac.layers.0"):
            convert_nac({**given, name: given[name] + 1}, share_propagators=True)


class TestConvertStudent:
    @pytest.mark.parametrize("role, index", [("readin", 0), ("mediator", 1), ("readout", 2)])
    def test_a_student_is_what_distillation_trains_and_its_stitches(self, role: str, index: int) -> None:
        case = nac_case(f"nac_student_{role}")
        config = nac_students_config(
            case.config["share_kwargs"], {role: case.config["role_kwargs"]}, num_hidden_layers=1
        )
        model = on_meta(config)
        check_tensors(case.state_dict, nac_student_shapes(model.state_dict(), config, index, 3, 56), role)
        stage, stitches = convert_nac_student(case.state_dict, index, 3)
        trained = split_into_stages(model, [1, 1, 1])[index].distilled().state_dict()
        assert {k: v.shape for k, v in stage.items()} == {k: v.shape for k, v in trained.items()}
        sides = {"pre", "post"} - {{0: "pre", 2: "post"}.get(index)}
        assert stitches.keys() == {f"{side}.linear.{part}" for side in sides for part in ("weight", "bias")}
        count = sum(v.numel() for v in (*stage.values(), *stitches.values()))
        assert count == sum(v.numel() for v in case.state_dict.values())

    def test_a_student_lies_in_the_full_model_under_the_full_model_s_names(self) -> None:
        full = nac_case("nac_small_train").state_dict
        prefix = "latent_graphs.0.propagators.1."
        part = {n.removeprefix(prefix): v for n, v in full.items() if n.startswith(prefix)}
        del part["latent_attention.kernel.bandwidth"]
        stage, _ = convert_nac_student(part, 2, 4)
        whole = convert_nac(full)
        assert_equal(stage, {name: whole[name] for name in stage})

    @pytest.mark.parametrize(
        "index, name",
        [
            (0, "latent_attention.layer_scale.gamma"),
            (0, "input_tokenizer.positional_grid.grid"),
            (1, "tokenizer.to_logits.weight"),
            (1, "pre_stitch.0.weight"),
            (2, "read_in.ffn.layernorm.weight"),
        ],
    )
    def test_what_belongs_to_another_role_is_named(self, index: int, name: str) -> None:
        with pytest.raises(ConversionError, match=f"stage {index} of 3 of a NAC.*{name}"):
            convert_nac_student({name: torch.rand(1)}, index, 3)


class TestCheckTensors:
    def test_all_that_is_wrong_is_in_one_message(self) -> None:
        expected = {"a": (2, 3), "b": (4,), "c": (), "d": (1,), "e": (5,)}
        given = {"a": torch.rand(3, 2), "c": torch.rand(()), "d": 3, "f": torch.rand(7), "g": None}
        with pytest.raises(ConversionError) as error:
            check_tensors(given, expected, "the model")
        assert str(error.value).splitlines()[1:] == [
            "  missing: b 4",
            "  missing: e 5",
            "  unexpected: f 7",
            "  unexpected: g scalar",
            "  shape: a is 3x2, must be 2x3",
            "  not a tensor: d is of type int",
            "Give the --config that this checkpoint was trained with.",
        ]

    def test_what_fits_passes(self) -> None:
        check_tensors({"a": torch.rand(2), "b": torch.rand(())}, {"a": (2,), "b": ()}, "the model")


class TestSizesOfThePaper:
    """Names and shapes of the official networks, as the official code made them."""

    VIT = {"patch_size": 16, "num_heads": 16, "qkv_bias": True, "embed_dim": 1024}
    HUGE = {"patch_size": 14, "num_heads": 16, "embed_dim": 1280}
    BASE = {"num_heads": 12, "qkv_bias": True, "divided_depths": [3] * 4, "moe_pos": list(range(12))}
    STITCHES = {"pre_stitch_pos": [3, 6, 9], "post_stitch_pos": [2, 5, 8], "stitch_dim": 1024}
    IMAGENET = {
        "output_dim": 1000,
        "state_dim": 512,
        "input_tokenizer_kwargs.positional_grid_kwargs.grid_size": [28, 28],
        f"{GRAPH}.code_dim": 512,
        f"{GRAPH}.ffn_capacity_factor": 1.0,
        f"{GRAPH}.num_heads": 8,
        f"{GRAPH}.read_in_kwargs.num_heads": 8,
        f"{GRAPH}.num_input_latents": 192,
        f"{GRAPH}.num_mediator_latents": 768,
        f"{GRAPH}.mediator_latent_kwargs.graph_generator_kwargs": {"m": 6, "n": 768},
    }

    @staticmethod
    def listed(name: str) -> tuple[dict[str, torch.Tensor], int]:
        path = SHARED / "keys" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{path} is not there: the lists of names are not committed")
        content = json.loads(path.read_text())
        shapes = {name: tuple(shape) for name, shape in without_aliases(content["model"]).items()}
        return tensors(shapes), content["num_unique_params"]

    @pytest.mark.parametrize("name, changes", [("nac_scale_tinyimnet", {}), ("nac_scale_imnet", IMAGENET)])
    def test_nac(self, name: str, changes: dict[str, Any]) -> None:
        given, count = self.listed(name)
        config = nac_config(changed_at(official(), changes))
        model = on_meta(config)
        check_tensors(given, shapes_of(nac_to_official(model.state_dict(), config)), name)
        assert {k: v.shape for k, v in convert_nac(given).items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert sum(p.numel() for p in model.parameters()) == count

    @pytest.mark.parametrize("role, index", [("readin", 0), ("mediator", 5), ("readout", 9)])
    @pytest.mark.parametrize("size", ["tinyimnet", "imnet"])
    def test_nac_students(self, size: str, role: str, index: int) -> None:
        given, count = self.listed(f"nac_student_{size}_{role}")
        share, roles = SHARE, ROLES
        if size == "imnet":
            share = {**SHARE, "state_dim": 512, "code_dim": 512, "ffn_capacity_factor": 1.0}
            roles = {name: {**own, "num_heads": 8} for name, own in ROLES.items()}
        config = nac_students_config(share, roles, num_hidden_layers=8)
        model = on_meta(config)
        check_tensors(given, nac_student_shapes(model.state_dict(), config, index, 10, 1280), role)
        stage, stitches = convert_nac_student(given, index, 10)
        trained = split_into_stages(model, [1] * 10)[index].distilled().state_dict()
        assert {k: v.shape for k, v in stage.items()} == {k: v.shape for k, v in trained.items()}
        assert sum(v.numel() for v in (*stage.values(), *stitches.values())) == count

    @pytest.mark.parametrize(
        "name, kwargs, norm_eps",
        [
            ("vit_large_meta", {**VIT, "divided_depths": [1] * 4}, 1e-6),
            ("vit_large_teacher", {**VIT, "divided_depths": [6] * 4}, 1e-6),
            ("vit_huge_meta", {**HUGE, "divided_depths": [1] * 10}, 1e-5),
            ("vit_huge_teacher", {**HUGE, "divided_depths": [4, *[3] * 8, 4]}, 1e-5),
            ("vmoe_base", BASE, 1e-6),
            ("vmoe_base_stitched", {**BASE, **STITCHES}, 1e-6),
        ],
    )
    def test_transformers(self, name: str, kwargs: dict[str, Any], norm_eps: float) -> None:
        given, count = self.listed(name)
        prefix = name.split("_")[0]
        with torch.device("meta"):
            if prefix == "vit":
                model, converted = (
                    ViTForImageClassification(vit_config(kwargs, norm_eps)),
                    transformer_to_ours("vit", given),
                )
                back = transformer_to_official("vit", model.state_dict())
            else:
                model, converted = (
                    VMoEForImageClassification(vmoe_config(kwargs, norm_eps)),
                    transformer_to_ours("vmoe", given),
                )
                back = transformer_to_official("vmoe", model.state_dict())
        check_tensors(given, shapes_of(back), name)
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert sum(p.numel() for p in model.parameters()) == count
