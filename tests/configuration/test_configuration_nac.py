from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from m2mkd import NACConfig
from m2mkd.configuration.configuration_nac import NAC_PRESETS


PLANTED = {"l": 4, "k": 6, "p_in": 0.9, "p_out": 0.2}
# fields, the one that the message names, and the rule in it
REFUSED = [
    *(
        ({field: 0}, field, "at least 1")
        for field in (
            "hidden_size",
            "code_size",
            "signature_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_channels",
            "num_input_latents",
            "num_output_latents",
        )
    ),
    ({"num_mediator_latents": 0}, "num_mediator_latents", "at least 1"),
    ({"num_attention_heads": 5}, "num_attention_heads", "times `head_dim` must be `hidden_size`"),
    ({"head_dim": 15}, "head_dim", "3 times 15 is not 48"),
    ({"latent_head_size": 0}, "latent_head_size", "at least 1"),
    ({"latent_head_size": 5, "pooling": "first"}, "latent_head_size", "other than 'first'"),
    ({"mediators_start_as_inputs": True}, "mediators_start_as_inputs", "as many mediators as input latents"),
    ({"tokenizer_depths": []}, "tokenizer_depths", "at least one stage"),
    ({"tokenizer_depths": [1, -1]}, "tokenizer_depths", "0 or more blocks"),
    ({"tokenizer_hidden_sizes": [12]}, "tokenizer_hidden_sizes", "every stage"),
    ({"tokenizer_hidden_sizes": [12, 0]}, "tokenizer_hidden_sizes", "at least 1"),
    ({"position_embedding_size": -1}, "position_embedding_size", "not be negative"),
    ({"image_size": 30}, "image_size", "multiple of 8"),
    ({"image_size": [32, 36]}, "image_size", "multiple of 8"),
    ({"image_size": 0}, "image_size", "positive"),
    ({"image_size": 24, "tokenizer_depths": [1, 1, 1]}, "image_size", "multiple of 16"),
    *(
        ({field: value}, field, "[0, 1)")
        for field in ("drop_path_rate", "read_in_drop_path_rate", "read_out_drop_path_rate")
        for value in (-0.1, 1.0)
    ),
    *(
        ({field: value}, field, "not be negative")
        for field in ("code_noise_scale", "signature_repulsion_coef", "block_model_coef")
        for value in (-1.0, float("nan"))
    ),
    *(
        ({field: value}, field, "must be positive")
        for field in ("kernel_bandwidth", "kernel_temperature", "pooling_temperature")
        for value in (0.0, float("nan"))
    ),
    *(
        ({field: value}, field, "(0, 2]")
        for field in ("kernel_truncation", "graph_prior_truncation", "signature_repulsion_hinge")
        for value in (0.0, -0.5, 2.1, float("nan"))
    ),
    ({"block_model_p_in": 1.2}, "block_model_p_in", "[0, 1]"),
    ({"block_model_p_out": -0.2}, "block_model_p_out", "[0, 1]"),
    ({"block_model_coef": 1.0, "block_model_num_clusters": 7}, "num_mediator_latents", "24 is not a multiple of 7"),
    ({"block_model_coef": 1.0, "block_model_num_clusters": 0}, "num_mediator_latents", "multiple"),
    ({"graph_prior": "scale-free"}, "graph_prior", "'barabasi_albert'"),
    ({"graph_prior_kwargs": {"m": 2}}, "graph_prior_kwargs", "`graph_prior` is None"),
    (
        {"graph_prior": "planted_partition", "graph_prior_kwargs": {**PLANTED, "l": 5}},
        "graph_prior_kwargs['l']",
        "30 nodes",
    ),
    ({"graph_prior": "hypercube"}, "num_mediator_latents", "power of two"),
    ({"graph_prior": "barabasi_albert", "graph_prior_kwargs": {"m": 24}}, "graph_prior_kwargs['m']", "less than"),
    ({"graph_prior": "erdos_renyi", "graph_prior_kwargs": {"p": 2}}, "graph_prior_kwargs['p']", "from 0 to 1"),
    (
        {"graph_prior": "erdos_renyi", "graph_prior_kwargs": {"p": 0.1}, "kernel_truncation": None},
        "graph_prior",
        "`kernel_truncation` is None",
    ),
]


def tiny(**fields: Any) -> NACConfig:
    """3 heads of 16, 24 mediators, images of 32 pixels in tokens of 8."""
    return NACConfig.from_preset("tiny", **fields)


class TestRules:
    @pytest.mark.parametrize("fields, named, rule", REFUSED, ids=str)
    def test_a_broken_rule_is_refused_by_field_and_rule(self, fields: dict, named: str, rule: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError) as error:
            tiny(**fields)
        assert isinstance(error.value.__cause__, ValueError)
        assert f"`{named}" in str(error.value) or f"{named}`" in str(error.value)
        assert rule in str(error.value)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": "48"},
            {"pooling": "mean"},
            {"code_scale_normalization": "ln"},
            {"kernel_truncation_type": "soft"},
            {"input_to_mediator": "last"},
            {"use_geglu": "no"},
            {"tokenizer_depths": 3},
            {"graph_prior_kwargs": [4, 6]},
        ],
    )
    def test_a_wrong_type_or_choice_is_refused(self, fields: dict) -> None:
        with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
            tiny(**fields)

    def test_a_rule_broken_by_assignment_is_found_before_saving(self, tmp_path) -> None:
        config = tiny()
        config.kernel_truncation = 3.0
        with pytest.raises(StrictDataclassClassValidationError, match="kernel_truncation"):
            config.save_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "fields",
        [
            {"kernel_truncation": 2},
            {"kernel_truncation": None},
            {"drop_path_rate": 0},
            {"position_embedding_size": 0},
            {"tokenizer_depths": [0, 0]},
            {"code_noise_scale": 0},
            {"image_size": [32, 64]},
            {"graph_prior": "complete", "kernel_truncation": None},
            {"graph_prior": "hypercube", "num_mediator_latents": 16},
            {"block_model_coef": 1, "block_model_num_clusters": 24},
            {"block_model_num_clusters": 7},  # has no weight
        ],
        ids=str,
    )
    def test_values_on_the_edge_are_accepted(self, fields: dict) -> None:
        config = tiny(**fields)
        assert {name: getattr(config, name) for name in fields} == fields


class TestDefaults:
    def test_the_default_is_the_paper_s_nac_for_tiny_imagenet_without_its_graph(self) -> None:
        config = NACConfig()
        assert (config.image_size, config.hidden_size, config.code_size, config.signature_size) == (64, 384, 384, 64)
        assert (config.num_input_latents, config.num_mediator_latents, config.num_output_latents) == (64, 256, 64)
        assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (8, 6, 768)
        assert (config.kernel_truncation, config.kernel_temperature, config.code_noise_scale) == (0.9, 0.5, 0.05)
        assert config.graph_prior is None and config.sample_in_eval is False

    def test_what_is_left_out_follows_from_the_width(self) -> None:
        config = NACConfig()
        assert config.head_dim == 64
        assert (config.tokenizer_depths, config.tokenizer_hidden_sizes) == ([3, 3], [96, 192])
        assert (config.token_stride, config.token_size) == (8, 192 + 64)
        deeper = NACConfig(tokenizer_depths=[1, 1, 1])
        assert (deeper.tokenizer_hidden_sizes, deeper.token_stride) == ([96, 192, 384], 16)
        assert NACConfig(position_embedding_size=0).token_size == 192

    def test_signatures_are_fitted_at_the_truncation_of_the_kernel_unless_told(self) -> None:
        assert tiny(kernel_truncation=0.7).fit_truncation == 0.7
        assert tiny(graph_prior_truncation=0.8).fit_truncation == 0.8

    def test_what_only_training_has_is_left_out_of_predictions(self) -> None:
        ignored = set(NACConfig.keys_to_ignore_at_inference)
        assert {"hidden_states", "attentions", "cross_attentions", "aux_loss"} <= ignored and "logits" not in ignored


class TestPresets:
    @pytest.mark.parametrize(
        "name, image_size, width, heads, latents, prior",
        [
            ("tiny", 32, 48, 3, (8, 24, 4), None),
            ("tiny_imagenet", 64, 384, 6, (64, 256, 64), {"m": 2}),
            ("imagenet", 224, 512, 8, (192, 768, 64), {"m": 6}),
        ],
    )
    def test_sizes(
        self, name: str, image_size: int, width: int, heads: int, latents: tuple[int, ...], prior: dict | None
    ) -> None:
        config = NACConfig.from_preset(name)
        assert (config.image_size, config.hidden_size, config.num_attention_heads) == (image_size, width, heads)
        assert (config.num_input_latents, config.num_mediator_latents, config.num_output_latents) == latents
        assert config.graph_prior == ("barabasi_albert" if prior else None)
        assert config.graph_prior_kwargs == (prior or {})
        assert config.signature_repulsion_coef == (0.1 if prior else 0.0)

    def test_overrides_win_over_the_preset_and_leave_it_as_it_was(self) -> None:
        config = NACConfig.from_preset(
            "tiny_imagenet", num_labels=7, graph_prior="planted_partition", graph_prior_kwargs={**PLANTED, "k": 64}
        )
        assert (config.num_labels, config.graph_prior) == (7, "planted_partition")
        assert NAC_PRESETS["tiny_imagenet"]["graph_prior_kwargs"] == {"m": 2}

    def test_an_unknown_preset_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="'huge'.*'imagenet', 'tiny', 'tiny_imagenet'"):
            NACConfig.from_preset("huge")

    def test_two_configs_share_no_list(self) -> None:
        kwargs = {"m": 2}
        config = tiny(graph_prior="barabasi_albert", graph_prior_kwargs=kwargs)
        config.graph_prior_kwargs["m"] = 3
        config.tokenizer_depths.append(1)
        assert kwargs == {"m": 2} and tiny().tokenizer_depths == [3, 3]


class TestSaveAndLoad:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"image_size": [32, 64], "tokenizer_depths": [1, 0, 2], "kernel_truncation": None, "num_labels": 7},
            {
                "graph_prior": "planted_partition",
                "graph_prior_kwargs": PLANTED,
                "graph_prior_truncation": 0.8,
                "graph_prior_seed": 3,
                "block_model_coef": 1.0,
                "pooling": "first",
                "input_to_mediator": "first",
                "sample_in_eval": True,
            },
        ],
        ids=["tiny", "shapes", "graph"],
    )
    def test_every_field_is_kept(self, tmp_path, fields: dict) -> None:
        config = tiny(**fields)
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is NACConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}

    def test_auto_config_makes_one_by_its_model_type(self) -> None:
        assert type(AutoConfig.for_model("nac")) is NACConfig
