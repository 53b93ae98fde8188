"""DiffEcho book: the thin package behind the chapters.

Each module carries the name of the word its chapter uses; see the module docstrings.
"""

__version__ = "0.1.0"


class DiffEchoError(ValueError):
    """Bad input, said in one line: what was found, where, and what to do about it."""
