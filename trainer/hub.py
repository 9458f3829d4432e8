"""The code of a model beside its weights, so that it loads where this package is not installed."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.configuration import NACConfig, VMoEConfig
from m2mkd.modeling import NACForImageClassification, NACModel, VMoEForImageClassification, VMoEModel
from m2mkd.trainer.folders import explained_write_errors, write_json


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
    },
}
# Our sources import absolutely, also inside functions; a folder on the Hub has room for one level of relative imports.
_OWN_IMPORT = re.compile(r"^( *)from (m2mkd\.(?:configuration|modeling)\.(\w+)) import", re.MULTILINE)


class HubError(ValueError):
    """A folder cannot be exported or pushed as asked; the message says what to do."""


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
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type not in _CLASSES:
        raise HubError(
            f"{folder / 'config.json'} is of a model of type {model_type!r}; there is code to export for "
            f"{' and '.join(sorted(_CLASSES))} alone. Models of transformers itself need none."
        )
    classes = _CLASSES[model_type]
    sources = flat_sources(sorted({own.__module__ for own in classes.values()}))
    names = {auto: f"{own.__module__.rpartition('.')[2]}.{own.__name__}" for auto, own in classes.items()}
    with explained_write_errors(folder):
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
        # last: code that nothing names does no harm, a name without its code does
        write_json(folder / "config.json", {**config, "auto_map": names})
    return [folder / name for name in sorted(sources)]


def flat_sources(modules: list[str]) -> dict[str, str]:
    """
    The sources of modules of ours and of all that they import of `configuration` and `modeling`, by file name, for one
    flat folder: `from m2mkd.modeling.losses import` becomes `from .losses import`.

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
            sources[name] = _OWN_IMPORT.sub(r"\1from .\3 import", text)
            waiting += [match[1] for match in _OWN_IMPORT.findall(text)]
    return sources


def read_config(folder: Path) -> dict:
    """`config.json` of a saved model. Raises `HubError` if it is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HubError(
            f"{path} is missing: {folder} is no folder of a saved model. Save one with save_pretrained."
        ) from error
    except ValueError as error:
        raise HubError(f"{path} is damaged ({error}). Save the model again.") from error
    if not isinstance(config, dict):
        raise HubError(f"{path} is damaged (no JSON object). Save the model again.")
    return config
