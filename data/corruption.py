"""Detection of images that cannot be decoded."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2mkd.data.labeled_images import LabeledImages
from m2mkd.errors import DataError


logger = logging.getLogger(__name__)


def without_corrupt(data: LabeledImages, max_share: float) -> LabeledImages:
    """The samples whose images can be decoded. Every image is decoded once, on all cores; each corrupt one is logged.

    Args:
        data: any set.
        max_share: largest allowed fraction of corrupt images, in (0, 1).

    Raises:
        DataError: more images are corrupt than `max_share` allows.
    """

    def error_of(index: int) -> str | None:
        try:
            data.images[index]
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets other threads run while it decodes
        errors = list(pool.map(error_of, range(len(data))))
    bad = [index for index, error in enumerate(errors) if error is not None]
    if len(bad) > max_share * len(data):
        raise DataError(
            f"{len(bad)} of {len(data)} images are corrupt, more than max_corrupt_share={max_share} allows: fix the "
            f"images or raise max_corrupt_share. The first error: {errors[bad[0]]}"
        )
    for index in bad:
        logger.warning("left out: %s", errors[index])
    if bad:
        logger.warning("%d of %d images are corrupt and left out", len(bad), len(data))
    return data.select(np.setdiff1d(np.arange(len(data)), bad)) if bad else data
