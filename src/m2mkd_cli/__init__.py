"""
The console script `m2mkd`. It lies outside of the package, whose import waits seconds for torch and transformers:
`m2mkd --help` needs neither.
"""


def main() -> None:
    """Entry point of the console script."""
    from m2mkd.cli import main as command_line

    command_line()
