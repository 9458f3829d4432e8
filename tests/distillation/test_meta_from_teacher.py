"""A meta model that is made of a teacher."""

import pytest
import torch
from testing_utils import assert_equal, nac, run_chain, vit, vmoe
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
)

from m2mkd import split_into_stages
from m2mkd.distillation.meta_from_teacher import fit_image_size, meta_from_teacher
from m2mkd.errors import StageError


SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}
TEACHERS = {
    "vit": lambda: vit(seed=3),
    "deit with two heads": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES)),
    "vmoe": lambda: vmoe(num_hidden_layers=3, moe_layers=[0, 2]),
}


@pytest.fixture(params=TEACHERS.values(), ids=TEACHERS.keys())
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.param().eval()


class TestMetaFromTeacher:
    def test_it_takes_the_first_layers_of_each_stage_and_all_that_is_no_layer(self, teacher: PreTrainedModel) -> None:
        meta = meta_from_teacher(teacher, [2, 1], [1, 1]).eval()
        theirs, ours = split_into_stages(teacher, [1, 1, 1]), split_into_stages(meta, [1, 1])
        pixel_values = torch.rand(2, 3, 8, 8)
        assert torch.equal(run_chain(ours, pixel_values), run_chain([theirs[0], theirs[2]], pixel_values))
        assert meta.config.num_hidden_layers == 2

    def test_of_all_layers_it_is_the_teacher_and_shares_no_tensor(self, teacher: PreTrainedModel) -> None:
        meta = meta_from_teacher(teacher, [2, 1], [2, 1]).eval()
        pixel_values = torch.rand(2, 3, 8, 8)
        assert torch.equal(meta(pixel_values).logits, teacher(pixel_values).logits)
        pointers = {parameter.data_ptr() for parameter in teacher.parameters()}
        assert pointers.isdisjoint(parameter.data_ptr() for parameter in meta.parameters())

    def test_it_is_saved_and_loaded_as_any_model(self, teacher: PreTrainedModel, tmp_path) -> None:
        meta = meta_from_teacher(teacher, [2, 1], [1, 1])
        meta.save_pretrained(tmp_path)
        assert_equal(type(meta).from_pretrained(tmp_path).state_dict(), meta.state_dict())

    @pytest.mark.parametrize("depths", [[2, 1], [1, 1, 1]])
    def test_more_layers_or_stages_than_the_teacher_are_refused(self, depths: list[int]) -> None:
        with pytest.raises(StageError, match=r"depths are .* and the teacher's are \[1, 2\].*`meta.depths`"):
            meta_from_teacher(vit(), [1, 2], depths)

    def test_a_nac_is_refused(self) -> None:
        with pytest.raises(StageError, match="cannot be made from a NACForImageClassification"):
            meta_from_teacher(nac(), [1, 2, 1], [1, 1, 1])


class TestFitImageSize:
    @pytest.mark.parametrize("name", ["vit", "deit with two heads", "dinov2"])
    def test_it_equals_the_interpolation_of_transformers(self, name: str) -> None:
        teacher, pixel_values = TEACHERS[name]().eval(), torch.rand(2, 3, 16, 16)
        interpolate = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
        expected = teacher(pixel_values, **interpolate).logits
        fit_image_size(teacher, 16)
        torch.testing.assert_close(teacher(pixel_values).logits, expected)
        assert teacher.config.image_size == 16

    def test_the_own_size_changes_nothing(self) -> None:
        teacher = vit()
        before = teacher.vit.embeddings.position_embeddings
        fit_image_size(teacher, 8)
        assert teacher.vit.embeddings.position_embeddings is before

    def test_a_size_that_the_patches_do_not_cover_is_refused(self) -> None:
        with pytest.raises(StageError, match="Images of 10 pixels cannot be divided into the teacher's patches of 4"):
            fit_image_size(vit(), 10)
