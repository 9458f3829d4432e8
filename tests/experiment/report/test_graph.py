"""A whole run with a NAC, and its picture of the graph."""

import json

import pytest
from tiny_run import recipe_content

from m2mkd import NACForImageClassification
from m2mkd.errors import RecipeError
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.runner import run


NAC = {
    "hidden_size": 8,
    "code_size": 6,
    "signature_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "tokenizer_depths": [1],
    "tokenizer_hidden_sizes": [4],
    "position_embedding_size": 4,
    "num_input_latents": 3,
    "num_mediator_latents": 6,
    "num_output_latents": 2,
    "graph_prior": "ring_of_cliques",
    "graph_prior_kwargs": {"num_cliques": 2, "clique_size": 3},
}


def nac_recipe(tmp_path, **changes):
    student = {"model": {"model_type": "nac", "config": NAC}, "depths": [2, 1]}
    return parse_recipe(recipe_content(tmp_path, student=student, **changes), "the tiny NAC recipe")


def test_a_whole_run(tmp_path) -> None:
    once = {"num_train_epochs": 1, "per_device_train_batch_size": 12}
    recipe = nac_recipe(tmp_path, distill={"data": "train", "training": {"nac_codes": "own"}}, training=once)
    report = run(recipe)
    folder = tmp_path / "run"
    assert (folder / "graph.png").is_file()
    assert "](graph.png)" in report.read_text()
    shares = json.loads((folder / "report.json").read_text())["graph_density"]
    assert shares.keys() == {"before training", "e2e", "kd", "m2mkd"}
    # two rings of three: 6 edges within, 2 between, of 15
    assert shares["before training"] == pytest.approx(8 / 15)
    model = NACForImageClassification.from_pretrained(folder / "arms" / "m2mkd")
    assert model.config.graph_prior == "ring_of_cliques"
    # a finished run is a report alone
    assert run(recipe) == report


def test_stitches_cannot_be_kept(tmp_path) -> None:
    with pytest.raises(RecipeError, match="keep_stitches"):
        nac_recipe(tmp_path, finetune={"data": "labelled", "keep_stitches": True})
