"""Requests to the Hub, with retries and plain error messages."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from m2mkd.errors import HubError


# Seconds before a request that failed for a temporary reason is tried again.
WAITS = (1.0, 5.0)
_PASSING = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


@contextmanager
def explained_hub_errors(repo_id: str, doing: Literal["read", "write to"]) -> Iterator[None]:
    """Turn errors of huggingface_hub into a `HubError` that says what to do and never contains a token."""
    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        text, token = _advice(repo_id, doing, cause), get_token()
        raise HubError(text.replace(token, "<token>") if token else text) from error


def patiently(call: Callable[[], Result]) -> Result:
    """Call the Hub and return the result; the call is tried again if the network or the server fails."""
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
    The error of huggingface_hub behind an error: those of a file's upload are wrapped. A transfer by Xet raises only a
    `RuntimeError` or `ConnectionError`. `None`: the error has nothing to do with the Hub.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError | HFValidationError | OfflineModeIsEnabled):
        cause = cause.__cause__
    is_transfer = isinstance(error, RuntimeError | ConnectionError | TimeoutError)
    return error if cause is None and is_transfer else cause


def _advice(repo_id: str, doing: str, error: Any) -> str:
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a repository id; give one of the form user/name. {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not contacted. Unset it to use the Hub."
    if not isinstance(error, HfHubHTTPError):
        return (
            f"The Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__}: {error}). Nothing was changed "
            "there. Check the network (HF_ENDPOINT, HTTPS_PROXY) and run the same command again."
        )
    status, said = error.response.status_code, error.server_message
    answer = f"{status}: {said}" if said else str(status)
    if status == 401:
        return (
            f"You are not logged in to the Hub, or there is no {repo_id} ({answer}). Log in with `hf auth login`, or "
            "set HF_TOKEN to a token that is still valid."
        )
    if status == 403:
        return (
            f"Your token is not allowed to {doing} {repo_id} ({answer}). Use a token that is, or a repository in one "
            "of your own namespaces: `hf auth whoami` lists them."
        )
    if status == 404:
        return (
            f"{repo_id} does not exist (namespace or repository), or your token cannot see it ({answer}). Check the "
            "spelling; `hf auth whoami` lists your namespaces."
        )
    return f"The Hub refused the request for {repo_id} ({answer}). Nothing was changed there. Try again later."
