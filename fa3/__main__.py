"""python -m fa3 inspect ...: what a call would run, without a GPU.

python -m fa3 predict ...: how fast the attention kernel of a cubin would run.
"""

import signal
import sys

from .inspect.cli import main

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end as other tools do when nobody reads on: ... | head
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
