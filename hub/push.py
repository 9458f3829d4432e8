"""Implementation of `m2mkd push`: one arm of a run goes to a repository on the Hub, in one commit."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi
from rich.console import Console
from rich.table import Table

from m2mkd.data.config import DataConfig
from m2mkd.distillation.pair_folder import CONTRACT_FILE, match_pairs
from m2mkd.errors import HubError, WriteError
from m2mkd.experiment.artifact import REPEAT, is_finished
from m2mkd.experiment.report.cards import render_card
from m2mkd.experiment.report.pictures import ShownImages, png
from m2mkd.experiment.report.read import read_report, result_of
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.files import check_inside, read_json, write_folder
from m2mkd.hub.code_export import hub_code
from m2mkd.hub.eval_results import eval_files
from m2mkd.hub.requests import explained_hub_errors, patiently
from m2mkd.model_cards.parts import CARD_FILE, ROUTING_FILE


EXAMPLES = 3
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
    with_images: bool = False,
) -> Files:
    """
    Collect the files of a repository of one arm: the model, its image processor and card, its accuracy on data sets
    of the Hub, with `with_code` its sources, with `with_images` some test images, and for a distilled student its
    modules in `pairs/<i>`, each with its stitches and contract.

    Args:
        run_folder (`str` or `Path`): A finished run.
        arm (`str`): A folder in its `arms/`.
        repo_id (`str`): Id that the card names.
        seed (`int`, *optional*): Seed of the arm. `None`: the run's first.
        with_code (`bool`): Whether to add the model's code, so that it loads without this package.
        license (`str`): The license of the weights, as the Hub names it.
        with_images (`bool`): Whether to add test images, as examples of the page's widget and with the model's routing
            drawn on them in the card.

    Raises:
        `HubError`: the run is not finished, or has no such seed or arm.
        `DataError`: the test images cannot be loaded.
        `PairFileError`: a pair is missing, or is from another distillation than the others.
    """
    report, run, folder, seed = finished_arm(run_folder, arm, seed)
    words = report["seeds"][str(seed)]["arms"][arm]["arm"]
    places = [run.pair(index, seed) for index in range(len(report["recipe"]["student"]["depths"]))]
    pairs = _pairs(places) if words["init"] == "modules" else []
    files: Files = {**model_files(folder), **eval_files(report, arm, seed, repo_id)}
    examples, routing = example_pictures(report, folder) if with_images else ({}, None)
    own = {"pairs": repo_id if pairs else None, "license": license, "examples": list(examples)}
    card = render_card(run_folder, arm, repo_id, seed, with_code, has_routing=routing is not None, **own)
    files |= {CARD_FILE: str(card).encode(), **examples, **({} if routing is None else {ROUTING_FILE: routing})}
    if with_code:
        files.update({name: text.encode() for name, text in hub_code(folder).items()})
    for index, pair in enumerate(pairs):
        files.update({f"pairs/{index}/{name}": content for name, content in model_files(pair).items()})
    return dict(sorted(files.items()))


def finished_arm(run_folder: str | Path, arm: str, seed: int | None) -> tuple[dict[str, Any], RunFolder, Path, int]:
    """
    Find an arm of a run: the report, the run's folder, the arm's, and its seed (`None`: the run's first). Raises
    `HubError` if the run is not finished, or has no such seed or arm.
    """
    report = read_report(Path(run_folder))
    seed = report["seed"] if seed is None else seed
    result_of(report, Path(run_folder), arm, seed)
    run = RunFolder(run_folder, report["seed"])
    folder = run.arm(arm, seed)
    if not is_finished(folder):
        raise HubError(f"{folder} is not finished. Run the recipe again: finished phases are kept.")
    return report, run, folder, seed


def example_pictures(report: dict[str, Any], folder: Path) -> tuple[Files, bytes | None]:
    """
    Some images of a run's IID test set, by path in the repository, and a picture of what the model in `folder` does
    with them (`None` if it has no experts and no latents). Raises `DataError` if the set cannot be loaded.
    """
    recipe = report["recipe"]
    shown = ShownImages(DataConfig.model_validate(recipe["data"][recipe["evaluation"]["iid"]]), folder)
    return {f"examples/{place}.png": png(shown.image(own)) for place, own in enumerate(shown.spread(3))}, shown.strip(
        3
    )


def push(
    files: Files, repo_id: str, message: str, public: bool = False, repo_type: Literal["model", "space"] = "model"
) -> str:
    """
    Create the repository if it does not exist, and write all files in one commit: readers see all of them or none.

    Args:
        files (`dict`): From [`files_to_push`].
        repo_id (`str`)
        message (`str`): Message of the commit.
        public (`bool`): Whether to create a public repository. An existing repository keeps its visibility.
        repo_type (`str`): `"model"`, or `"space"` for one that runs Gradio.

    Returns:
        `str`: Address of the repository, and who may read it.

    Raises:
        `HubError`: the Hub refuses or cannot be reached, or the repository is public and `public` is not set; nothing
            is written.
    """
    api = HfApi(library_name="m2mkd")
    with explained_hub_errors(repo_id, "write to"):
        kind = {"repo_type": repo_type, "space_sdk": "gradio" if repo_type == "space" else None}
        url = patiently(lambda: api.create_repo(repo_id, private=not public, exist_ok=True, **kind))
        is_private = patiently(lambda: api.repo_info(url.repo_id, repo_type=repo_type)).private
        if not is_private and not public:
            raise HubError(f"{url.repo_id} already exists and is public. Give --public, or another --repo-id.")
        # an operation can be used in one commit only
        patiently(
            lambda: api.create_commit(
                url.repo_id,
                [CommitOperationAdd(*file) for file in files.items()],
                commit_message=message,
                repo_type=repo_type,
            )
        )
    return f"{url} ({'private' if is_private else 'public'})"


def collect_models(title: str, repo_ids: list[str], public: bool = False) -> str:
    """
    Create a collection on the Hub, or find it, and put models into it.

    Args:
        title (`str`)
        repo_ids (`list[str]`): Models of one namespace, which becomes that of the collection.
        public (`bool`): Whether to create a public collection.

    Returns:
        `str`: Address of the collection.

    Raises:
        `HubError`: the Hub refuses or cannot be reached.
    """
    api, namespace = HfApi(library_name="m2mkd"), repo_ids[0].partition("/")[0]
    with explained_hub_errors(f"the collection {title!r} of {namespace}", "write to"):
        options = {"namespace": namespace, "private": not public, "exists_ok": True}
        collection = patiently(lambda: api.create_collection(title, **options))
        for repo_id in repo_ids:
            patiently(partial(api.add_collection_item, collection.slug, repo_id, "model", exists_ok=True))
    return collection.url


def write_copy(files: Files, folder: Path) -> None:
    """Write the files into a new folder. Raises `WriteError` if it exists or cannot be written."""
    if folder.exists():
        raise WriteError(f"{folder} already exists. Give a new folder, or delete it.")

    def write(temporary: Path) -> None:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())

    write_folder(folder, write)


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


def model_files(folder: Path) -> Files:
    """The files of a saved model that are pushed, by name: configuration, tensors, image processor, contract."""
    config = read_json(folder / "config.json", HubError, REPEAT.format(folder=folder))
    # from an earlier export: it would name code that is not pushed
    config.pop("auto_map", None)
    found = sorted(path for pattern in _PUSHED for path in folder.glob(pattern))
    check_inside(folder, found, HubError)
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **{path.name: path for path in found}}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
