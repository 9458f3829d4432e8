"""`m2mkd inspect`: a picture, or one sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from testing_utils import IMAGE_SIZE, ROUTERS, nac, vit, vmoe
from tiny_run import write_images
from transformers import PreTrainedModel
from typer.testing import CliRunner

from m2mkd.cli import app
from m2mkd.data import DataConfig, build_image_processor


def saved(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    pixels = DataConfig(source="x", image_size=IMAGE_SIZE, mean=[0.5] * 3, std=[0.2] * 3)
    build_image_processor(pixels).save_pretrained(folder)
    return str(folder)


def pictures(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    paths = [str(folder / f"a picture with a long name, number {index}.png") for index in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, size=(11, 14, 3), dtype=np.uint8)).save(path)
    return paths


def inspect(folder: Path, *words: str) -> tuple[Image.Image | None, str]:
    out = folder / "out.png"
    done = CliRunner().invoke(app, ["inspect", *words, "--out", str(out)])
    assert done.exit_code in (0, 1) and (done.exception is None or isinstance(done.exception, SystemExit))
    return (Image.open(out) if done.exit_code == 0 else None), done.output


def colors_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in picture.convert("RGB").getcolors(2**24)}


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(
    "options",
    [{}, *ROUTERS.values(), {"num_experts": 12}, {"num_ensemble_members": 2}, {"classifier_pooling": "gap"}],
    ids=[*["default", *ROUTERS], "12 experts", "ensemble", "no class token"],
)
def test_the_routing_of_images(tmp_path: Path, options: dict, count: int) -> None:
    model = saved(tmp_path / "model", vmoe(**options))
    picture, said = inspect(tmp_path, model, *pictures(tmp_path, count))
    assert picture is not None and "The picture is in" in said
    rows = count * options.get("num_ensemble_members", 1)
    # 1.9 inches a row, and title and legend
    assert picture.height == pytest.approx(110 * (1.9 * rows + 1.1), abs=2)
    assert len(colors_of(picture)) > 50


def test_images_are_routed_alone_whatever_the_groups(tmp_path: Path) -> None:
    """Groups of 7 tokens fit no image."""
    model = saved(tmp_path / "model", vmoe(router_group_size=7, **ROUTERS["capacity"]))
    assert inspect(tmp_path, model, *pictures(tmp_path, 1))[0] is not None


def test_the_experts_of_the_classes_with_and_without_images(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", vmoe())
    data = ("--data", f"imagefolder:{write_images(tmp_path / 'data')}")
    alone, _ = inspect(tmp_path, model, *data)
    (tmp_path / "out.png").unlink()
    both, _ = inspect(tmp_path, model, *pictures(tmp_path, 2), *data)
    assert both.height > alone.height > 100


def test_the_read_in_and_the_graph_of_a_nac(tmp_path: Path) -> None:
    for name, latents in (("few", 3), ("many", 20)):
        model = saved(tmp_path / name, nac(num_input_latents=latents))
        picture, _ = inspect(tmp_path, model, *pictures(tmp_path, 2))
        # image, mean, and at most six latents
        assert picture.width == pytest.approx(110 * (1.5 * (2 + min(latents, 6)) + 1), abs=2)
        (tmp_path / "out.png").unlink()


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (vmoe, ["nowhere.png"], "There is no image file nowhere.png"),
        (vmoe, ["text.png"], "cannot decode the image text.png"),
        (vmoe, [], "There is nothing to draw"),
        (vmoe, ["--data", "imagefolder:nowhere"], "nowhere"),
        (vit, ["image.png"], "holds a ViTForImageClassification, which has no experts and no graph"),
        (lambda: vmoe(moe_layers=[]), ["image.png"], "has no sparse layer"),
        (nac, ["image.png", "--data", "imagefolder:data"], "--data shows the experts of a V-MoE"),
        (lambda: vmoe(image_size=16), ["image.png"], "cannot route these images"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch, model, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no image")
    Image.new("RGB", (8, 8), "red").save("image.png")
    write_images(Path("data"))
    picture, said = inspect(tmp_path, saved(tmp_path / "model", model()), *arguments)
    assert picture is None and message in said and not Path("out.png").exists()


def test_a_folder_without_image_processor(tmp_path: Path) -> None:
    vmoe().save_pretrained(tmp_path / "model")
    assert "has no image processor" in inspect(tmp_path, str(tmp_path / "model"), *pictures(tmp_path, 1))[1]


def test_files_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("mine")
    assert "already exists" in inspect(tmp_path, "model", "image.png")[1]
    assert (tmp_path / "out.png").read_text() == "mine"
    done = CliRunner().invoke(app, ["inspect", "model", "image.png", "--out", str(tmp_path / "out.jpg")])
    assert done.exit_code == 1 and "is no PNG file" in done.output
