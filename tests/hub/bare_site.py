"""An environment of a reader who has not installed this package."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def torch_and_transformers_alone(site: Path) -> Path:
    """A folder of links to the installed torch, transformers and pillow, and to what these require."""
    site.mkdir()
    waiting, done = ["torch", "transformers", "pillow"], set()
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        if distribution.name in done:
            continue
        done.add(distribution.name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
        required = map(Requirement, distribution.requires or [])
        waiting += [item.name for item in required if item.marker is None or item.marker.evaluate({"extra": ""})]
    return site
