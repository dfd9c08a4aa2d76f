"""DLRM for PyTorch/XLA, CUDA and CPU."""

# Python 3.14 owns a package called `compression`, and gzip imports from it. Ours therefore has no __init__.py and is found
# by extending the path of whichever of the two is imported.
from pathlib import Path

import compression

_FOLDER = str(Path(__file__).resolve().parent.parent / "compression")
if _FOLDER not in list(compression.__path__):
    compression.__path__.append(_FOLDER)
