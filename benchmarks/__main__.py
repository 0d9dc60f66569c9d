"""``python -m benchmarks COMMAND``; each command is the module of that name and has --help."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "time an op family",
    "tiles": "compare attention's tiles on a GPU",
    "block": "time a whole PixArt block with and without the ops",
    "model": "time a whole model with and without the ops, and diffusers'",
    "generation": "time drawing with guidance, and diffusers' pipeline",
    "generation_memory": "count or measure the memory that drawing takes, by mode",
    "floor": "count what a block must compute and move, and what it does",
    "memory": "count what a block keeps for its backward",
    "conditioning": "count or measure a step of the adaLN ablation and of adaLN-single",
    "optimizer": "time a step of CAME, came-pytorch's and fused AdamW",
    "quickstart": "run the quickstart over several seeds",
    "transitions": "train small models from stage to stage, rightly and wrongly",
    "plot": "draw the results of an op family",
    "report": "write the tables of README and docs from the results",
    "hardware": "everything that a GPU can prove, then its timings",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in COMMANDS:
        lines = "\n".join(f"  {command:<11} {what}" for command, what in COMMANDS.items())
        sys.exit(f"usage: python -m benchmarks COMMAND\n{lines}")
    importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
