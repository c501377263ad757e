"""`python -m textmill` is the same program as the `textmill` command."""

from textmill.cli.main import run

if __name__ == "__main__":
    run()
