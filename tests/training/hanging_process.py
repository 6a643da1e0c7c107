"""A run of two processes of which the second dies while the first hangs where no signal and no error reaches it."""

import os
import signal
import sys
import threading
from pathlib import Path

from vkd.training import distribution

distribution.STUCK_SECONDS = 0.5
processes = distribution.join()
processes.if_stuck(lambda error: Path(sys.argv[1]).write_text(str(error)))
assert processes.agree(False) is False
if processes.is_first:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Event().wait()
os.kill(os.getpid(), signal.SIGKILL)
