"""Official NACs and their students."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from m2mkd.conversion.checkpoint_file import section
from m2mkd.conversion.kind import Request, ReversibleKind, StudentKind, checked_index, known_index, stitch_size_of
from m2mkd.conversion.official_models import OfficialArguments, check_tensors, shapes_of
from m2mkd.conversion.official_nac import (
    convert_nac,
    convert_nac_student,
    nac_config,
    nac_student_shapes,
    nac_students_config,
    nac_to_official,
)
from m2mkd.conversion.output import Output, Position, Tensors, model_output, on_meta, stage_output
from m2mkd.errors import ConversionError
from m2mkd.modeling.modeling_nac import NACForImageClassification


_ROLES = ("readin", "mediator", "readout")


class NACKind(ReversibleKind):
    """A whole NAC."""

    name = "nac"
    model_class = NACForImageClassification

    def convert(self, request: Request) -> Output:
        """The NAC."""
        official = request.checkpoint.model_of()
        model = self.described_model(request.content, official)
        check_tensors(official, shapes_of(self.official_tensors(model)), "the NAC")
        return model_output(model, convert_nac(official, model.config.share_propagators))

    def described_model(self, content: dict[str, Any], official: Mapping[str, Any]) -> PreTrainedModel:
        """See [`ReversibleKind`]."""
        kwargs = section(content, "model", "kwargs") if "model" in content else section(content, "kwargs")
        # of an official YAML file; in the fixtures the name stands for something else
        losses = graph_loss_fields(content["criterion"]) if isinstance(content.get("criterion"), Mapping) else {}
        return on_meta(NACForImageClassification, lambda: nac_config(kwargs, **losses))

    def official_tensors(self, model: PreTrainedModel) -> Tensors:
        """See [`ReversibleKind`]."""
        return nac_to_official(model.state_dict(), model.config)


class NACStudentKind(StudentKind):
    """A read-in, mediator or read-out that was distilled by itself."""

    name = "nac-student"
    default_stages = 10
    least_stages = 3

    def convert(self, request: Request) -> Output:
        """The stage of a NAC."""
        content = request.content
        spec = section(content, "student") if "student" in content else content
        share, role = section(spec, "share_kwargs"), spec.get("role")
        roles = {role: section(spec, "role_kwargs")} if role else {name: spec[name] for name in _ROLES if name in spec}
        num_stages = self.num_stages(request)
        known = known_index(request.path, content, request.stage, num_stages)
        # all mediators have one form; read-in and read-out have one place
        index = {"readin": 0, "mediator": 1, "readout": num_stages - 1}.get(role) if known is None else known
        index = checked_index(index, num_stages)
        its_role = _ROLES[(index > 0) + (index == num_stages - 1)]
        if its_role not in roles:
            raise ConversionError(
                f"stage {index} of {num_stages} is a {its_role}, and the configuration describes {sorted(roles)} only."
            )
        model = on_meta(
            NACForImageClassification, lambda: nac_students_config(share, roles, num_hidden_layers=num_stages - 2)
        )
        official = request.checkpoint.model_of()
        stitch_size = spec.get("stitch_dim") or stitch_size_of(official, "post_stitch.weight", "pre_stitch.weight")
        expected = nac_student_shapes(model.state_dict(), model.config, index, num_stages, stitch_size)
        check_tensors(official, expected, f"the {its_role} student")
        tensors, stitches = convert_nac_student(official, index, num_stages)
        write, what = stage_output(model, Position(index, num_stages, [index]), tensors, stitches, stitch_size)
        is_guess = known is None and its_role == "mediator"
        return (
            write,
            f"{what}, which is taken for the first mediator (--stage says which one it is)," if is_guess else what,
        )


def graph_loss_fields(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """
    The losses of the graph that an official training weighs, as fields of [`NACConfig`].

    Args:
        criterion (`Mapping[str, Any]`): `criterion` of an official YAML file.

    Raises:
        `ConversionError`: a loss or an option of it that we do not have.
    """
    loss = OfficialArguments(criterion, "criterion.").section("graph_sparsity")
    if not loss.take("use", False):
        return {}
    kind, weight = loss.take("type", "signature_hinge_repulsion"), loss.take("weight", 1.0)
    options = loss.section("kwargs")
    if kind == "signature_hinge_repulsion":
        fields = {"signature_repulsion_coef": weight, "signature_repulsion_hinge": loss.need("hinge")}
        options.require(reduction="sum")
    elif kind == "stochastic_block_model_regularization":
        fields = {
            "block_model_coef": weight,
            "block_model_num_clusters": options.take("num_clusters", 10),
            "block_model_p_in": options.take("p_in", 0.9),
            "block_model_p_out": options.take("p_out", 0.05),
        }
        for latents, value in (("input", False), ("mediator", True), ("output", False)):
            if options.take(f"regularize_{latents}_latents", True) != value:
                raise ConversionError(
                    "our block model loss is computed on the mediators only, the official one is not."
                )
        options.require(clip=None)
    else:
        raise ConversionError(f"`criterion.graph_sparsity.type` {kind!r} is not known.")
    loss.end()
    return fields
