"""The command line `flowbp`."""
