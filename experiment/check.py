"""Checks before anything is trained."""

from collections.abc import Iterable

from transformers.integrations import get_reporting_integration_callbacks

from m2mkd.errors import RecipeError
from m2mkd.experiment.phases import Phase


def check_arguments(phases: Iterable[Phase]) -> None:
    """
    Check all training arguments of a run's phases by building them.

    Args:
        phases (`Iterable[Phase]`)

    Raises:
        `RecipeError`: an argument is not valid; the message names the key.
    """
    for phase in phases:
        session = phase.session
        for key, training in phase.training_arguments().items():
            try:
                args = session.arguments(session.folder.path, training, {})
                for tracker in get_reporting_integration_callbacks(args.report_to):
                    # raises RuntimeError if its library is not installed
                    tracker()
            except (ValueError, TypeError, ImportError, RuntimeError) as error:
                raise RecipeError(f"The arguments of {key} (with those of training) are not valid: {error}") from error
