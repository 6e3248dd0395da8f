"""The standard streams as commands may count on them, whoever started the process."""

from __future__ import annotations

import io
import os
import sys


def prepare() -> None:
    """Standard streams that are closed (a daemon's, `>&-`) lead nowhere, instead of failing; and
    characters that stdout's encoding lacks are printed as \\u escapes."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # Also for the descriptor: files opened later would get its number, and ranks and
            # compilers, which inherit it, write into them.
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            setattr(sys, name, open(descriptor, "w" if descriptor else "r"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def takes_all_characters() -> bool:
    """Whether stdout's encoding has every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").replace("_", "") == "utf8"
