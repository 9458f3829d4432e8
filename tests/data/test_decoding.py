import os
from io import BytesIO
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from m2mkd.data import DataError
from m2mkd.data.decoding import decode_image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRADIENT = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))


class TestDecodeImage:
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
    def test_every_mode_becomes_rgb(self, mode):
        assert decode_image(encode(GRADIENT.convert(mode), "PNG"), "x").mode == "RGB"

    def test_pixels(self):
        assert np.array_equal(np.asarray(decode_image(encode(GRADIENT, "PNG"), "x"))[:, :, 1], np.asarray(GRADIENT))

    def test_exif_orientation(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        assert decode_image(encode(GRADIENT.convert("RGB"), "JPEG", exif=exif), "x").size == (6, 8)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_truncated(self, kind):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        data = encode(noise, kind)
        with pytest.raises(DataError, match="cannot decode the image half.img"):
            decode_image(data[: len(data) // 2], "half.img")

    def test_sixteen_bits(self):
        deep = Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16))
        with pytest.raises(DataError, match="deep.png has mode I;16"):
            decode_image(encode(deep, "PNG"), "deep.png")

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match="nothing.png"):
            decode_image(str(tmp_path / "nothing.png"), "nothing.png")


class TestUntrustedFiles:
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "x.png")
        with pytest.raises(DataError, match="x.png .*not an ordinary file.*replace or remove it"):
            decode_image(str(tmp_path / "x.png"))

    def test_no_program_is_run_for_an_image(self, monkeypatch):
        started = Mock()
        monkeypatch.setattr("subprocess.check_call", started)
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
        with pytest.raises(DataError, match="x.jpg .*PostScript"):
            decode_image(encode(GRADIENT.convert("RGB"), "EPS"), "x.jpg")
        assert not started.called

    def test_too_many_pixels_are_refused_before_they_are_decoded(self, monkeypatch):
        data = encode(GRADIENT, "PNG")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        monkeypatch.setattr(Image.Image, "load", Mock(side_effect=AssertionError))
        with pytest.raises(DataError, match="DecompressionBombError.*48 pixels"):
            decode_image(data, "x.png")
