"""The code of a model beside its weights."""

import json
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.configuration import NACConfig, VMoEConfig
from m2mkd.errors import HubError
from m2mkd.files import explained_write_errors, read_json, write_json
from m2mkd.hub.flat_code import flatten, own_imports
from m2mkd.modeling import NACForImageClassification, NACModel, VMoEBackbone, VMoEForImageClassification, VMoEModel


# What a folder with its code offers, by `model_type`: the Auto class and our class behind it.
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
    `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` needs no more than torch and
    transformers; without that flag transformers refuses to run them.

    Args:
        folder (`str` or `Path`): What `save_pretrained` of a NAC or V-MoE wrote.

    Returns:
        `list[Path]`: The sources, in alphabetical order.

    Raises:
        `HubError`: there is no `config.json`, it is damaged, or it is of a model that is not ours.
        `RunError`: the folder cannot be written.
    """
    folder = Path(folder)
    sources = hub_code(folder)
    config = sources.pop("config.json")
    with explained_write_errors(folder):
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
        # last: code that nothing names does no harm, a name without its code does
        write_json(folder / "config.json", json.loads(config))
    return [folder / name for name in sorted(sources)]


def hub_code(folder: Path) -> dict[str, str]:
    """
    By file name, the sources that a saved model needs and a `config.json` with their names in `auto_map`. Raises
    `HubError` as [`export_hub_code`] does.
    """
    way_out = "Give a folder that save_pretrained has written, or save the model again."
    config = read_json(folder / "config.json", HubError, way_out)
    model_type = config.get("model_type")
    if model_type not in _CLASSES:
        raise HubError(
            f"{folder / 'config.json'} is of a model of type {model_type!r}; there is code to export for "
            f"{' and '.join(sorted(_CLASSES))} alone. Models of transformers itself need none."
        )
    classes = _CLASSES[model_type]
    names = {auto: f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for auto, own in classes.items()}
    sources = flat_sources(sorted({own.__module__ for own in classes.values()}))
    return {**sources, "config.json": json.dumps({**config, "auto_map": names}, indent=2) + "\n"}


def flat_sources(modules: list[str]) -> dict[str, str]:
    """
    The sources of modules of ours and of all that they import of `configuration` and `modeling`, by file name, for one
    flat folder (see [`flatten`]).

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
