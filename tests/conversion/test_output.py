"""What a conversion writes: tensors that safetensors takes."""

import torch

from m2mkd.conversion.output import own_memory


def test_only_tensors_that_share_or_have_gaps_are_copied() -> None:
    own, stacked, wide = torch.randn(3, 4), torch.randn(2, 3), torch.randn(4, 2)
    given = {"own": own, "again": own, "first": stacked[0], "all": stacked, "turned": wide.T}
    ours = own_memory(given)
    assert all(torch.equal(ours[name], tensor) and ours[name].is_contiguous() for name, tensor in given.items())
    storages = [tensor.untyped_storage() for tensor in ours.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(given)
    assert all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, ours.values(), strict=True))
    assert ours["own"].data_ptr() == own.data_ptr() and ours["all"].data_ptr() == stacked.data_ptr()
