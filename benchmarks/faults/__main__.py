"""``python -m benchmarks.faults``: see `benchmarks.faults._runs`, which processes of ``--jobs`` can import."""

import sys

from benchmarks.faults import BROKEN
from benchmarks.faults._runs import main

if __name__ == "__main__":
    sys.exit(any(row["outcomes"][BROKEN] for row in main().values()))
