"""`python -m fedkit` is `fedkit`."""

from fedkit.cli import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
