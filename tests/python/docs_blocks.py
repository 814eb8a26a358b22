"""Runs the Python blocks of the guides: `docs_blocks.py BLOCKS.json`, in the folder of that file."""

import json
import os
import sys
from pathlib import Path


def main(file: Path) -> None:
    blocks = json.loads(file.read_text())
    os.chdir(file.parent)
    for block in blocks:
        # A failure names the text and its line.
        exec(compile(block["text"], block["place"], "exec"), {"__name__": "__main__"})
        print(block["place"], "ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
