"""Decoding of an image file to an RGB image, with errors that name the sample."""

import os
from io import BytesIO

from PIL import Image, ImageOps

from m2mkd.errors import DataError


def decode_image(source: str | bytes, name: str | None = None) -> Image.Image:
    """Decode a whole image and convert it to mode RGB, rotated upright according to its EXIF orientation.

    Transparency is dropped, as `transformers.image_utils.load_image` (and so a pipeline) does.

    Args:
        source: path of the file, or its bytes.
        name: name of the image in an error. `None`: its path.

    Raises:
        DataError: the file is missing, is truncated, is not an image, is PostScript, has more pixels than Pillow
            allows, or has more than 8 bits per channel.
    """
    name = source if name is None else name
    try:
        if not isinstance(source, bytes) and not os.path.isfile(source):
            # a pipe or a device would never end
            raise FileNotFoundError("it is not an ordinary file")
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "EPS":
                raise ValueError("it is PostScript, which Pillow would let Ghostscript run")
            mode = image.mode
            ImageOps.exif_transpose(image, in_place=True)
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise almost any type on corrupt bytes
        raise DataError(
            f"cannot decode the image {name} ({type(error).__name__}: {error}): replace or remove it"
        ) from error
    if mode.startswith(("I", "F")):
        # Pillow clips such values at 255, which makes most 16-bit images plain white.
        raise DataError(f"the image {name} has mode {mode}, more than 8 bits per channel: convert it to 8 bits")
    return rgb
