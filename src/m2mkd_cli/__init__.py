"""
Entries of the command line. They are outside the package because importing that takes seconds (torch and
transformers): `m2mkd --help` needs neither, and a command says that it has started before it loads them.
"""


def main() -> None:
    """Entry point of the console script."""
    from m2mkd.cli import main as command_line

    command_line()


def train() -> None:
    """Entry point of `train.py`."""
    from m2mkd.cli import train as command_line

    command_line()
