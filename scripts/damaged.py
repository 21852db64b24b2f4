"""Makes pip forget every package of this environment that is not whole, so that the next install brings it again.

A pip that was killed leaves packages whose metadata are there and whose files are not, and takes them for installed.
"""

import csv
import shutil
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))


def whole(info: Path) -> bool:
    """Every file of RECORD is there with its size, and so is RECORD's own line."""
    try:
        rows = list(csv.reader((info / "RECORD").open(newline="", encoding="utf-8")))
        files = [row for row in rows if "__pycache__" not in row[0]]
        sizes = [(site / row[0]).stat().st_size == int(row[2] or -1) or not row[2] for row in files]
    except (OSError, ValueError, IndexError):
        return False
    return all(sizes) and f"{info.name}/RECORD" in {row[0] for row in rows}


for left in site.glob("~*"):  # what pip had put aside to remove
    shutil.rmtree(left, ignore_errors=True)
for info in site.glob("*.dist-info"):
    if not whole(info):
        print(f"setup:   {info.name.removesuffix('.dist-info')} is not whole")
        shutil.rmtree(info)
