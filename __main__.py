"""``python -m eagle3`` is ``eagle3``."""

import sys

from .cli import main

sys.exit(main())
