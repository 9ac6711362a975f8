"""python benchmarks/run.py --op quadrature_update --json FILE: the same as `flowbp bench`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flowbp_kernels.bench import main  # noqa: E402

if __name__ == "__main__":
    main()
