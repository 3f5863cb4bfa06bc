"""The page: one HTML file at two addresses, and its files. No build step, nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from gns_controller.web.problems import NOT_FOUND, ProblemError

PAGE = Path(__file__).parents[1] / "page"

router = APIRouter(include_in_schema=False)


class _Files(StaticFiles):
    """Static files that browsers ask about each time: an upgrade must not meet yesterday's script."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """One file, or 304."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.get("/")
@router.get("/runs/{run_id}")
async def page() -> Response:
    """index.html: the script reads the address."""
    index = PAGE / "index.html"
    if not index.is_file():
        raise ProblemError(NOT_FOUND, "This installation has no page; the REST API is under /api/v1.")
    return FileResponse(index, media_type="text/html", headers={"Cache-Control": "no-cache"})


def add_files(app: FastAPI) -> None:
    """Serve what the page loads."""
    app.mount("/static", _Files(directory=PAGE, check_dir=False), name="static")
