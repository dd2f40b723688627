"""`python -m dynaconv`, which torchrun needs: `torchrun --nproc-per-node 2 -m dynaconv train scenes_dense`."""

import sys

from dynaconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
