"""A stand-in for `qlibero run-shard` with its contract, not its weight: rows of 0.3 s, durable, never done twice.

usage: light_shard.py run-shard --manifest M (--index I | --merge)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

ROWS, SECONDS = int(os.environ.get("LIGHT_ROWS", "40")), 0.3


def rows(directory: Path, index: int) -> list[int]:
    found = []
    for path in sorted(directory.glob(f"rows-{index}-*.jsonl")):
        found += [json.loads(line)["row"] for line in path.read_text().splitlines() if line.endswith("}")]
    return found


def main() -> int:
    directory = Path(sys.argv[sys.argv.index("--manifest") + 1]).parent
    if "--merge" in sys.argv:
        (directory / "merged").write_text("once")
        return 0
    index = int(sys.argv[sys.argv.index("--index") + 1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    done = set(rows(directory, index))
    name = f"rows-{index}-{time.time_ns()}.jsonl"
    file = os.open(directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    (directory / f"pid-{index}").write_text(str(os.getpid()))
    for row in range(ROWS):
        if row not in done:
            time.sleep(SECONDS)
            os.write(file, json.dumps({"row": row, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}).encode() + b"\n")
            os.fsync(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
