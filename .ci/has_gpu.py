"""Say in a sentence why `make gpu` cannot run with this Python, before anything is installed."""

import sys

try:
    import torch
except ImportError:
    sys.exit(
        f"make gpu needs a Python with torch for the GPU, and {sys.executable} has no torch: give "
        "another, make gpu PYTHON=path/to/python"
    )
if not torch.cuda.is_available():
    sys.exit(
        f"make gpu needs a GPU, and torch {torch.__version__} of {sys.executable} finds none here"
    )
