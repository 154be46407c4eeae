"""The command `layerrl` as a module, for `accelerate launch -m layerrl train ...`."""

import sys

from layerrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
