"""Implementation of `m2mkd assemble`: a student from the distilled modules of a run or of a repository on the Hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from m2mkd.distillation.pair_folder import (
    CONTRACT_FILE,
    load_stage,
    match_pairs,
    read_contract,
    unknown_networks,
    with_stitches,
)
from m2mkd.distillation.split import new_network, split_into_stages
from m2mkd.errors import HubError
from m2mkd.files import check_inside, write_folder
from m2mkd.hub.requests import explained_hub_errors, patiently


PROCESSOR_FILE = "preprocessor_config.json"


def assemble(out: str | Path, sources: Sequence[str], keep_stitches: bool = False) -> list[str]:
    """
    Build a student from the modules of its pairs.

    Args:
        out (`str` or `Path`): Folder to create. It appears whole or not at all.
        sources (`Sequence[str]`): Sources of the pairs, see [`pair_folders`]. Together they give each pair once.
        keep_stitches (`bool`): Whether a V-MoE keeps the stitches between its modules, as it does in a run with
            `finetune.keep_stitches`.

    Returns:
        `list[str]`: Sentences that say what was built, and what is unknown about it.

    Raises:
        `PairFileError`: the pairs are not of one student, or one is missing, given twice, or damaged; or the student
            has no place for stitches.
        `HubError`: a source has no pairs, or cannot be fetched; `out` already exists.
        `RunError`: the folder cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f"{out} already exists and is not empty. Give a new folder, or delete it.")
    folders = [folder for source in sources for folder in pair_folders(source)]
    for folder in folders:
        check_inside(folder, folder.glob("*.*"), HubError)
    folders = match_pairs(folders)
    depths = [len(read_contract(folder)["layers"]) for folder in folders]
    model = new_network(AutoConfig.from_pretrained(folders[0], trust_remote_code=False), depths, seed=0)
    fresh = dict(model.state_dict())
    for stage, folder in zip(split_into_stages(model, depths), folders, strict=True):
        load_stage(stage, folder)
        for name in stage.distilled().state_dict():
            fresh.pop(name, None)
    if keep_stitches:
        model = with_stitches(model, folders)
    processors = [folder / PROCESSOR_FILE for folder in folders if (folder / PROCESSOR_FILE).is_file()]

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        for processor in processors[:1]:
            shutil.copy(processor, temporary / PROCESSOR_FILE)

    write_folder(out, write)
    said = [f"{type(model).__name__} of {len(folders)} modules is in {out}."]
    if fresh:
        said.append(f"No module contains these tensors, so they are re-initialized: {', '.join(sorted(fresh))}.")
    if not processors:
        said.append(f"No module has a {PROCESSOR_FILE}, so the student's input size and normalization are unknown.")
    return said + unknown_networks(folders)


def pair_folders(source: str) -> list[Path]:
    """
    List the folders of pairs in a source.

    Args:
        source (`str`): The folder of a pair, a folder of such folders, or the folder of a run or of one of its seeds;
            or the same on the Hub, as `user/name`, `user/name/pairs` or `user/name/pairs/0`.

    Raises:
        `HubError`: there are none, or the source cannot be fetched.
    """
    folder = Path(source) if Path(source).exists() else _fetched(source)
    if (folder / CONTRACT_FILE).is_file():
        return [folder]
    inside = folder / "pairs" if (folder / "pairs").is_dir() else folder
    found = sorted(path.parent for path in inside.glob(f"*/{CONTRACT_FILE}"))
    if not found:
        raise HubError(
            f"{source} has no pairs: neither it nor a folder in it has a {CONTRACT_FILE}. Give the folder of a run or "
            "of a pair, or the id of a repository that `m2mkd push` filled with a distilled student."
        )
    return found


def _fetched(source: str) -> Path:
    parts = PurePosixPath(source).parts
    repo_id, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if len(parts) < 2 or parts[0] == "/" or ".." in parts:
        raise HubError(f"{source} is neither a local folder nor an id on the Hub (user/name, or user/name/pairs/0).")
    patterns = [f"{inside or 'pairs'}/*.{ending}" for ending in ("json", "safetensors")]
    try:
        with explained_hub_errors(repo_id, "read"):
            root = patiently(lambda: snapshot_download(repo_id, allow_patterns=patterns))
    except HubError as error:
        raise HubError(f"{source} is not a local folder, and on the Hub: {error}") from error
    return Path(root, inside)
