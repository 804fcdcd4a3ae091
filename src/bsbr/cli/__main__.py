"""`python -m bsbr.cli`."""

import sys

from bsbr.cli import main

sys.exit(main())
