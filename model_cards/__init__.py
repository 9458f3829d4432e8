"""Model card templates and the cards of this repository's recipes (Markdown files beside this one)."""
