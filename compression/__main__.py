"""python -m compression COMMAND: what there is, what a checkpoint's tables cost, and smaller tables from trained ones.

Where Python's standard library owns a package of that name (3.14 and later): python compression/__main__.py COMMAND, which works everywhere.
"""

import sys
from pathlib import Path

COMMANDS = {
    "list": "the methods: knobs, bytes, papers",
    "convert": "a checkpoint with smaller tables from a trained one",
    "ledger": "what every table of a checkpoint costs, to the byte",
    "report": "error beside the optimum, as tables and pictures",
    "sweep": "train every method at several sizes, for quality against bytes",
    "frontier": "the table and the picture of one or more sweeps",
}


def main(argv: list[str]) -> int:
    """The exit status of the command; 2, after one line on stderr, where there is none of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("python -m compression COMMAND [--help], with COMMAND one of")
        print("\n".join(f"  {name:{width}}  {title}" for name, title in COMMANDS.items()))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: {argv[0]!r} is no command; there are {', '.join(COMMANDS)} (python -m compression --help)", file=sys.stderr)
        return 2
    import dlrm_xla  # noqa: F401 - finds our folder of that name wherever Python has one of its own

    # each is slow to import, so only the one that is asked for
    if argv[0] == "list":
        from compression.catalogue import main as command
    elif argv[0] == "convert":
        from compression.convert import main as command
    elif argv[0] == "ledger":
        from compression.show_ledger import main as command
    elif argv[0] == "report":
        from compression.report import main as command
    elif argv[0] == "frontier":
        from compression.frontier import main as command
    else:
        from compression.sweep import main as command
    return command(argv[1:])


if __name__ == "__main__":
    if not __package__:  # run as a file: the folder that Python looks in first is this one, and must be the one above
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(main(sys.argv[1:]))
