"""`python -m flanctl`."""

import sys

from flanctl.cli import main

sys.exit(main())
