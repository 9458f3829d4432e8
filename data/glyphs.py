"""Letters drawn with the fonts inside three Python packages. Nothing is downloaded, and no package is imported.

Splits train and test have printed fonts of different families; handwriting has fonts made from handwriting. A class is
a letter in both cases, as in EMNIST Letters (https://huggingface.co/papers/1702.05373): Amatic has only capitals.

The fonts were sorted by looking at every letter of each. Left out of trdg's: Lato Hairline (too thin for 28 pixels),
Bebas, Capture it and Seaside Resort (only capitals), Aller Display (mostly capitals), FFF Tusj (a printed face,
sketched by hand). The files of Aller, Pacifico and Walkway state no licence, those of Caviar Dreams allow any use but
not their redistribution, and the others have the Apache License or the SIL Open Font License.
"""

from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2mkd.data.labeled_images import LabeledImages
from m2mkd.errors import DataError


# --no-deps, because trdg depends on OpenCV, matplotlib and others, and only its fonts are read.
INSTALL = "pip install --no-deps trdg font-intuitive handwriting-generator"
LATIN = "trdg/fonts/latin"
# Each split: how often a font draws each letter, and the fonts of each folder. No two splits share a family of fonts.
SPLITS = {
    "train": (1, {LATIN: ("Aller_*", "DroidSans*", "Lato-[!H]*", "OpenSans-*", "Raleway-*", "Roboto*", "Walkway_*")}),
    "test": (2, {LATIN: ("Caviar*", "Sansation-*")}),
    "handwriting": (
        4,
        {
            LATIN: ("Amatic*", "Pacifico*"),
            "font_intuitive/files": ("Intuitive*",),
            "handwriting_generator/fonts": ("ShadowsIntoLight*",),
        },
    ),
}
SIDE = 28  # pixels, as MNIST
BOX = 20  # pixels of the longer side of a letter, as MNIST
OVERSAMPLING = 4  # letters are drawn this much larger, then averaged
FONT_SIZE = 160  # of the drawing that is scaled into the box, in pixels
SEED = 20402
# Ranges that every letter draws from: factor on its size, slant (dx / dy), shift and extra width of strokes in pixels.
SIZE, SLANT, SHIFT, WEIGHT = (0.8, 1.05), (-0.2, 0.2), (-1.0, 1.0), (0.0, 0.6)


def _font_files(split: str) -> list[Path]:
    """The font files of a split, in a fixed order."""
    files: list[Path] = []
    for folder, patterns in SPLITS[split][1].items():
        package, _, inside = folder.partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                f"source 'glyphs' needs the fonts inside {package}, which is not installed: {INSTALL} "
                "(--no-deps leaves out trdg's own requirements, which the fonts do not need)"
            )
        root = Path(spec.submodule_search_locations[0], inside)
        for pattern in patterns:
            found = sorted(root.glob(f"{pattern}.ttf"))
            if not found:
                raise DataError(
                    f"no font {pattern}.ttf in {root}: install the release in constraints.txt again: {INSTALL}"
                )
            files += found
    return files


def _draw(letter: str, font: ImageFont.FreeTypeFont, generator: np.random.RandomState) -> Image.Image:
    """Draw one letter, white on black, RGB (28, 28), the middle of its bounding box near the middle of the image."""
    size, slant, right, down, weight = (generator.uniform(*range_) for range_ in (SIZE, SLANT, SHIFT, SHIFT, WEIGHT))
    left, top, stop_x, stop_y = font.getbbox(letter)
    longer = max(stop_x - left, stop_y - top)
    # pixels of the drawing per pixel of the oversampled image
    scale = longer / (size * BOX * OVERSAMPLING)
    stroke = round(weight / 2 * OVERSAMPLING * scale)  # older releases of Pillow have only whole pixels
    ink = Image.new("L", (ceil(stop_x - left) + 2 * stroke, ceil(stop_y - top) + 2 * stroke))
    ImageDraw.Draw(ink).text((stroke - left, stroke - top), letter, 255, font, stroke_width=stroke)
    side = SIDE * OVERSAMPLING
    # From a pixel of the slanted letter, in the middle of a canvas with room for it, to one of the drawing.
    matrix = (
        scale,
        scale * slant,
        ink.width / 2 - scale * (1 + slant) * side,
        0,
        scale,
        ink.height / 2 - scale * side,
    )
    slanted = ink.transform((2 * side, 2 * side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    slanted = slanted.crop(slanted.getbbox())
    large = Image.new("L", (side, side))
    corner = (
        round((side - slanted.width) / 2 + right * OVERSAMPLING),
        round((side - slanted.height) / 2 + down * OVERSAMPLING),
    )
    large.paste(slanted, corner)
    return large.reduce(OVERSAMPLING).convert("RGB")


@cache  # a second or two for the training split
def load_glyphs(split: str) -> LabeledImages:
    """The letters of one split, 28 x 28, white on black, in 26 classes, `"a"` to `"z"`.

    They are always the same; another release of Pillow may change the grey of some edges.

    A sample is named after its font, letter and repeat: `glyphs/Lato-Bold/Q/0`. Capital I and small l look the same in
    many fonts, so no model reaches 100 %.

    Args:
        split: `"train"` (4,004 images, 77 printed fonts), `"test"` (1,040, 10 printed fonts of other families) or
            `"handwriting"` (1,040, 5 fonts made from handwriting).

    Raises:
        DataError: a package with fonts is not installed, or lacks a font.
    """
    images, labels, names = [], [], []
    generator = np.random.RandomState(SEED)  # its stream is frozen: the same in every version of numpy
    for path in _font_files(split):
        # Without Raqm, which not every build of Pillow has.
        font = ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for letter in ascii_lowercase + ascii_uppercase:
            for repeat in range(SPLITS[split][0]):
                images.append(_draw(letter, font, generator))
                labels.append(ascii_lowercase.index(letter.lower()))
                names.append(f"glyphs/{path.stem}/{letter}/{repeat}")
    return LabeledImages(images, np.array(labels, dtype=np.int64), list(ascii_lowercase), names)
