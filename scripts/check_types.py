"""Runs mypy and holds each room to the number of errors that [tool.type-errors] of pyproject.toml grants it.

A room that is not named there has none. The numbers may only go down: more errors fail, fewer ask for the lower number.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/qlibero")


def room(file: str) -> str:
    """The folder below the package, or the file that lies beside the folders."""
    path = Path(file)
    return path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else file


def main() -> int:
    granted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"].get("type-errors", {})
    command = [sys.executable, "-m", "mypy", "--output", "json"]
    mypy = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if mypy.returncode not in (0, 1) or mypy.stderr:
        print(mypy.stdout + mypy.stderr, file=sys.stderr)
        return mypy.returncode or 1
    errors = defaultdict(list)
    for line in mypy.stdout.splitlines() if mypy.returncode else ():  # without an error it says so in words
        error = json.loads(line)
        if error["severity"] == "error":
            errors[room(error["file"])].append(error)
    failed = False
    for name in sorted({*errors, *granted}):
        found, most = len(errors[name]), granted.get(name, 0)
        if found > most:
            failed = True
            # What was edited last stands last, where it is seen
            for error in sorted(errors[name], key=lambda e: ((ROOT / e["file"]).stat().st_mtime, e["line"])):
                print(f"{error['file']}:{error['line']}: {error['message']} [{error['code']}]", file=sys.stderr)
            print(f"types: {found} errors in {name}, {most} are granted: mend the new ones", file=sys.stderr)
        elif found < most:
            lower = f"write {name!r} = {found}" if found else f"delete {name!r}"
            print(f"types: {found} errors in {name}, not {most}: {lower} in [tool.type-errors] of pyproject.toml")
    total = sum(map(len, errors.values()))
    print(f"types: {'failed' if failed else 'ok'}, {total} errors in all, granted {sum(granted.values())}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
