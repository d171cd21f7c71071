"""`python -m gci_kernels` is `gci-kernels`."""

import sys

from gci_kernels.cli import main

sys.exit(main())
