"""report.html: what it says, that it needs nothing else, and how it looks in a browser."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd.data.config import DataConfig
from m2mkd.errors import DataError
from m2mkd.experiment.artifact import read_noted_recipe
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.report import make_report
from m2mkd.experiment.report.chart import Chart, Series
from m2mkd.experiment.report.html import to_html
from m2mkd.experiment.report.pictures import ShownImages


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """The elements of a page; raises for one that is closed in the wrong order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return Page((finished_run / "report.html").read_text())


def test_it_needs_no_other_file(page: Page) -> None:
    sources = [own[name] for _, own in page.elements for name in ("src", "href") if name in own]
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not page.all("script") and not page.all("link")


def test_a_screen_reader_and_a_keyboard_reach_everything(page: Page) -> None:
    assert all(own["alt"] for own in page.all("img")) and all(own["aria-label"] for own in page.all("svg"))
    ids = {own["id"] for _, own in page.elements if "id" in own}
    links = [own["href"].removeprefix("#") for own in page.all("a")]
    assert {"results", "frontier", "curves", "experts", "images", "worst", "cost", "reproduce"} < set(links) == ids
    assert all(own.get("tabindex") == "0" for own in page.all("pre"))


def test_it_says_what_report_json_says(page: Page, finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    for name, result in report["arms"].items():
        assert name in page.text and f"{100 * result['iid']['accuracy']:.1f}" in page.text
    load = report["arms"]["m2mkd"]["expert_load"]
    assert all(f"{100 * share:.1f}" in page.text for shares in load.values() for share in shares)
    by_class = json.loads((finished_run / "arms" / "m2mkd" / "eval_results.json").read_text())["per_class"]
    worst = min(by_class, key=lambda name: by_class[name]["accuracy"])
    assert page.text.split("Worst classes")[-1].split("first.")[1].strip().startswith(f"{worst}: ")
    assert sum(result["n"] for result in by_class.values()) == report["arms"]["m2mkd"]["iid"]["n"]


def test_wrong_answers_come_first(finished_run: Path) -> None:
    recipe = read_noted_recipe(finished_run)
    shown = ShownImages(DataConfig.model_validate(recipe["data"]["iid"]), finished_run / "arms" / "e2e")
    rows = shown.worst()
    assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows)
    for row in rows:
        right = ["✓" in image.caption for image in row["images"]]
        assert right == sorted(right) and sum(right) == round(row["accuracy"] * row["n"])
    assert len({image["image"].caption.split(":")[0] for image in shown.routing()}) == len(rows) == 3


def test_names_are_text_and_not_html(finished_run: Path) -> None:
    report = json.loads((finished_run / "report.json").read_text())
    report["recipe"]["name"] = "<script>alert(1)</script>"
    page = Page(to_html(report, {}, None, {}))
    assert not page.all("script") and "<script>alert(1)</script>" in page.text and not page.all("img")


def test_without_the_images_the_rest_is_written(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    content = {**read_noted_recipe(tmp_path / "run"), "output_dir": str(tmp_path / "run")}
    content["data"]["iid"]["source"] = f"imagefolder:{tmp_path / 'gone'}"
    make_report(parse_recipe(content, "the noted recipe"))
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "No test images are shown: " in page.text and "gone" in page.text and "Experts" in page.text
    stream = DataConfig(source="user/set", streaming=True, split="test")
    with pytest.raises(DataError, match="user/set is a stream"):
        ShownImages(stream, finished_run / "arms" / "e2e")


def test_points_lie_inside_their_chart() -> None:
    series = [Series("a", "red", [(1.0, 50.0), (4.0, 80.0)]), Series("b", "blue", [(2.0, 60.0)], spread=5.0)]
    chart = Chart("Title", "x", "y", series, level=("teacher", 90.0))
    assert chart.left < chart.x(1.0) < chart.x(4.0) < chart.width
    assert 0 < chart.y(90.0) < chart.y(80.0) < chart.y(50.0) < chart.height - 40
    assert 0.0 in chart.x_ticks and 80.0 in chart.y_ticks
    assert chart.text == "Title. y by x, at the end: a 80.0 at 4; b 60.0 at 2; teacher 90.0"
    # a single point has no range of its own
    alone = Chart("Title", "x", "y", [Series("a", "red", [(0.0, 50.0)])])
    assert alone.left <= alone.x(0.0) < alone.width and 0 < alone.y(50.0) < alone.height


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(finished_run: Path, tmp_path: Path, width: int) -> None:
    def browse(*options: str) -> str:
        always = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
        command = [CHROMIUM, *always, f"--window-size={width},900", *options, (tmp_path / "page.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    root = "document.documentElement"
    measure = f"<script>document.body.dataset.over = {root}.scrollWidth - {root}.clientWidth</script></body>"
    text = (finished_run / "report.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", measure))
    # nothing sticks out to the right
    assert browse("--dump-dom").split('data-over="')[1].split('"')[0] == "0"
    corners = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        browse(f"--blink-settings=preferredColorScheme={number}", f"--screenshot={shot}")
        pixels = np.asarray(Image.open(shot).convert("L"))
        assert pixels.shape[1] == width and pixels.std() > 5
        corners[scheme] = pixels[0, 0]
    assert corners["dark"] < 40 and corners["light"] == 255
