.PHONY: style quality test test-slow build

# Fix everything that a tool can fix.
style:
	ruff check --fix .
	ruff format .

# The checks of CI that do not run our code.
quality:
	ruff check .
	ruff format --check .
	.ci/lint_flat

test:
	pytest

test-slow:
	pytest -m slow

# Build the wheel in dist/.
build:
	python -m pip wheel --no-deps --wheel-dir dist .
