"""``python -m kne_easyedit.cli`` is the command ``kne``."""

import sys

from kne_easyedit.cli import main

sys.exit(main())
