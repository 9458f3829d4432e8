"""What a recipe would cost."""
