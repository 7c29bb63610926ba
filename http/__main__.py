"""``python -m llamaherd.http`` is the command ``llamaherd``."""

import sys

from llamaherd.http.cli import main

if __name__ == "__main__":
    sys.exit(main())
