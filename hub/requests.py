"""Requests to the Hub: patience, and errors in plain words."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from m2mkd.errors import HubError


# A transfer that fails for a passing reason is tried again after so many seconds.
WAITS = (1.0, 5.0)
_PASSING = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


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
