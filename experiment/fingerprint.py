"""Fingerprints of artifacts: phases of two recipes with the same fingerprint make the same artifact."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from m2mkd.experiment.dependence import depends, is_free
from m2mkd.experiment.phases import Phase


def fingerprint(phase: Phase, phases: Mapping[str, Phase]) -> str:
    """
    Hash of everything in the recipe that a phase and those that it reads depend on, with the seed.

    Args:
        phase (`Phase`)
        phases (`Mapping[str, Phase]`): The phases of its seed, by name.
    """
    recipe = phase.recipe
    content = {**recipe.model_dump(mode="json"), "arms": {name: arm.words() for name, arm in recipe.all_arms.items()}}
    own = {key: value for key, value in _leaves(content).items() if depends(phase, key) and not is_free(key, recipe)}
    # the seed of the recipe is that of the shared phases; other phases have their session's
    own["seed"] = recipe.seed if phase.is_shared else phase.session.seed
    read = [fingerprint(phases[name], phases) for name in phase.reads if name in phases]
    text = json.dumps([phase.name, own, read], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            name: leaf
            for part, inner in value.items()
            for name, leaf in _leaves(inner, f"{key}.{part}" if key else part).items()
        }
    return {key: value}
