"""How every command speaks: exit codes, one sentence for what goes wrong, options that many commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from gns_controller.core.errors import GnsError, InvalidInputError, MissingDependencyError, StoreError

EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_PORT = 3
EXIT_DATABASE = 4
EXIT_DEPENDENCY = 5

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def sentences() -> Iterator[None]:
    """Turn what can be expected to go wrong into one sentence and an exit code."""
    try:
        yield
    except MissingDependencyError as error:
        leave(EXIT_DEPENDENCY, str(error))
    except ImportError as error:
        if (error.name or "").startswith("gns_controller"):
            raise
        leave(EXIT_DEPENDENCY, f"{error.name} is not installed: pip install 'gns-controller[service]'")
    except StoreError as error:
        leave(EXIT_DATABASE, str(error))
    except InvalidInputError as error:
        leave(EXIT_USAGE, str(error))
    except GnsError as error:
        leave(EXIT_PORT if type(error).__name__ == "PortTakenError" else EXIT_WRONG, str(error))


def leave(code: int, sentence: str) -> NoReturn:
    """End the command with one sentence on stderr."""
    print(f"gns-controller: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


def print_json(value: object) -> None:
    """For --json."""
    print(json.dumps(value, indent=2))
