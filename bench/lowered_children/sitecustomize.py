"""On PYTHONPATH of a server under test: every process it starts lowers its Triton kernels as for SM120."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))

from sm120_lowering import install  # noqa: E402

install()
