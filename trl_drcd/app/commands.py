"""`trl-drcd app`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str]) -> None:
    """
    Serve a web page with the tabs Play (sample with lambda as a slider, beside guidance), Listen (an evaluation's
    samples) and Rate (a study). `--export FOLDER` writes a static page of the samples instead. `--demo` uses the
    results of `make demo`.
    """
    from trl import TrlParser

    from trl_drcd.app.arguments import AppArguments
    from trl_drcd.validation.command_line import parse_command_line

    kind: Any = AppArguments
    parser = TrlParser(kind, prog="trl-drcd app", description=main.__doc__)
    (arguments,) = parse_command_line(parser, argv)
    if arguments.export:
        from trl_drcd.app.export import export_page

        print(f"Page: {export_page(str(arguments.evaluation), arguments.export, arguments.title)}")
        return
    from trl_drcd.app.server import serve

    serve(arguments)
