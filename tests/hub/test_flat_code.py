"""Sources of a folder tree as they read in one flat folder."""

from m2mkd.hub.flat_code import flatten, own_imports


SOURCE = """import torch
from transformers import PreTrainedModel

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.modeling.stitches import Stitch


def late():
    from m2mkd.modeling.router_losses import load_loss

    return load_loss  # from m2mkd.modeling.stitches import nothing
"""


def test_own_imports_are_relative_also_inside_functions() -> None:
    flat = flatten(SOURCE)
    assert "\nfrom .configuration_vmoe import VMoEConfig\nfrom .stitches import Stitch\n" in flat
    assert "\n    from .router_losses import load_loss\n" in flat


def test_everything_else_stays() -> None:
    kept = [line for line in SOURCE.splitlines() if not line.lstrip().startswith("from m2mkd")]
    assert [line for line in flatten(SOURCE).splitlines() if not line.lstrip().startswith("from .")] == kept
    assert flatten("from m2mkd.errors import StageError\n") == "from m2mkd.errors import StageError\n"


def test_the_modules_that_have_to_go_along() -> None:
    assert own_imports(SOURCE) == [
        "m2mkd.configuration.configuration_vmoe",
        "m2mkd.modeling.stitches",
        "m2mkd.modeling.router_losses",
    ]
    assert own_imports(flatten(SOURCE)) == []
