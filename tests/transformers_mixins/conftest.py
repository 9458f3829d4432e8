"""The marks that the tests of transformers carry."""

import pytest


MARKS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test",
    "is_pipeline_test", "flex_attn_test", "timeout",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
