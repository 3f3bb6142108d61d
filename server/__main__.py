"""`python -m server [flags]`: see `server.launch`."""

import os
import signal
import sys

if __name__ == "__main__":
    # Nothing has begun while the imports run, for a second or so: a signal has nothing to wait for.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

    from server.launch import main

    sys.exit(main(sys.argv[1:]))
