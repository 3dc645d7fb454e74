"""``python -m layercache`` is the command ``layercache``."""

import sys

from layercache.cli import main

if __name__ == "__main__":
    sys.exit(main())
