"""`M2MKDTrainer(push_to_hub=True)` against a Hub on this machine."""

import runpy
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from local_hub import LocalHub
from PIL import Image
from testing_utils import assert_equal, code_blocks, commands, distillation_trainer, images, vmoe
from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline
from typer.testing import CliRunner

from m2mkd import M2MKDConfig
from m2mkd.cli import app
from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


STUDENT = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def pushing_trainer(folder: Path, **overrides) -> M2MKDTrainer:
    """Four steps, a checkpoint after every other one; every push waits for the one before."""
    return distillation_trainer(
        folder / "out",
        push_to_hub=True,
        hub_model_id="alice/student",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
        **overrides,
    )


def end_to_end(folder: Path, **overrides) -> M2MKDTrainer:
    whole = {"student_depths": None, "teacher_depths": None, "meta_depths": None}
    return pushing_trainer(folder, teacher=None, meta=None, alpha=0.0, **whole, **overrides)


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_each_strategy_leaves_a_student_that_loads(
    hub: LocalHub, tmp_path: Path, strategy: str, folders: set[str]
) -> None:
    trainer = end_to_end(tmp_path, hub_strategy=strategy, hub_private_repo=True)
    trainer.train()
    trainer._finish_current_push()
    repo = hub.repos["alice/student"]
    assert repo.private
    assert set(repo.files) == (set() if strategy == "end" else STUDENT) | {
        name for name in repo.files if name.split("/")[0] in folders
    }
    assert {name.split("/")[0] for name in repo.files if "/" in name} == folders
    assert sum("Training in progress" in text for text in repo.messages) == {"end": 0, "every_save": 2}.get(
        strategy, 4
    )

    trainer.push_to_hub()
    assert set(repo.files) >= STUDENT and not [name for name in repo.files if "/" not in name and name not in STUDENT]
    model = AutoModelForImageClassification.from_pretrained("alice/student").eval()
    with torch.no_grad():
        assert torch.equal(model(images()).logits, trainer.student.eval()(images()).logits)
    red = str(tmp_path / "red.png")
    Image.new("RGB", (8, 8), "red").save(red)
    assert len(pipeline("image-classification", model="alice/student")(red)) == 5
    if strategy == "checkpoint":
        # what was pushed is enough to go on
        folder = snapshot_download("alice/student", allow_patterns="last-checkpoint/*")
        again = end_to_end(tmp_path / "again", max_steps=6)
        again.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
        assert again.state.global_step == 6


def test_the_card_says_how_to_load_it(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = end_to_end(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(license="mit", tags="digits", dataset_tags="mnist")
    card = ModelCard.load("alice/student")
    assert commands(card.content) == [["pip", "install", "m2mkd"]]
    assert {"m2mkd", "vmoe", "digits"} <= set(card.data.tags)
    assert (card.data.license, card.data.datasets, card.data.library_name) == ("mit", ["mnist"], "transformers")
    assert "None" not in card.text and str(tmp_path) not in card.text

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("image.png")
    Path("card.py").write_text("\n".join(code_blocks(card.content, "python")))
    ran = runpy.run_path("card.py")
    with torch.no_grad():
        pixels = ran["processor"](Image.open("image.png"), return_tensors="pt")["pixel_values"]
        ours = trainer.student.eval()(pixels).logits
    torch.testing.assert_close(ran["logits"].detach(), ours, rtol=0, atol=1e-6)
    (arguments,) = code_blocks(card.content, "yaml")
    again = M2MKDConfig(output_dir="again", **yaml.safe_load(arguments))
    assert (again.learning_rate, again.max_steps, again.alpha) == (0.05, 4, 0.0)


def test_modules_can_be_pushed_one_by_one_and_assembled(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {}
    for index in (0, 1, 2):
        # of one student, as on three machines
        trainer = pushing_trainer(tmp_path / str(index), model=vmoe(), pairs=[index], hub_strategy="end")
        trainer.train()
        trainer.push_to_hub()
        trained.update(trainer.trained_pairs()[index].stage.state_dict())
    files = hub.repos["alice/student"].files
    assert "model.safetensors" not in files and "pairs/2/pair.json" in files
    # as the card says it
    install, assemble = commands(files["README.md"].decode())
    assert install == ["pip", "install", "m2mkd"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, assemble[1:])
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert_equal(model.state_dict(), trained)


def test_saving_the_model_pushes_it(hub: LocalHub, tmp_path: Path) -> None:
    end_to_end(tmp_path, hub_strategy="end").save_model()
    repo = hub.repos["alice/student"]
    assert set(repo.files) == STUDENT and repo.messages == ["Model save"]


def test_an_upload_that_fails_once_is_tried_again(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = end_to_end(tmp_path, hub_strategy="end")
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("PUT", "/blobs/", 503)
    trainer.push_to_hub()
    assert set(hub.repos["alice/student"].files) == STUDENT and hub.failures[0].times == 0


def test_a_push_that_fails_stops_no_training(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("m2mkd.trainer.student_trainer.logger.warning", said.append)
    trainer = end_to_end(tmp_path, hub_strategy="every_save")
    hub.fail("POST", "/commit/", 400)
    trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step == 4
    assert any("A push to the Hub failed; training goes on" in text for text in said)
    # the next one brought everything
    assert set(hub.repos["alice/student"].files) == STUDENT
