"""`python -m qpipe` is `qpipe`."""

import sys

from qpipe.cli import main

sys.exit(main())
