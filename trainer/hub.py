"""What has to do with the Hub: the code of a model beside its weights, and its errors in plain words."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.configuration import NACConfig, VMoEConfig
from m2mkd.modeling import NACForImageClassification, NACModel, VMoEBackbone, VMoEForImageClassification, VMoEModel
from m2mkd.trainer.flat_code import flatten, own_imports
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
        "AutoBackbone": VMoEBackbone,
    },
}
# A transfer that fails for a passing reason is tried again after so many seconds.
WAITS = (1.0, 5.0)
_PASSING = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


class HubError(ValueError):
    """A folder cannot be exported, pushed or fetched as asked; the message says what to do."""


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
    config = read_config(folder)
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


@contextmanager
def explained_hub_errors(repo_id: str, doing: Literal["read", "write to"]) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `HubError` that says what to do, and never a token."""
    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        text, token = _advice(repo_id, doing, cause), get_token()
        raise HubError(text.replace(token, "<token>") if token else text) from error


def patiently(call: Callable[[], Result]) -> Result:
    """The result of a call to the Hub, which is tried again if the network or the server fails."""
    for wait in WAITS:
        try:
            return call()
        except (HTTPError, RuntimeError, OSError) as error:
            cause = _cause(error)
            is_lasting = isinstance(cause, HfHubHTTPError) and cause.response.status_code not in _PASSING
            if cause is None or is_lasting or isinstance(cause, OfflineModeIsEnabled):
                raise
            time.sleep(wait)
    return call()


def _cause(error: BaseException) -> Any:
    """
    The error of huggingface_hub behind an error, which wraps those of a file's upload. Of a transfer by Xet there is
    no more than a `RuntimeError` or `ConnectionError`. `None`: it has nothing to do with the Hub.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError | HFValidationError | OfflineModeIsEnabled):
        cause = cause.__cause__
    is_transfer = isinstance(error, RuntimeError | ConnectionError | TimeoutError)
    return error if cause is None and is_transfer else cause


def _advice(repo_id: str, doing: str, error: Any) -> str:
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no id of a repository, which has the form user/name. {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it to reach the Hub."
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__}: {error}). Nothing was changed "
            "there. Check the network (HF_ENDPOINT, HTTPS_PROXY) and run the same command again."
        )
    status, said = error.response.status_code, error.server_message
    answer = f"{status}: {said}" if said else str(status)
    if status == 401:
        return (
            f"The Hub does not know you, or there is no {repo_id} ({answer}). Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that is still valid."
        )
    if status == 403:
        return (
            f"Your token may not {doing} {repo_id} ({answer}). Use a token that may, or a repository in a namespace "
            "of your own: `hf auth whoami` says which those are."
        )
    if status == 404:
        return (
            f"There is no {repo_id}, neither namespace nor repository, that your token can see ({answer}). Check the "
            "spelling; `hf auth whoami` says which namespaces are yours."
        )
    return f"The Hub refuses ({answer}) for {repo_id}. Nothing was changed there. Run the same command again later."
