"""What all tests share."""

from __future__ import annotations

import os
import signal

# torch's threads wait for each other at work, by default for long: where other processes want the
# cores too, every small product then takes a hundred times as long. Read when torch is first
# imported, here and in the programs that tests start.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
