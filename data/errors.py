"""The exception that this package raises."""


class DataError(ValueError):
    """Something is wrong with the data itself: a missing folder, an undecodable image, a class without samples.

    It takes a single string, so that `torch.utils.data.DataLoader` can re-raise it from a worker process.
    """
