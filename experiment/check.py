"""What is checked before anything is trained."""

from collections.abc import Iterable

from m2mkd.experiment.phases import Phase
from m2mkd.trainer.networks import build_config
from m2mkd.trainer.recipe import RecipeError


def check(phases: Iterable[Phase]) -> None:
    """
    Build every configuration and all training arguments of a run's phases.

    Args:
        phases (`Iterable[Phase]`)

    Raises:
        `RecipeError`: a configuration or an argument is refused; the message names the key.
    """
    for phase in phases:
        session = phase.session
        for spec, data in phase.networks():
            build_config(spec, session.data.config(data), session.data.class_names(data))
        for key, training in phase.training_arguments().items():
            try:
                session.arguments(session.folder.path, training, {})
            except (ValueError, TypeError, ImportError) as error:
                raise RecipeError(f"The arguments of {key} (with those of training) are refused: {error}") from error
