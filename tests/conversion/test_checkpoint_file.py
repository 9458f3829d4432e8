"""Files of named arrays are read without running code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m2mkd.conversion.checkpoint_file import read_checkpoint
from m2mkd.errors import ConversionError


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    # ml_dtypes' bfloat16, as numpy stores it
    values = torch.randn(3, 4).bfloat16()
    np.savez(tmp_path / "half.npz", a=values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_checkpoint(tmp_path / "half.npz").model["a"], values)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([print], dtype=object))
    with pytest.raises(ConversionError, match="not a checkpoint: Object arrays cannot be loaded"):
        read_checkpoint(tmp_path / "objects.npz")
    (tmp_path / "half.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ConversionError, match="is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "half.npz")
