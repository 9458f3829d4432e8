"""For mkdocs.yml: the types of the Hugging Face docstring form as plain names; the table has a column of defaults."""

import re
from typing import Any

from griffe import Extension, Object


TYPE = re.compile(r" \(\[?`([^`]+)`\]?(?:, \*optional\*)?(?:, defaults to [^)]*)?\):")


class PlainTypes(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = TYPE.sub(r" (\1):", obj.docstring.value)
