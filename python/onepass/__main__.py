"""The command line: ``python -m onepass info | train | decode | evaluate | bench``."""

import sys

from onepass import _info

NEEDS = "pip install rich safetensors typer"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. Everything but ``info`` needs the packages of the extra ``seq2seq``."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        import typer

        from onepass.benchmarks.command import bench
        from onepass.seq2seq import commands
        from onepass.seq2seq.data import DataError
    except ModuleNotFoundError as missing:
        if given[:1] == ["info"] and set(given[1:]) <= {"--no-measure"}:
            _print_info(no_measure="--no-measure" in given)
            return 0
        print(f"{missing}: `python -m onepass info` works without it, all other commands need `{NEEDS}`", file=sys.stderr)
        return 2

    app = typer.Typer(
        help="Fused attention for recurrent sequence-to-sequence models.", no_args_is_help=True, pretty_exceptions_enable=False,
        add_completion=False,
    )  # fmt: skip

    @app.command()
    def info(
        no_measure: bool = typer.Option(False, "--no-measure", help="Leave out the ceilings, which take some seconds to measure."),
    ) -> None:
        """Versions, backends and why one is not available, instruction set, measured ceilings."""
        _print_info(no_measure)

    for command in (commands.train, commands.decode, commands.evaluate, bench):
        app.command()(command)
    try:
        app(given, prog_name="python -m onepass")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror}", file=sys.stderr)
        return 2
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _print_info(no_measure: bool) -> None:
    print("\n".join(_info.lines(measure=not no_measure)))


if __name__ == "__main__":
    sys.exit(main())
