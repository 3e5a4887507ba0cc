"""The command line: ``pipeline-ext`` and ``python -m pipeline_ext``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import PipelineError

# Each is a module here, imported only for its own command: plan and the list of commands need no torch.
_COMMANDS = {
    "train": "train a byte-level GPT on text",
    "plan": "simulate schedules, compare them, search for a better one",
    "doctor": "show what is installed and what works here",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="pipeline-ext", description="Pipeline-parallel training for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in _COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name in argv:
            importlib.import_module(f".{name}", __name__).set_up(command)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except (PipelineError, OSError) as error:
        print(f"pipeline-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells report it
