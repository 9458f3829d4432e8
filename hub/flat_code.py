"""
The sources of `configuration` and `modeling` as they go to the Hub, in one flat folder. Imports the standard library
alone: `.ci/lint_flat` runs it where nothing is installed.
"""

import re


# Our sources import absolutely, also inside functions; a folder on the Hub has room for one level of relative imports.
_OWN_IMPORT = re.compile(r"^( *)from (m2mkd\.(?:configuration|modeling)\.(\w+)) import", re.MULTILINE)


def flatten(source: str) -> str:
    """A source for the flat folder: `from m2mkd.modeling.losses import` becomes `from .losses import`."""
    return _OWN_IMPORT.sub(r"\1from .\3 import", source)


def own_imports(source: str) -> list[str]:
    """The modules that a source imports of `configuration` and `modeling`, e.g. `m2mkd.distillation.losses`."""
    return [match[1] for match in _OWN_IMPORT.findall(source)]
