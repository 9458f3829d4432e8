"""Export of a model's code next to its weights."""

import json
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.configuration import NACConfig, VMoEConfig
from m2mkd.errors import HubError
from m2mkd.files import explained_write_errors, read_json, write_json
from m2mkd.hub.flat_code import flatten, own_imports
from m2mkd.modeling import NACForImageClassification, NACModel, VMoEBackbone, VMoEForImageClassification, VMoEModel


# By `model_type`: the Auto classes that a folder with code supports, and our class for each.
_CLASSES: dict[str, dict[str, type[PreTrainedConfig] | type[PreTrainedModel]]] = {
    "nac": {
        "AutoConfig": NACConfig,
        "AutoModel": NACModel,
        "AutoModelForImageClassification": NACForImageClassification,
    },
    "vmoe": {
        "AutoConfig": VMoEConfig,
        "AutoModel": VMoEModel,
        "AutoModelForImageClassification": VMoEForImageClassification,
        "AutoBackbone": VMoEBackbone,
    },
}


def export_hub_code(folder: str | Path) -> list[Path]:
    """
    Write the sources that a saved model needs into its folder, and name them in `auto_map` of its `config.json`. Then
    `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` needs only torch and
    transformers. Without that flag, transformers refuses to run the sources.

    Args:
        folder (`str` or `Path`): Folder that `save_pretrained` of a NAC or V-MoE wrote.

    Returns:
        `list[Path]`: The sources, in alphabetical order.

    Raises:
        `HubError`: there is no `config.json`, it is damaged, or the model is not a NAC or V-MoE.
        `RunError`: the folder cannot be written.
    """
    folder = Path(folder)
    sources = hub_code(folder)
    config = sources.pop("config.json")
    with explained_write_errors(folder):
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
        # written last: code that is not named does no harm, but a name without its code does
        write_json(folder / "config.json", json.loads(config))
    return [folder / name for name in sorted(sources)]


def hub_code(folder: Path) -> dict[str, str]:
    """
    The sources that a saved model needs and a `config.json` with their names in `auto_map`, by file name. Raises
    `HubError` as [`export_hub_code`] does.
    """
    way_out = "Give a folder that save_pretrained has written, or save the model again."
    config = read_json(folder / "config.json", HubError, way_out)
    model_type = config.get("model_type")
    if model_type not in _CLASSES:
        raise HubError(
            f"{folder / 'config.json'} has `model_type` {model_type!r}. Code can be exported only for "
            f"{' and '.join(sorted(_CLASSES))}. Models of transformers itself need none."
        )
    classes = _CLASSES[model_type]
    names = {auto: f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for auto, own in classes.items()}
    sources = flat_sources(sorted({own.__module__ for own in classes.values()}))
    return {**sources, "config.json": json.dumps({**config, "auto_map": names}, indent=2) + "\n"}


def flat_sources(modules: list[str]) -> dict[str, str]:
    """
    The sources of some of our modules and of everything that they import from `configuration` and `modeling`, by file
    name, for one flat folder (see [`flatten`]).

    Args:
        modules (`list[str]`): Dotted names, e.g. `m2mkd.modeling.modeling_vmoe`.
    """
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        name = f"{module.rpartition('.')[2]}.py"
        if name not in sources:
            text = Path(find_spec(module).origin).read_text(encoding="utf-8")
            sources[name] = flatten(text)
            waiting += own_imports(text)
    return sources
