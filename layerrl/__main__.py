"""`python -m layerrl` is the command `layerrl`: `accelerate launch -m layerrl train ...` needs it."""

import sys

from layerrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
