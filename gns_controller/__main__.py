"""Entry point of the console script and of `python -m gns_controller`, also where only the core is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_USAGE = 2
EXIT_DEPENDENCY = 5

COMMANDS_BY_EXTRA = {
    "service": ("serve", "doctor", "db", "token", "config", "run", "replay"),
    "demo": ("demo", "calibrate"),
}
"""Extra to install -> commands that need it."""


def main() -> None:
    """Run the command line. Without the packages it needs, print the commands and how to install them."""
    try:
        import typer  # noqa: F401 - cli imports it at its top
    except ImportError:
        raise SystemExit(_run_without_typer(sys.argv[1:])) from None
    from gns_controller.cli import main as cli

    cli.main()


def _run_without_typer(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] == "--help":
        print(_help())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"gns-controller {version('gns-controller')}")
        return 0
    print("gns-controller needs its service dependencies: pip install 'gns-controller[service]'", file=sys.stderr)
    return EXIT_DEPENDENCY


def _help() -> str:
    lines = [
        "Usage: gns-controller [OPTIONS] COMMAND [ARGS]...",
        "",
        "  Batch-size plans for training runs, from measured gradient noise scales.",
        "",
        "Options:",
        "  -V, --version  Print the version and exit.",
        "  --help         Print this text and exit.",
        "",
        "Only the core is installed. Commands, by what they need:",
    ]
    for extra, commands in COMMANDS_BY_EXTRA.items():
        lines.append(f"  pip install 'gns-controller[{extra}]'".ljust(41) + ", ".join(commands))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
