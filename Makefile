.PHONY: style quality test test-slow docs build

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

# Build the site of docs/ in build/site, and run its notebook.
docs:
	python -m pip install --quiet --no-deps --upgrade --target build/tree .
	mkdocs build --strict
	pytest -n 0 -m slow -k notebook tests/test_docs.py

# Build the wheel in dist/.
build:
	python -m pip wheel --no-deps --wheel-dir dist .
