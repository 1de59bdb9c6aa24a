"""`python -m sglang_sm120_launch`, for where the console command is not on PATH."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
