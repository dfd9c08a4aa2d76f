"""What several packages do with files."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes what was made, renamed and removed in a folder survive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
