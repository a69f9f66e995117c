"""Prints what extras of setup.cfg need, a line each: quicker to install than the package once more."""

import configparser
import sys
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg")
for extra in sys.argv[1:]:
    print(config["options.extras_require"][extra].strip())
