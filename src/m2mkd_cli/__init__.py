"""
The console script `m2mkd`. It is outside the package because importing that takes seconds (torch and transformers),
and `m2mkd --help` needs neither.
"""


def main() -> None:
    """Entry point of the console script."""
    from m2mkd.cli import main as command_line

    command_line()
