"""The command line: parsing, supervising child processes, and the entry points of those processes."""
