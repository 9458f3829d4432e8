"""The classes of ImageNet and of the sets drawn from it."""

from functools import cache
from importlib import resources


@cache
def _marks() -> dict[str, set[str]]:
    """The marks of each WordNet id, in the order of ImageNet's labels."""
    text = (resources.files("m2mkd.data") / "imagenet_classes.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {row[0]: set(row[1:]) for row in rows}


def imagenet_classes(*marks: str) -> list[str]:
    """WordNet ids of the classes of ImageNet-1k that have all `marks`, in the order of their labels.

    Without marks these are all 1,000 classes. `"tiny"` selects the 200 of Tiny-ImageNet, `"r"` the 200 of ImageNet-R,
    and `"tiny", "r"` the 62 of Tiny-ImageNet-R (Weiss et al., arXiv 2210.08031: the classes that both sets have).
    """
    return [wnid for wnid, own in _marks().items() if own.issuperset(marks)]
