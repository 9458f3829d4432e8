"""The command line: `train.py` and `m2mkd run`, `m2mkd report`, `m2mkd push`, `m2mkd assemble`, `m2mkd convert`."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    help="Modular vision models, distilled module by module.", no_args_is_help=True, add_completion=False
)

# Whatever is not a parameter of a command is a value of the recipe.
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("run", context_settings=_OVERRIDES, options_metavar="[RECIPE.yaml] [--key.sub value]...")
def run_command(context: typer.Context) -> None:
    """
    Run a recipe: train what is not finished, skip what is, write the report.

    Without a recipe, the embedded one runs: a V-MoE for digits, in minutes on a CPU.

    Any value of the recipe can be overridden: --seed 1 --finetune.training.num_train_epochs 3 --arms '[e2e, m2mkd]'.

    Several processes: accelerate launch train.py RECIPE.yaml, or torchrun --nproc_per_node N train.py RECIPE.yaml.
    """

    def work() -> None:
        from m2mkd.trainer.recipe import load_recipe
        from m2mkd.trainer.runner import run

        # not a parameter of the command: click would take the value of the first override for it
        has_recipe = bool(context.args) and not context.args[0].startswith("--")
        path, options = (context.args[0], context.args[1:]) if has_recipe else (None, context.args)
        report = run(load_recipe(path, _overrides(options)))
        if report is not None:
            _print_once(f"The report is in {report} (and report.json, report.png beside it).")

    _explained(work)


@app.command("report", context_settings=_OVERRIDES)
def report_command(context: typer.Context, run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER")]) -> None:
    """Write the report of a finished run again, from its folders."""

    def work() -> None:
        from m2mkd.trainer.folders import read_json
        from m2mkd.trainer.recipe import parse_recipe
        from m2mkd.trainer.runner import make_report

        source = run_folder / "recipe.json"
        content = {**read_json(source), "output_dir": str(run_folder), **_overrides(context.args)}
        _print_once(f"The report is in {make_report(parse_recipe(content, str(source)))}.")

    _explained(work)


@app.command("push")
def push_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A finished run.")],
    repo_id: Annotated[str, typer.Option(metavar="USER/NAME", help="The repository; it is made if need be.")],
    arm: Annotated[str, typer.Option(help="Which of the run's arms.")] = "m2mkd",
    seed: Annotated[int | None, typer.Option(help="Of which seed, if the run has several.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it; otherwise it is private.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model's code, for readers without m2mkd.")
    ] = False,
    license: Annotated[str, typer.Option(help="Of the weights, as the Hub names it.")] = "apache-2.0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go; send nothing.")] = False,
) -> None:
    """
    Push one arm of a run to the Hub, in one commit: the model, its image processor and card, and, of a distilled
    student, each of its modules in pairs/<i> with its stitches and contract.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """

    def work() -> None:
        from m2mkd.trainer.push import files_to_push, print_files, push

        files = files_to_push(run_folder, arm, repo_id, seed, with_code, license)
        print_files(files)
        if dry_run:
            print(f"Nothing was sent: this is what would go to {repo_id} ({'public' if public else 'private'}).")
            return
        print(f"It is at {push(files, repo_id, f'{arm} of {run_folder.resolve().name}', public)}.")

    _explained(work)


@app.command("assemble")
def assemble_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    sources: Annotated[list[str], typer.Argument(metavar="FOLDER_OR_ID...", help="Where the modules are.")],
) -> None:
    """
    Build a student from distilled modules: the folder of a run or of single pairs, or repositories on the Hub
    (user/name, or user/name/pairs/0).

    Modules of different distillations are refused. The stitches are left out: train the student end to end next.
    """

    def work() -> None:
        from m2mkd.trainer.assemble import assemble

        print("\n".join(assemble(out, sources)))

    _explained(work)


@app.command("convert")
def convert_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth, .pt, .safetensors or .npz file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    kind: Annotated[str, typer.Option(help="nac, nac-student, vmoe, vmoe-student, vit or vmoe-jax.")],
    config: Annotated[Path, typer.Option(help="The official YAML file; for vit and vmoe JSON, see below.")],
    stage: Annotated[int | None, typer.Option(help="Stage of a student or of a teacher, from 0.")] = None,
    num_stages: Annotated[int | None, typer.Option(help="Stages of a student's model. NAC: 10, V-MoE: 4.")] = None,
) -> None:
    """
    Convert an official checkpoint (of m2mKD, Deep Incubation or google-research/vmoe) to a Hugging Face folder.

    A NAC student is known by its file's name (ReadInStudent, MediatorStudent_3, ReadOutStudent) or by --stage.

    The official code has no file for the arguments of a ViT or V-MoE; give JSON or YAML, e.g.
    {"kwargs": {"patch_size": 14, "embed_dim": 1280, "num_heads": 16, "divided_depths": [4, 3, 4]}, "norm_eps": 1e-5}

    A vmoe-jax is the parameter tree of google-research/vmoe, flattened into one file of named arrays; its --config
    says what they do not show, e.g. {"num_selected_experts": 2}

    The folder of a student or of one stage holds that stage's tensors and its stitches, as a run's pairs/ do.
    """

    def work() -> None:
        from m2mkd.trainer.convert import convert

        print(convert(kind, config, checkpoint, out, stage, num_stages))

    _explained(work)


def main() -> None:
    """Entry point of the console script `m2mkd`."""
    app()


def train() -> None:
    """Entry point of `train.py`: `m2mkd run` under its own name."""
    app(["run", *sys.argv[1:]], prog_name="train.py")


def _overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` as values by dotted key."""
    from m2mkd.trainer.recipe import RecipeError, parse_value

    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise RecipeError(f"{name!r} is no option. Values of the recipe are given as --key.sub value.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"{name} has no value. Values of the recipe are given as --key.sub value.")
            value = rest.pop(0)
        overrides[name.removeprefix("--")] = parse_value(value)
    return overrides


def _explained(work: Callable[[], None]) -> None:
    """Run `work`; what a user can mend ends in its message alone, everything else in a traceback."""
    from m2mkd.data.errors import DataError
    from m2mkd.modeling.conversion import ConversionError
    from m2mkd.modeling.pair_files import PairFileError
    from m2mkd.modeling.stages import StageError
    from m2mkd.trainer.folders import RunError
    from m2mkd.trainer.hub import HubError
    from m2mkd.trainer.m2mkd_trainer import NonFiniteError
    from m2mkd.trainer.recipe import RecipeError
    from m2mkd.trainer.report import ReportError

    # transformers says for each of its image processors that torchvision, which we do not need, is not there
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        work()
    except (
        ConversionError,
        DataError,
        HubError,
        NonFiniteError,
        PairFileError,
        RecipeError,
        ReportError,
        RunError,
        StageError,
    ) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _print_once(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)


if __name__ == "__main__":
    main()
