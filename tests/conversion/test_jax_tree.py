"""Parameters are found in every file that a trainer leaves, and read without the rest of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jax_files import write_checkpoint
from jax_vmoe import tree
from safetensors.torch import load_file, save_file

from m2mkd.conversion.jax_tree import read_parameters
from m2mkd.errors import ConversionError


FOLDER = Path(__file__).parent / "vmoe_jax"


@pytest.mark.parametrize("name", ["checkpoint_unknown_version_trainstate", "checkpoint_v1_bf16_trainstate"])
def test_of_a_train_state_only_the_parameters_are_read(name: str) -> None:
    state = load_file(FOLDER / name / "params.safetensors")
    expected = {key.removeprefix("params/"): array for key, array in state.items() if key.startswith("params/")}
    ours = read_parameters(FOLDER / name / "ckpt")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key].float(), array) for key, array in expected.items())


def test_a_name_in_front_of_all_and_dots_do_not_matter(tmp_path: Path) -> None:
    arrays = {f"params.{name.replace('/', '.')}": torch.from_numpy(array) for name, array in tree().items()}
    save_file(arrays, tmp_path / "dots.safetensors")
    write_checkpoint(tmp_path / "files", {f"target/{name}": array for name, array in tree().items()})
    for path in (tmp_path / "dots.safetensors", tmp_path / "files", tmp_path / "files.index"):
        ours = read_parameters(path)
        assert ours.keys() == tree().keys()
        assert all(np.array_equal(ours[name], array) for name, array in tree().items())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"neither a file .*ckpt nor .*ckpt\.index"):
        read_parameters(tmp_path / "ckpt")
