import sys

from kne_easyedit.cli import main

sys.exit(main())
