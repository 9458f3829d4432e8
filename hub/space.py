"""Files of a demo Space of one arm: a Gradio app that needs the model's own code, not this package."""

import importlib.metadata
import json
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import SpaceCardData

from m2mkd.errors import HubError
from m2mkd.hub.code_export import hub_code
from m2mkd.hub.push import Files, example_pictures, finished_arm, model_files
from m2mkd.model_cards.parts import CARD_FILE
from m2mkd.model_cards.tables import teacher_hub_id


# What the app and the code of the models import; it gets the versions that are installed here.
_REQUIRED = ("torch", "transformers", "pillow", "numpy", "networkx", "scipy")
_APP, _OVERLAY = "m2mkd.hub.space_app", "m2mkd.evaluation.overlay"


def space_files(
    run_folder: str | Path, arm: str, seed: int | None = None, license: str = "apache-2.0", with_images: bool = False
) -> Files:
    """
    Collect the files of a Space that shows one arm: the app, the model with its code, and the teacher, if the run
    trained it for the same classes. A teacher from the Hub is loaded from there.

    Args:
        run_folder (`str` or `Path`): A finished run.
        arm (`str`): A folder in its `arms/`.
        seed (`int`, *optional*): Seed of the arm. `None`: the run's first.
        license (`str`): The license of the weights, as the Hub names it.
        with_images (`bool`): Whether to add test images as examples.

    Raises:
        `HubError`: the run is not finished, or has no such seed or arm, or gradio is not installed.
        `DataError`: the test images cannot be loaded.
    """
    report, run, folder, seed = finished_arm(run_folder, arm, seed)
    model: Files = {**model_files(folder), **{name: text.encode() for name, text in hub_code(folder).items()}}
    teacher, source = report["teacher"] or {}, None
    if teacher.get("iid"):
        source = teacher_hub_id(teacher) if teacher.get("pretrained") else "teacher"
    taught = model_files(run.teacher) if source == "teacher" else {}
    title = f"{report['recipe'].get('name') or run.path.resolve().name}: {arm}"
    about = (
        f"{report['seeds'][str(seed)]['arms'][arm]['arm']['text']} Made with [m2mkd](https://huggingface.co/papers/"
        "2402.16918). Upload a picture, or move a slider to spend less compute."
    )
    files: Files = {
        CARD_FILE: _card(title, about, license).encode(),
        "requirements.txt": "".join(f"{name}=={_version(name)}\n" for name in _REQUIRED).encode(),
        "app.py": _source(_APP).replace(_OVERLAY, "overlay").encode(),
        "overlay.py": _source(_OVERLAY).encode(),
        "settings.json": json.dumps({"title": title, "about": about, "teacher": source}, indent=2).encode(),
        **{f"model/{name}": content for name, content in model.items()},
        **{f"{source}/{name}": content for name, content in taught.items()},
        **(example_pictures(report, folder)[0] if with_images else {}),
    }
    return dict(sorted(files.items()))


def _card(title: str, about: str, license: str) -> str:
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=_version("gradio"),
        app_file="app.py",
        license=license,
        tags=["m2mkd"],
    )
    run = f"```bash\npip install gradio=={data.sdk_version} -r requirements.txt\npython app.py\n```"
    return f"---\n{data}\n---\n\n# {title}\n\n{about}\n\n{run}\n"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        way_out = "Install it, so that the Space gets the version that you can try: pip install 'm2mkd[space]'."
        raise HubError(f"{package} is not installed. {way_out}") from error


def _source(module: str) -> str:
    return Path(find_spec(module).origin).read_text(encoding="utf-8")
