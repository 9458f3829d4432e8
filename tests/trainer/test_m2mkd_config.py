import pytest

from m2mkd import M2MKDConfig


@pytest.fixture
def make(tmp_path):
    return lambda **overrides: M2MKDConfig(output_dir=str(tmp_path), use_cpu=True, **overrides)


class TestM2MKDConfig:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"distillation_type": "warm"}, "`distillation_type` must be one of .*'soft', 'hard'.*'warm'"),
            ({"kl_reduction": "sum"}, "`kl_reduction` must be one of .*'batchmean', 'mean'.*'sum'"),
            ({"stitch": "conv"}, "`stitch` must be one of .*'layernorm_linear', 'linear', 'none'.*'conv'"),
            ({"alpha": 1.1}, r"`alpha`.*\[0, 1\].*1.1"),
            ({"alpha": -0.1}, r"`alpha`.*\[0, 1\].*-0.1"),
            ({"alpha": float("nan")}, r"`alpha`.*nan"),
            ({"base_learning_rate": -1e-3}, "`base_learning_rate` must be finite and not negative, but is -0.001"),
            ({"temperature": 0.0}, "`temperature` must be positive.*0.0"),
            ({"temperature": -1.0}, "`temperature` must be positive"),
            ({"temperature": float("nan")}, "`temperature` must be positive and finite.*nan"),
            ({"temperature": float("inf")}, "`temperature` must be positive and finite.*inf"),
            ({"student_depths": [1, 2], "teacher_depths": [3]}, r"makes 2 stages, but `teacher_depths` \[3\] makes 1"),
            ({"student_depths": [1, 2], "meta_depths": [1, 1, 1]}, "makes 2 stages, but `meta_depths`.*makes 3"),
            ({"student_depths": None, "teacher_depths": [2, 2]}, "makes 1 stages, but `teacher_depths`"),
            ({"student_depths": [1, 2], "pairs": [2]}, r"`pairs` must be 'all' or .*0 to 1, but is \[2\]"),
            ({"student_depths": [1, 2], "pairs": [-1]}, "`pairs` must be 'all'"),
            ({"student_depths": [1, 2], "pairs": []}, "`pairs` must be 'all'"),
            ({"student_depths": [1, 2], "pairs": [0, 0]}, "`pairs` must be 'all' or different"),
            ({"student_depths": [1, 2], "pairs": "first"}, "`pairs` must be 'all'"),
            ({"student_depths": [1, 2], "pairs": 0}, "`pairs` must be 'all'"),
            ({"context": "student"}, r"`context` must be one of \['meta', 'teacher'\], but is 'student'"),
            ({"match": "features"}, r"`match` must be one of \['logits', 'boundary'\], but is 'features'"),
            ({"feed": "meta"}, r"`feed` must be one of \['teacher', 'student'\], but is 'meta'"),
            ({"stitch_init": "zero"}, r"`stitch_init` must be one of \['random', 'least_squares'\], but is 'zero'"),
            (
                {"student_depths": [1, 1, 1], "feed": "student", "pairs": [2]},
                r"pair 2 needs the output of the pairs \[0, 1\] .* Set `pairs` to \[0, 1, 2\]",
            ),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_a_value_out_of_range_is_refused_by_field_and_value(self, make, overrides: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(**overrides)

    def test_the_base_learning_rate_is_for_512_images_a_step(self, make) -> None:
        args = make(base_learning_rate=5e-4, per_device_train_batch_size=128, gradient_accumulation_steps=2)
        assert args.learning_rate == 5e-4 * 256 / 512
        assert make(learning_rate=3e-3).learning_rate == 3e-3

    def test_the_defaults_are_those_of_the_paper(self, make) -> None:
        args = make()
        assert (args.alpha, args.temperature, args.distillation_type) == (0.5, 1.0, "soft")
        # no stitch is named: each student gets the paper's for it
        assert (args.kl_reduction, args.stitch, args.pairs) == ("batchmean", None, "all")
        assert (args.nac_codes, args.read_in_latents) == ("random", "one")
        assert (args.context, args.match, args.feed, args.stitch_init) == ("meta", "logits", "teacher", "random")

    def test_the_arguments_of_the_base_class_that_differ_are_set(self, make) -> None:
        args = make()
        assert args.remove_unused_columns is False
        assert args.logging_nan_inf_filter is False
        assert args.ddp_find_unused_parameters is False

    def test_what_the_caller_asks_of_ddp_is_kept(self, make) -> None:
        assert make(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True

    @pytest.mark.parametrize(
        "overrides, count, indices",
        [
            ({}, 1, [0]),
            ({"student_depths": [3, 3, 3]}, 3, [0, 1, 2]),
            ({"student_depths": [3, 3, 3], "pairs": [2, 0]}, 3, [0, 2]),
        ],
        ids=["whole_student", "all_pairs", "some_pairs_in_order"],
    )
    def test_pairs_are_counted(self, make, overrides: dict, count: int, indices: list[int]) -> None:
        args = make(**overrides)
        assert (args.num_pairs, args.pair_indices) == (count, indices)

    @pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
    def test_the_edges_of_alpha_are_accepted(self, make, alpha: float) -> None:
        assert make(alpha=alpha).alpha == alpha

    def test_every_field_survives_the_round_trip_to_a_dict(self, make) -> None:
        args = make(student_depths=[1, 2], teacher_depths=[2, 2], pairs=[1], alpha=0.3, temperature=2.0)
        values = args.to_dict()
        for name in ("student_depths", "teacher_depths", "meta_depths", "pairs", "alpha", "temperature", "stitch"):
            assert values[name] == getattr(args, name)
