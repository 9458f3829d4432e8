"""Model cards of a run."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoConfig

from m2mkd.experiment.report.read import read_report, result_of
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.files import explained_write_errors
from m2mkd.model_cards.parts import CARD_FILE
from m2mkd.model_cards.run_card import run_card


def render_card(
    run_folder: str | Path,
    arm: str,
    source: str,
    seed: int | None = None,
    with_code: bool = False,
    pairs: str | None = None,
    license: str = "apache-2.0",
    examples: Sequence[str] = (),
    has_routing: bool = False,
) -> ModelCard:
    """
    Render the model card of one arm of a finished run, see [`run_card`].

    Args:
        run_folder (`str` or `Path`): A finished run, with its `report.json`.
        arm, source, with_code, pairs, license, examples, has_routing: See [`run_card`].
        seed (`int`, *optional*): Seed of the arm. `None`: the run's first.

    Raises:
        `HubError`: there is no report, it is damaged, or the seed or arm is not in it.
    """
    report = read_report(Path(run_folder))
    folder, seed = RunFolder(run_folder, report["seed"]), report["seed"] if seed is None else seed
    result_of(report, folder.path, arm, seed)
    config = AutoConfig.from_pretrained(folder.arm(arm, seed), trust_remote_code=False)
    options = {"license": license, "examples": examples, "has_routing": has_routing}
    return run_card(report, config, folder.path.resolve().name, arm, source, seed, with_code, pairs, **options)


def write_cards(run_folder: str | Path) -> list[Path]:
    """
    Write `README.md` into the folder of every arm of a run, including the arms of its further seeds.

    Args:
        run_folder (`str` or `Path`): A finished run, with its `report.json`.

    Returns:
        `list[Path]`: The cards.

    Raises:
        `HubError`: there is no report, or it is damaged.
        `RunError`: a folder cannot be written.
    """
    report, cards = read_report(Path(run_folder)), []
    run = RunFolder(run_folder, report["seed"])
    for seed, own in report["seeds"].items():
        for arm, result in own["arms"].items():
            folder = run.arm(arm, int(seed))
            pairs = str(run.of_seed(int(seed))) if result["arm"]["init"] == "modules" else None
            with explained_write_errors(folder):
                render_card(run_folder, arm, str(folder), seed=int(seed), pairs=pairs).save(folder / CARD_FILE)
            cards.append(folder / CARD_FILE)
    return cards
