"""The version, importable without the package's dependencies (setup.cfg reads it)."""

__version__ = "0.1.0"
