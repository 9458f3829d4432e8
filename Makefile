.PHONY: style quality test test-slow build

# Rewrite what a tool can rewrite.
style:
	ruff check --fix .
	ruff format .

# The checks of CI that run no code of ours.
quality:
	ruff check .
	ruff format --check .
	.ci/lint_flat

test:
	pytest

test-slow:
	pytest -m slow

# The wheel, into dist/.
build:
	python -m pip wheel --no-deps --wheel-dir dist .
