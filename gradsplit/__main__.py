"""``python -m gradsplit``: the command line, where the console script is not on PATH."""

from .cli import main

if __name__ == "__main__":
    main()
