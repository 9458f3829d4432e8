"""
Torture: runs that are killed, run out of disk or are started twice, and commands that get damaged or absurd input.

    python benchmarks/torture.py --kills 100 --mutations 1000 --json result.json

A run is killed at random events of its file system and at random times, alone and with workers, several times in a
row. Then it must end with the files of a run that nothing has interrupted, bit for bit, times apart. Every other
failure must end in one message that says what to do: a traceback, a crash, a hang and a message without advice are
faults.

What needs a file system that fills or becomes read-only mounts a tmpfs, and so needs root; without, it is left out and
the table says so. Every moment and every mutation follows from --seed.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torture_mutations import Mutations
from torture_runs import Reference, Torture


FAULTS = ("traceback", "crash", "hang", "advice", "lost", "left processes", "no end")


def main() -> None:
    """Torture, print a table and the faults, and end with status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often a run is killed")
    parser.add_argument(
        "--disks", type=int, default=6, help="runs whose disk fills or becomes read-only, of each kind"
    )
    parser.add_argument("--twice", type=int, default=3, help="runs that are started twice at a time")
    parser.add_argument("--mutations", type=int, default=200, help="mutated inputs")
    parser.add_argument("--areas", nargs="+", help="kinds of input to mutate; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    start = time.monotonic()
    torch.set_num_threads(1)
    import_everything()
    with tempfile.TemporaryDirectory(prefix="torture") as folder:
        counts, faults = torture(Path(folder), options)
    print_table(counts, time.monotonic() - start)
    for fault in faults:
        print(fault, file=sys.stderr)
    if options.json:
        result = {"options": {**vars(options), "json": str(options.json)}, "counts": counts, "faults": faults}
        options.json.write_text(json.dumps({**result, "seconds": time.monotonic() - start}, indent=2))
    sys.exit(bool(faults))


def torture(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Counter[str]], list[str]]:
    """Do what the options say; returns the counts by kind, and what each fault was."""
    reference = Reference(folder)
    runs = Torture(folder, reference, options.seed)
    runs.kill(options.kills)
    runs.fill_disk(options.disks)
    if os.geteuid() == 0:
        runs.fill_tmpfs(2 * options.disks)
    runs.start_twice(options.twice)
    mutations = Mutations(folder, reference, options.seed)
    areas = options.areas or list(mutations.areas)
    for number in range(options.mutations):
        area = areas[number % len(areas)]
        ending, what = mutations.one(area)
        name = f"mutated: {area}"
        row = runs.counts.setdefault(name, Counter())
        row.update(["times", *(["ends"] if ending.code == 0 else []), *([ending.fault] if ending.fault else [])])
        if ending.fault:
            runs.faults.append(f"{name}: {ending.fault}: {what}\n{ending.said.strip()[-2500:]}\n")
    return runs.counts, runs.faults


def import_everything() -> None:
    """Import what the commands import late, so that their processes do not have to."""
    import m2mkd.cli
    import m2mkd.conversion.to_official
    import m2mkd.evaluation.few_shot
    import m2mkd.evaluation.inspection
    import m2mkd.experiment.recipe_file
    import m2mkd.experiment.runner
    import m2mkd.experiment.study.report
    import m2mkd.experiment.study.runs
    import m2mkd.hub.assemble
    import m2mkd.hub.push
    import m2mkd.hub.upcycle  # noqa: F401

    # what is here now is never collected, so that collections in the processes are short
    gc.freeze()


def print_table(counts: Mapping[str, Mapping[str, int]], seconds: float) -> None:
    """Print how often each thing was done, and the faults of each kind."""
    table = Table("", "times", "ends", *FAULTS, title=f"{seconds / 60:.0f} min")
    for name, row in counts.items():
        table.add_row(name, *(str(row.get(column, 0)) for column in ("times", "ends", *FAULTS)))
    if os.geteuid() != 0:
        table.add_row("full and read-only tmpfs", *["needs root"] * (2 + len(FAULTS)))
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    main()
