"""The one exception of this package."""


class DataError(ValueError):
    """Something is wrong with the data itself: a missing folder, an undecodable image, a class without samples.

    It is built from one string, so that `torch.utils.data.DataLoader` can raise it again from a worker process.
    """
