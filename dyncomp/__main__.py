"""``python -m dyncomp`` is the ``dyncomp`` command."""

import sys

from dyncomp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
