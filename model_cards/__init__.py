"""Model card templates, and the model cards of this repository's recipes, as Markdown files in this folder."""
