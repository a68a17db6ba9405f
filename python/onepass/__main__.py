"""The command line: ``python -m onepass info``."""

import argparse
import sys

from onepass import _info


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m onepass", description="Fused attention for recurrent seq2seq models.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, backends and why one is not available, instruction set, measured ceilings")
    info.add_argument("--no-measure", action="store_true", help="leave out the ceilings, which take some seconds to measure")
    options = parser.parse_args(arguments)
    print("\n".join(_info.lines(measure=not options.no_measure)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
