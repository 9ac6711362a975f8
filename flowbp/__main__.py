"""`python -m flowbp`: the command line, for launchers of several processes (torchrun -m flowbp eval ...)."""

from flowbp.cli import main

main()
