"""Pushing from a run's folder: one arm, its demo, or all arms with a collection."""

from dataclasses import dataclass
from pathlib import Path

from m2mkd.experiment.report.read import default_arm, read_report
from m2mkd.hub.push import collect_models, files_to_push, print_files, push, write_copy
from m2mkd.hub.space import space_files


@dataclass(frozen=True)
class Destination:
    """
    Where files go.

    Args:
        repo_id (`str`): The repository, `USER/NAME`.
        public (`bool`)
        dry_run (`bool`): Only print what would be pushed.
        out (`Path`, *optional*): Write the files to this new folder instead.
    """

    repo_id: str
    public: bool
    dry_run: bool
    out: Path | None


def push_run(
    run_folder: Path,
    to: Destination,
    arm: str | None,
    seed: int | None,
    space: bool,
    with_code: bool,
    license: str,
    with_images: bool,
) -> None:
    """
    What `m2mkd push` does; it prints the files and what happened to them.

    Args:
        run_folder (`Path`): A finished run.
        to (`Destination`)
        arm (`str`, *optional*): Name of an arm, empty for the distilled student. `None`: all arms, to
            `USER/NAME-<arm>`, and a collection `NAME` of them.
        seed (`int`, *optional*): Seed of the arm. `None`: the recipe's.
        space (`bool`): Push a demo instead of the model.
        with_code, license, with_images: See [`~m2mkd.hub.push.files_to_push`].

    Raises:
        `HubError`: the run has no such arm, or the Hub refuses.
    """
    arms = list(read_report(run_folder)["arms"]) if arm is None else [arm or default_arm(run_folder)]
    targets = {to.repo_id if arm is not None else f"{to.repo_id}-{name}": name for name in arms}
    for target, name in targets.items():
        if space:
            files = space_files(run_folder, name, seed, license, with_images)
        else:
            files = files_to_push(run_folder, name, target, seed, with_code, license, with_images)
        print_files(files)
        if to.out is not None:
            write_copy(files, to.out)
            print(f"The files are in {to.out}. Nothing was sent.")
        elif to.dry_run:
            print(f"Nothing was sent. This would be pushed to {target} ({'public' if to.public else 'private'}).")
        else:
            message = f"{name} of {run_folder.resolve().name}"
            print(f"Pushed to {push(files, target, message, to.public, 'space' if space else 'model')}.")
    if arm is None and not to.dry_run:
        print(f"Collected in {collect_models(to.repo_id.partition('/')[2], list(targets), to.public)}.")
