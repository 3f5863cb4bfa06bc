"""Pages of lists: opaque cursors, and the log of a run page by page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Query
from starlette.concurrency import run_in_threadpool

from gns_controller.store import LogEntry
from gns_controller.web.dependencies import Service
from gns_controller.web.problems import INVALID_INPUT, FieldProblem, ProblemError

Item = TypeVar("Item")

CursorQuery = Annotated[
    str | None, Query(max_length=64, description="`next_cursor` of the page before; opaque.", examples=[None])
]


@dataclass(frozen=True, slots=True)
class LogPage:
    """The page of a run's log that a request asks for."""

    cursor: str | None
    limit: int
    order: Literal["asc", "desc"]


def _log_page(
    cursor: CursorQuery = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most items of the page.")] = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")] = "asc",
) -> LogPage:
    return LogPage(cursor=cursor, limit=limit, order=order)


LogPageQuery = Annotated[LogPage, Depends(_log_page)]


async def read_log_page(
    service: Service, run_id: str, page: LogPage, *, measurements: bool, item_of: Callable[[LogEntry], Item]
) -> tuple[tuple[Item, ...], str | None]:
    """Read one page of a run's log.

    Args:
        service: the controller and its companions.
        run_id: name of the run.
        page: what the request asks for.
        measurements: measurements, or everything else.
        item_of: makes an item of a log line.

    Returns:
        The items, and the cursor of the next page; None after the last.
    """
    # One line more than asked for shows whether another page follows.
    entries = await run_in_threadpool(
        service.controller.entries,
        run_id,
        measurements=measurements,
        after=decode_cursor(page.cursor),
        limit=page.limit + 1,
        descending=page.order == "desc",
    )
    following = encode_cursor(entries[page.limit - 1].sequence) if len(entries) > page.limit else None
    return tuple(map(item_of, entries[: page.limit])), following


def encode_cursor(position: int) -> str:
    """Return an opaque cursor for a position."""
    return base64.urlsafe_b64encode(f"s{position}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> int | None:
    """Return the position in a cursor of this service.

    Raises:
        ProblemError: the text is not one.
    """
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    digits = text[1:]
    if text[:1] != "s" or not digits.isdigit() or len(digits) > 18:
        errors = [FieldProblem(parameter="cursor", detail="Should be the next_cursor of a page of this list")]
        raise ProblemError(INVALID_INPUT, "The cursor is none of ours.", errors=errors)
    return int(digits)
