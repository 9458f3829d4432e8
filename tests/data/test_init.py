import subprocess
import sys

import pytest

import m2mkd.data


class TestPackage:
    def test_every_public_name_resolves(self):
        for name in m2mkd.data.__all__:
            assert getattr(m2mkd.data, name) is not None

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="nothing"):
            m2mkd.data.nothing  # noqa: B018

    def test_import_is_light(self):
        heavy = ["datasets", "evaluate", "mlxtend", "sklearn"]
        # the models come first: what transformers imports for them differs from release to release
        code = (
            "import sys, m2mkd; before = set(sys.modules); import m2mkd.data; "
            f"print([name for name in {heavy} if name in set(sys.modules) - before])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"
