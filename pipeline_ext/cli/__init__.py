"""The command line: ``pipeline-ext`` and ``python -m pipeline_ext``."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import PipelineError
from . import doctor, plan, train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="pipeline-ext", description="Pipeline-parallel training for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train.add_parser(commands)
    plan.add_parser(commands)
    doctor.add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except (PipelineError, OSError) as error:
        print(f"pipeline-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells report it
