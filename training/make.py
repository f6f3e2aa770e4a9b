"""Makes the builtin model anew: scenes, tokenizer, both stages of training, export.

    python -m training.make                      # three and a half hours on two cores
    nice -n 19 python -m training.make           # while other work goes on

Interrupted, the same command goes on from the last checkpoint; `training/runs/` holds everything that is not shipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from training.tokenizer import PATH as TOKENIZER


def main() -> None:
    """Runs every step in a process of its own, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100_000, help="scenes to draw ahead, 77 kB each")
    parser.add_argument("--vision-minutes", type=float, default=38)
    parser.add_argument("--language-minutes", type=float, default=150)
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    o = parser.parse_args()
    processes = ["--processes", str(o.processes)]
    _run("training.cache", "--scenes", str(o.scenes), *processes)
    if not TOKENIZER.exists():
        _run("training.tokenizer")
    _run("training.vision", "--minutes", str(o.vision_minutes), *processes)
    _run("training.language", "--minutes", str(o.language_minutes), *processes)
    _run("training.export")


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    main()
