"""`python -m ps` is the command `zero-ps`."""

import sys

from ps.cli import main

sys.exit(main())
