"""For every test."""

from __future__ import annotations

import signal

# A shell starts background jobs with Ctrl-C ignored, and all that they start inherits it: a test that interrupts a
# command would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
