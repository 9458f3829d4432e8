# /// script
# requires-python = ">=3.10"
# dependencies = ["m2mkd[demo]"]
# ///
"""`accelerate launch train.py [RECIPE.yaml] [--key.sub value …]`; without a recipe, the embedded digits recipe."""

from m2mkd_cli import train


if __name__ == "__main__":
    train()
