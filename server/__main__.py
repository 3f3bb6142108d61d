"""`python -m server [flags]`: see `server.launch`."""

import sys

from server.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
