"""Where the console script and python -m gns_controller begin."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. The bare install has the console script, too, and not what it needs."""
    try:
        import typer  # noqa: F401 - cli imports it at its top
    except ImportError:
        print("gns-controller needs its service dependencies: pip install 'gns-controller[service]'", file=sys.stderr)
        raise SystemExit(5) from None
    from gns_controller.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
