"""The command line: ``python -m l2l_fast COMMAND``."""

from .command_line import main

__all__ = ["main"]
