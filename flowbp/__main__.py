"""`flowbp` and `python -m flowbp`: the command line, also for launchers of several processes, such as
`torchrun -m flowbp eval ...`.
"""

import sys

from flowbp.runtime.reproducible import TOO_LATE, request_equal_bytes


def main() -> None:
    """Run the command line. If a package beyond the core install (torch, NumPy) is missing, name the extra that has
    it.
    """
    if not request_equal_bytes():
        print(f"warning: {TOO_LATE}", file=sys.stderr)
    try:
        from flowbp.cli.commands import main as run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "flowbp").startswith("flowbp"):  # a fault of flowbp, not a package that is missing
            raise
        way_out = "The command line needs the extra train: pip install 'flowbp[train]'"
        sys.exit(f"error: {error.name} is not installed. {way_out}")


if __name__ == "__main__":
    main()
