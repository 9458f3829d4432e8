"""The Hub: push, assemble and export."""
