"""
Not part of the package. A clone called m2mkd is what `import m2mkd` finds where Python starts in the folder that holds
the clone; this hands over the package inside it.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


# pytest imports this file under other names
if __name__ == "m2mkd":
    _root = Path(__file__).parent
    _source = _root / "src" / "m2mkd"
    # the sub-packages are folders of the clone
    _spec = spec_from_file_location(
        "m2mkd", _source / "__init__.py", submodule_search_locations=[str(_source), str(_root)]
    )
    sys.modules["m2mkd"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["m2mkd"])
