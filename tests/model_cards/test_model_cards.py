"""The hand-written cards: metadata that huggingface_hub accepts, figures that README has too."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData


ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted((ROOT / "model_cards").glob("digits_*.md"))


@pytest.fixture(params=CARDS, ids=lambda path: path.stem)
def card(request: pytest.FixtureRequest) -> ModelCard:
    return ModelCard.load(request.param, ignore_metadata_errors=False)


def table(text: str) -> list[list[str]]:
    """The cells of the table of arms."""
    rows = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_the_metadata_are_those_of_an_image_classifier(card: ModelCard):
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.license == "apache-2.0" and "m2mkd" in data.tags
    # what is read back is what is written, the model-index included
    again = ModelCard(card.content)
    assert again.data.to_dict() == data.to_dict()


def test_a_newcomer_finds_everything(card: ModelCard):
    sections = re.findall(r"^## (.*)$", card.text, flags=re.MULTILINE)
    assert sections == [
        "How to make it",
        "How to use it",
        "Results",
        "Training data",
        "Limits",
        "License",
        "Citation",
    ]
    assert "import m2mkd" in card.text and "pip install" in card.text


def test_the_figures_of_the_vmoe_are_those_of_its_page():
    card = ModelCard.load(ROOT / "model_cards" / "digits_vmoe.md")
    rows = table(card.text)
    page = table((ROOT / "docs" / "digits_paper.md").read_text(encoding="utf-8"))
    assert rows and all(row in page for row in rows), "measured anew? Both tables need the new figures"
    (distilled,) = [row for row in rows if row[0] == "`m2mkd`"]
    means = [float(cell.split(" ± ")[0]) for cell in distilled[1:3]]
    assert [100 * result.metric_value for result in card.data.eval_results] == pytest.approx(means)
