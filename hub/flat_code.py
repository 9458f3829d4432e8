"""
The sources of `configuration` and `modeling` as they go to the Hub, in one flat folder. This file imports only the
standard library: `.ci/lint_flat` runs it where nothing is installed.
"""

import re


# Our sources use absolute imports, also inside functions; a folder on the Hub allows one level of relative imports.
_OWN_IMPORT = re.compile(r"^( *)from (m2mkd\.(?:configuration|modeling)\.(\w+)) import", re.MULTILINE)


def flatten(source: str) -> str:
    """Adapt a source to the flat folder: `from m2mkd.modeling.losses import` becomes `from .losses import`."""
    return _OWN_IMPORT.sub(r"\1from .\3 import", source)


def own_imports(source: str) -> list[str]:
    """List the modules that a source imports from `configuration` and `modeling`, e.g. `m2mkd.modeling.stitches`."""
    return [match[1] for match in _OWN_IMPORT.findall(source)]
