"""Implementation of `m2mkd push`: one arm of a run goes to a repository on the Hub, in one commit."""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from rich.console import Console
from rich.table import Table

from m2mkd.distillation.pair_folder import CONTRACT_FILE, match_pairs
from m2mkd.errors import HubError
from m2mkd.experiment.artifact import REPEAT, is_finished
from m2mkd.experiment.report.cards import render_card
from m2mkd.experiment.report.read import read_report, result_of
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.files import read_json
from m2mkd.hub.code_export import hub_code
from m2mkd.hub.requests import explained_hub_errors, patiently
from m2mkd.model_cards.parts import CARD_FILE


# By path in the repository: a file, or its content.
Files = dict[str, Path | bytes]
# Files of a folder that are pushed: tensors and what is needed to use them, no results of the run, no pickles.
_PUSHED = ("*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", CONTRACT_FILE)


def files_to_push(
    run_folder: str | Path,
    arm: str,
    repo_id: str,
    seed: int | None = None,
    with_code: bool = False,
    license: str = "apache-2.0",
) -> Files:
    """
    Collect the files of a repository of one arm: the model, its image processor and card, with `with_code` its
    sources, and for a distilled student its modules in `pairs/<i>`, each with its stitches and contract.

    Args:
        run_folder (`str` or `Path`): A finished run.
        arm (`str`): A folder in its `arms/`.
        repo_id (`str`): Id that the card names.
        seed (`int`, *optional*): Seed of the arm. `None`: the run's first.
        with_code (`bool`): Whether to add the model's code, so that it loads without this package.
        license (`str`): The license of the weights, as the Hub names it.

    Raises:
        `HubError`: the run is not finished, or has no such seed or arm.
        `PairFileError`: a pair is missing, or is from another distillation than the others.
    """
    run_folder = Path(run_folder)
    report = read_report(run_folder)
    seed = report["seed"] if seed is None else seed
    words = result_of(report, run_folder, arm, seed)["arm"]
    run = RunFolder(run_folder, report["seed"])
    folder = run.arm(arm, seed)
    if not is_finished(folder):
        raise HubError(f"{folder} is not finished. Run the recipe again: finished phases are kept.")
    places = [run.pair(index, seed) for index in range(len(report["recipe"]["student"]["depths"]))]
    pairs = _pairs(places) if words["init"] == "modules" else []
    card = render_card(run_folder, arm, repo_id, seed, with_code, pairs=repo_id if pairs else None, license=license)
    files: Files = {CARD_FILE: str(card).encode(), **_model_files(folder)}
    if with_code:
        files.update({name: text.encode() for name, text in hub_code(folder).items()})
    for index, pair in enumerate(pairs):
        files.update({f"pairs/{index}/{name}": content for name, content in _model_files(pair).items()})
    return dict(sorted(files.items()))


def push(files: Files, repo_id: str, message: str, public: bool = False) -> str:
    """
    Create the repository if it does not exist, and write all files in one commit: readers see all of them or none.

    Args:
        files (`dict`): From [`files_to_push`].
        repo_id (`str`)
        message (`str`): Message of the commit.
        public (`bool`): Whether to create a public repository. An existing repository keeps its visibility.

    Returns:
        `str`: Address of the repository, and who may read it.

    Raises:
        `HubError`: the Hub refuses or cannot be reached, or the repository is public and `public` is not set; nothing
            is written.
    """
    api = HfApi(library_name="m2mkd")
    with explained_hub_errors(repo_id, "write to"):
        url = patiently(lambda: api.create_repo(repo_id, private=not public, exist_ok=True))
        is_private = patiently(lambda: api.repo_info(url.repo_id)).private
        if not is_private and not public:
            raise HubError(f"{url.repo_id} already exists and is public. Give --public, or another --repo-id.")
        # an operation can be used in one commit only
        patiently(
            lambda: api.create_commit(
                url.repo_id, [CommitOperationAdd(*file) for file in files.items()], commit_message=message
            )
        )
    return f"{url} ({'private' if is_private else 'public'})"


def print_files(files: Files, console: Console | None = None) -> None:
    """Print the files that would be pushed; `console` defaults to the terminal."""
    table = Table("File", "Bytes")
    table.columns[1].justify = "right"
    for name, content in files.items():
        table.add_row(name, f"{_size(content):,}")
    table.add_section()
    table.add_row(f"{len(files)} files", f"{sum(map(_size, files.values())):,}")
    # a log file has no width of its own
    console = console or Console(width=None if Console().is_terminal else 100)
    console.print(table)


def _pairs(pairs: list[Path]) -> list[Path]:
    for pair in pairs:
        if not is_finished(pair):
            raise HubError(f"{pair} is not finished. Run the recipe again: finished phases are kept.")
    return match_pairs(pairs)


def _model_files(folder: Path) -> Files:
    config = read_json(folder / "config.json", HubError, REPEAT.format(folder=folder))
    # from an earlier export: it would name code that is not pushed
    config.pop("auto_map", None)
    found = sorted(path for pattern in _PUSHED for path in folder.glob(pattern))
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **{path.name: path for path in found}}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
