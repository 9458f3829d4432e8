"""The command line: `train.py`, and `m2mkd run`, `report`, `evaluate`, `push`, `assemble`, `upcycle`, `convert`, …"""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from m2mkd import __version__
from m2mkd.overrides import parse_overrides, recipe_and_options


app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"m2mkd {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Modular vision models, distilled module by module."""


_TAKE_OVER = "Take over what a process on another host was making, if it has ended there."
_THROUGHPUT = "TFLOP/s per GPU for --plan. 'measured': measure this machine."
_PHASE = "Run only this phase: meta, teacher, pairs/3, arms/kd, seeds/5/arms/kd, …"
_GPUS = "GPUs for --plan (default: one per process) and --accelerate (default: all of this machine)."
_ACCELERATE = "Start a process per GPU: ddp, fsdp2, deepspeed_zero2 or deepspeed_zero3."
# Everything that is not a parameter of a command is a value of the recipe.
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("run", context_settings=_OVERRIDES, options_metavar="[RECIPE.yaml] [--key.sub value]...")
def run_command(
    context: typer.Context,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it would cost; train nothing.")] = False,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="Run the same phases on tiny networks and a few generated images.")
    ] = False,
    throughput: Annotated[str, typer.Option(help=_THROUGHPUT)] = "",
    gpus: Annotated[int | None, typer.Option("--gpus", "--devices", min=1, help=_GPUS)] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB of a GPU: --plan says what fits.")] = None,
    accelerate: Annotated[str | None, typer.Option(metavar="NAME", help=_ACCELERATE)] = None,
    phase: Annotated[str | None, typer.Option(help=_PHASE)] = None,
    take_over: Annotated[bool, typer.Option("--take-over", help=_TAKE_OVER)] = False,
    is_list: Annotated[
        bool, typer.Option("--list", help="List the embedded recipe and those in the folder recipes; run nothing.")
    ] = False,
) -> None:
    """
    Run a recipe: skip finished phases, train the others, write the report.

    Without a recipe, the embedded one runs: a V-MoE for digits, in minutes on a CPU.

    Any value of the recipe can be overridden: --seed 1 --finetune.training.num_train_epochs 3.

    Several GPUs: train.py RECIPE.yaml --accelerate ddp, or torchrun --nproc_per_node N train.py RECIPE.yaml.

    To see what it would cost, without data or GPUs: train.py RECIPE.yaml --plan --gpus 8 --throughput 150 --memory 80.

    To check in seconds that it runs: train.py RECIPE.yaml --miniature.
    """

    def work() -> None:
        from m2mkd.experiment.plan.command import print_plan_of
        from m2mkd.experiment.recipe_file import list_recipes, load_recipe

        if is_list:
            for name, sentence in list_recipes().items():
                _print_once(f"{name}: {sentence}")
            return
        path, options = recipe_and_options(context.args)
        recipe = load_recipe(path, parse_overrides(options))
        if miniature:
            from m2mkd.experiment.miniature import make_miniature

            recipe = make_miniature(recipe)
        if plan:
            print_plan_of(recipe, throughput, gpus, memory)
            return
        if accelerate is not None:
            from m2mkd.experiment.launch import launch

            own = ["--miniature"] * miniature + ["--take-over"] * take_over + (["--phase", phase] if phase else [])
            launch(accelerate, gpus, ["run", *context.args, *own])
        from m2mkd.experiment.runner import run

        report = run(recipe, phase, take_over, shows_expected=True)
        if report is not None:
            _print_once(f"The report is in {report} (report.json and report.png are in the same folder).")
            _print_next(report.parent)

    _explained(work, "Finished phases are kept; run the same command again to go on.")


@app.command("init")
def init_command(
    images: Annotated[str, typer.Argument(metavar="FOLDER_OR_ID", help="One sub-folder per class, or train/, test/.")],
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    test: Annotated[str | None, typer.Option(help="Test images. Default: test/, or a part held out.")] = None,
    ood: Annotated[str | None, typer.Option(help="Folder of the same classes from elsewhere.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder. Default: a ViT is trained.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Time that the run may take here.")] = 30.0,
) -> None:
    """
    Write a recipe for your own images: m2mkd init FOLDER && m2mkd run recipe.yaml

    It looks at the images, the teacher and this machine. The file says why each value was chosen, and what it costs.

    In a terminal it asks for the teacher and for the OOD folder if they are not given.
    """

    def work() -> None:
        from m2mkd.experiment.new_recipe import write_new_recipe

        asked = {"teacher": teacher, "ood": ood}
        if sys.stdin.isatty():
            questions = {"teacher": "Teacher (Hub id or folder; empty: train one)", "ood": "OOD folder (empty: none)"}
            asked = {
                name: value if value is not None else typer.prompt(questions[name], default="") or None
                for name, value in asked.items()
            }
        print("\n".join(write_new_recipe(out, images, test, asked["ood"], asked["teacher"], minutes)))

    _explained(work)


@app.command("slurm", context_settings=_OVERRIDES, options_metavar="[RECIPE.yaml] [--key.sub value]...")
def slurm_command(
    context: typer.Context,
    study: Annotated[Path | None, typer.Option(help="A study instead of a recipe.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each job.")] = 1,
    throughput: Annotated[float, typer.Option(min=1e-6, help="TFLOP/s per GPU, for the time limits.")] = 100.0,
) -> None:
    """
    Print a script that submits the unfinished phases of a recipe or a study to Slurm, each after those that it reads.

    m2mkd slurm RECIPE.yaml --gpus 1 > submit.sh && bash submit.sh

    m2mkd slurm --study STUDY.yaml > submit.sh && bash submit.sh

    Pairs and arms are job arrays. Time and memory come from the plan. All nodes must see the recipe and output_dir.
    """

    def work() -> None:
        from m2mkd.experiment.recipe_file import load_recipe
        from m2mkd.experiment.slurm import slurm_script
        from m2mkd.experiment.study.spec import Point, load_study

        if study is None:
            path, options = recipe_and_options(context.args)
            recipe = load_recipe(path, parse_overrides(options))
            name, points, words = recipe.name, [Point("", {}, recipe)], ["run", *context.args]
        else:
            spec, points = load_study(study, parse_overrides(context.args))
            name, words = spec.name, ["study", str(study), *context.args]
        print(slurm_script(name, points, shlex.join(words), gpus, throughput, study is not None), end="")

    _explained(work)


@app.command("study", context_settings=_OVERRIDES)
def study_command(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Curves of arms over values of a recipe.")],
    plan: Annotated[bool, typer.Option("--plan", help="Print what it would cost; train nothing.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Report the finished seeds; train nothing.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Phases at once. Default: as in a run.")] = None,
    phase: Annotated[str | None, typer.Option(help="Run only this phase of a point: kd-1f2e3d4c/arms/kd, …")] = None,
    take_over: Annotated[bool, typer.Option("--take-over", help=_TAKE_OVER)] = False,
) -> None:
    """
    Run a study: every arm with every value and seed, then accuracy against compute, with intervals.

    Teacher, meta model, pairs and arms that several points share are trained once. Stop it and start it again at will.

    Keys of the study can be overridden: --seeds '[0, 1]' --output_dir runs/mine.
    """

    def work() -> None:
        from m2mkd.experiment.study.plan import print_study_plan
        from m2mkd.experiment.study.report import report_study
        from m2mkd.experiment.study.runs import run_phase, run_study
        from m2mkd.experiment.study.spec import load_study

        spec, points = load_study(study, parse_overrides(context.args))
        if plan:
            print_study_plan(spec, points)
            return
        if phase is not None:
            if not run_phase(points, phase, take_over):
                return
        elif not only_report:
            run_study(points, processes, take_over)
        _print_once(f"The study is in {report_study(spec, points)} (study.json and study.png are in the same folder).")

    _explained(work, "Finished phases are kept; run the same command again to go on.")


@app.command("report", context_settings=_OVERRIDES)
def report_command(context: typer.Context, run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER")]) -> None:
    """Write the report of a finished run again, from its folders."""

    def work() -> None:
        from m2mkd.experiment.artifact import RECIPE_FILE, read_noted_recipe
        from m2mkd.experiment.recipe_file import parse_recipe
        from m2mkd.experiment.report import make_report

        content = {**read_noted_recipe(run_folder), "output_dir": str(run_folder), **parse_overrides(context.args)}
        _print_once(f"The report is in {make_report(parse_recipe(content, str(run_folder / RECIPE_FILE)))}.")

    _explained(work)


@app.command("push")
def push_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A finished run.")],
    repo_id: Annotated[
        str, typer.Option(metavar="USER/NAME", help="The repository. It is created if it does not exist.")
    ],
    arm: Annotated[str, typer.Option(help="Arm of the run to push. Default: the distilled student.")] = "",
    seed: Annotated[int | None, typer.Option(help="Seed of the arm, if the run has several seeds.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository. Default: private.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add the model's code, for readers without m2mkd.")
    ] = False,
    license: Annotated[str, typer.Option(help="License of the weights, as the Hub names it.")] = "apache-2.0",
    with_images: Annotated[
        bool,
        typer.Option("--with-images", help="Add 3 test images as examples, and their routing."),
    ] = False,
    space: Annotated[bool, typer.Option("--space", help="Push a demo of the arm: a Gradio app, a Space.")] = False,
    collection: Annotated[
        bool, typer.Option("--collection", help="Push all arms, to USER/NAME-<arm>, and collect them under NAME.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the files to this new folder; send nothing.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be pushed; send nothing.")] = False,
) -> None:
    """
    Push one arm of a run to the Hub, in one commit: the model, its image processor and its card.
    For a distilled student, each of its modules goes along in pairs/<i>, with its stitches and contract.

    With --space, USER/NAME is a Space with a demo. It needs gradio: pip install 'm2mkd[space]'.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """

    def work() -> None:
        from m2mkd.hub.push_run import Destination, push_run

        if collection and (space or arm or out):
            raise typer.BadParameter("--collection pushes the models of all arms; leave out --space, --arm and --out")
        to = Destination(repo_id, public, dry_run, out)
        push_run(run_folder, to, None if collection else arm, seed, space, with_code, license, with_images)

    _explained(work)


@app.command("assemble")
def assemble_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    sources: Annotated[
        list[str], typer.Argument(metavar="FOLDER_OR_ID...", help="Folders or Hub ids of the modules.")
    ],
    keep_stitches: Annotated[
        bool, typer.Option("--keep-stitches", help="Keep the stitches between the modules of a V-MoE.")
    ] = False,
) -> None:
    """
    Build a student from distilled modules.

    Give the folder of a run, folders of single pairs, or repositories on the Hub (user/name, or user/name/pairs/0).

    Modules from different distillations are refused. Train the student end to end next, with or without the stitches.
    """

    def work() -> None:
        from m2mkd.hub.assemble import assemble

        print("\n".join(assemble(out, sources, keep_stitches)))

    _explained(work)


@app.command("upcycle")
def upcycle_command(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_ID", help="A dense classifier: ViT, DeiT or DINOv2.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    experts: Annotated[int, typer.Option(min=1, help="Experts in each sparse layer.")] = 8,
    layers: Annotated[
        str, typer.Option(help="Sparse layers: every-other (1, 3, 5, …), last-2 (of these), all, or [1,3].")
    ] = "every-other",
    experts_per_token: Annotated[int, typer.Option(min=1, help="Experts that each token is sent to.")] = 2,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Leave out what a V-MoE cannot express, see below.")
    ] = False,
    noise_std: Annotated[
        float, typer.Option(help="Noise on the copies, in units of the standard deviation of the weights.")
    ] = 0.0,
    data: Annotated[str | None, typer.Option(help="Images to measure on: a source as in a recipe.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data. Default: the test split.")] = None,
    centroids: Annotated[
        bool, typer.Option("--centroids", help="Make the routers from clusters of the tokens of these images.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the routers and of the noise.")] = 0,
) -> None:
    """
    Make a V-MoE from a dense model: each expert starts as a copy of the MLP (sparse upcycling, arXiv 2212.05055).

    m2mkd upcycle google/vit-base-patch16-224 vmoe --experts 8 --layers every-other

    It starts with the dense model's logits. How far it is from them is measured, on noise or on up to 256 images of
    --data. Train it next.

    A V-MoE has one special token, and its head reads that token: the distillation token of a DeiT and the part of a
    DINOv2's head that reads the patches cannot be expressed. --approximate leaves them out.
    """

    def work() -> None:
        from m2mkd.hub.upcycle import upcycle_folder

        options = {"num_experts": experts, "num_experts_per_tok": experts_per_token, "noise_std": noise_std}
        said = upcycle_folder(source, out, layers, data, split, centroids, seed, approximate=approximate, **options)
        print("\n".join(said))

    _explained(work)


@app.command("convert")
def convert_command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A .pth, .pt, .safetensors, .npz or .onnx file, or PREFIX.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    kind: Annotated[
        str, typer.Option(help="nac, nac-student, vmoe, vmoe-student, vit, vmoe-jax, vit-jax or dinov2-onnx.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="The official YAML file. For vit and vmoe: JSON, see below.")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="Stage of a student or teacher, from 0.")] = None,
    num_stages: Annotated[int | None, typer.Option(help="Stages of a student's model (NAC: 10, V-MoE: 4).")] = None,
    back: Annotated[
        bool, typer.Option("--to-official", help="Convert back: CHECKPOINT is a folder, OUT a .pth or .safetensors.")
    ] = False,
) -> None:
    """
    Convert an official checkpoint (of m2mKD, Deep Incubation or google-research/vmoe) to a Hugging Face folder.

    The stage of a NAC student is in its file name (ReadInStudent, MediatorStudent_3, ReadOutStudent) or in --stage.

    The official code has no file for the arguments of a ViT or V-MoE. Give them as JSON or YAML, e.g.
    {"kwargs": {"patch_size": 14, "embed_dim": 1280, "num_heads": 16, "divided_depths": [4, 3, 4]}, "norm_eps": 1e-5}

    For vmoe-jax, CHECKPOINT is the PREFIX of google-research/vmoe's PREFIX.index and PREFIX.data-nnnnn-of-NNNNN, or
    its parameter tree, flattened into one file of named arrays. If that has not the name of a published checkpoint,
    --config gives what the arrays do not show: the `model` section of that code's configuration as JSON, or only the
    routers' arguments, e.g. {"num_selected_experts": 2}

    vit-jax is for the .npz of a ViT of big_vision or vision_transformer with a class token. It needs no --config.

    dinov2-onnx takes the DINOv2 backbone out of an ONNX file that transformers' Dinov2Model was exported to.

    The folder of a student or of one stage contains that stage's tensors and its stitches, like pairs/ in a run.

    --to-official turns the folder of a nac, vmoe or vit into a checkpoint that the official code loads.
    --config is then the configuration that the official code will build its model from.
    It is refused if it describes another model.
    """

    def work() -> None:
        from m2mkd.conversion.convert import convert
        from m2mkd.conversion.to_official import to_official

        if not back:
            print(convert(kind, config, checkpoint, out, stage, num_stages))
        elif (stage, num_stages) != (None, None):
            raise typer.BadParameter("--to-official converts whole models only; leave out --stage and --num-stages")
        elif config is None:
            raise typer.BadParameter("--to-official needs --config, from which the official code builds the model")
        else:
            print(to_official(kind, config, checkpoint, out))

    _explained(work)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A saved model, or its id on the Hub.")],
    data: Annotated[list[str], typer.Option(help="A source as in a recipe. Can be given several times.")],
    split: Annotated[str | None, typer.Option(help="Split of the data. Default: the test split.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a copy that lacks classes or images.")] = False,
    iid_accuracy: Annotated[float | None, typer.Option(help="The model's accuracy without shift, 0 to 1.")] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="IID:OOD accuracies of another model, 0 to 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per device.")] = 64,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print each class, worst first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, including per-class figures.")] = False,
) -> None:
    """
    Evaluate a saved model on whole data sets, over the classes that both have.

    m2mkd evaluate runs/nac/arms/m2mkd --data tiny-imagenet:PATH --data tiny-imagenet-r:PATH

    Logits of classes that a set does not have are left out, and so are images of classes that the model does not know.

    --iid-accuracy adds the gap to that accuracy.
    With --baseline IID:OOD as well, the effective robustness is added: how far the accuracy is above what the
    baselines predict (with several, a line fitted to them).
    """

    def work() -> None:
        import json

        from rich.console import Console

        from m2mkd.evaluation.saved_model import evaluate_folder
        from m2mkd.evaluation.show import show

        baselines = [_accuracy_pair(text) for text in baseline or []]
        results = evaluate_folder(model, data, split, partial, batch_size, iid_accuracy, baselines)
        if not _is_main_process():
            return
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            show(results, Console(), per_class)

    _explained(work)


@app.command("few-shot")
def few_shot_command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A saved model, or its id on the Hub.")],
    data: Annotated[str, typer.Option(help="A source as in a recipe, e.g. cifar100:PATH.")],
    ways: Annotated[int, typer.Option(min=2, help="Classes per episode.")] = 8,
    shots: Annotated[int, typer.Option(min=1, help="Images per class to learn from.")] = 5,
    episodes: Annotated[int, typer.Option(min=1, help="Number of episodes.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of classes, images and heads.")] = 0,
    train_split: Annotated[str | None, typer.Option(help="Split to learn from.")] = None,
    val_split: Annotated[str | None, typer.Option(help="Split to test on.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a copy that lacks classes or images.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch for the features.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the accuracy of each episode.")] = False,
) -> None:
    """
    Train a new head on a few images of a few classes, many times: mean accuracy and its 95 % interval.

    m2mkd few-shot runs/vmoe/arms/m2mkd --data cifar100:PATH --ways 8 --shots 5

    The rest of the model is frozen. Each episode is tested on three times as many other images of its classes.
    """

    def work() -> None:
        import json

        from m2mkd.evaluation.few_shot import few_shot

        result = few_shot(model, data, ways, shots, episodes, seed, train_split, val_split, partial, batch_size)
        if as_json:
            print(json.dumps(result, indent=2))
            return
        half = "" if result["interval"] is None else f" ± {100 * result['interval']:.2f}"
        print(f"{ways}-way {shots}-shot on {data}: {100 * result['accuracy']:.2f}{half} % ({episodes} episodes)")

    _explained(work)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A saved V-MoE or NAC, or its id on the Hub.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files.")] = None,
    data: Annotated[str | None, typer.Option(help="A source as in a recipe: the experts of each class.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data. Default: the test split.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch of the data.")] = 64,
) -> None:
    """
    Draw what a model does with images.

    m2mkd inspect runs/vmoe/arms/m2mkd cat.jpg dog.jpg --out routing.png

    For a V-MoE: the experts of each patch, their weights and what is dropped, in each sparse layer.
    With --data: the fraction of a class's patches that each expert sees. The images can then be left out.

    For a NAC: where its input latents look, and the graph of its mediators.
    """

    def work() -> None:
        from m2mkd.evaluation.inspection import inspect_folder

        inspect_folder(model, images or [], out, data, split, batch_size)
        print(f"The picture is in {out}.")

    _explained(work)


def _accuracy_pair(text: str) -> tuple[float, float]:
    iid, _, ood = text.partition(":")
    try:
        return float(iid), float(ood)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: --baseline takes IID:OOD, such as 0.608:0.195") from error


def main() -> None:
    """Entry point of the console script `m2mkd`."""
    app()


def train() -> None:
    """Entry point of `train.py`: `m2mkd run` under its own name."""
    app(["run", *sys.argv[1:]], prog_name="train.py")


def _explained(work: Callable[[], None], if_interrupted: str = "") -> None:
    """
    Run `work`. An error that the user can fix prints only its message, and Ctrl-C prints only `if_interrupted`.
    Everything else ends in a traceback.
    """
    if "torch" not in sys.modules and _is_main_process():
        # not to the standard output, which may be JSON or a script
        print(f"m2mkd {__version__}: loading torch and transformers", file=sys.stderr, flush=True)
    try:
        _without_mendable_errors(work)
    except KeyboardInterrupt:
        if _is_main_process():
            print(f"Interrupted. {if_interrupted}".strip(), file=sys.stderr)
        # the exit status that shells use for a command ended by Ctrl-C
        raise typer.Exit(128 + signal.SIGINT) from None


def _without_mendable_errors(work: Callable[[], None]) -> None:
    from transformers.utils import logging

    from m2mkd.errors import M2MKDError
    from m2mkd.files import explained_disk_error

    # it warns for each of its image processors that torchvision is missing, and reports what a file lacks in a table
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        work()
    except (M2MKDError, OSError, RuntimeError) as error:
        explained = error if isinstance(error, M2MKDError) else explained_disk_error(error)
        if explained is None:
            raise
        print(f"Error: {explained}", file=sys.stderr)
        raise typer.Exit(1) from error


def _print_next(run_folder: Path) -> None:
    from m2mkd.experiment.report.read import default_arm

    arm = default_arm(run_folder)
    model, run = shlex.quote(str(run_folder / "arms" / arm)), shlex.quote(str(run_folder))
    _print_once(f"Read it:  {run_folder / 'report.html'} in a browser")
    _print_once(f"Try it:   m2mkd inspect {model} IMAGE --out picture.png")
    _print_once(f"Share it: m2mkd push {run} --arm {arm} --repo-id USER/NAME --dry-run")


def _print_once(text: str) -> None:
    if _is_main_process():
        print(text)


def _is_main_process() -> bool:
    # without accelerate, which takes seconds to import
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
