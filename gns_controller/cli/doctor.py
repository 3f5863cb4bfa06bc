"""Checks of this machine, one finding each. A check that fails is a finding, never an exception."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import httpx

from gns_controller.core.errors import GnsError
from gns_controller.core.policies import POLICIES, plug_ins
from gns_controller.service.settings import Settings
from gns_controller.store.administration import check_database

_PACKAGES = ("gns-controller", "pydantic", "fastapi", "uvicorn", "sqlalchemy", "alembic", "prometheus-client")


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str


def examine(read_settings: Callable[[], Settings], *, url: str | None) -> list[Finding]:
    """Make every check that can be made from here."""
    findings = [_versions(), _policies()]
    try:
        settings = read_settings()
    except GnsError as error:
        findings.append(Finding("settings", False, str(error)))
    else:
        findings.append(_exposure(settings))
        findings.append(_database(settings))
    if url is not None:
        findings.append(_controller(url))
    return findings


def _versions() -> Finding:
    installed, missing = [f"Python {platform.python_version()}"], []
    for package in _PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("versions", False, f"not installed: {', '.join(missing)}; pip install 'gns-controller[service]'")
    return Finding("versions", True, ", ".join(installed))


def _policies() -> Finding:
    added = plug_ins()
    usable = [f"{plug_in.name} ({plug_in.distribution})" for plug_in in added if plug_in.problem is None]
    problems = [
        f"{plug_in.problem}{f' {plug_in.cause}' if plug_in.cause else ''}" for plug_in in added if plug_in.problem
    ]
    detail = f"{len(POLICIES)} built in, from other packages: {', '.join(usable) or 'none'}"
    return Finding("policies", not problems, "; ".join([detail, *problems]))


def _exposure(settings: Settings) -> Finding:
    if settings.is_loopback:
        return Finding("settings", True, "listens on loopback only")
    if settings.token_hashes:
        return Finding("settings", True, f"listens on {settings.host}, with {len(settings.token_hashes)} token(s)")
    return Finding("settings", False, f"listens on {settings.host} without GNS_TOKEN_HASHES: `serve` will refuse")


def _database(settings: Settings) -> Finding:
    try:
        report = check_database(settings.database_url)
    except GnsError as error:
        return Finding("database", False, str(error))
    return Finding("database", report.ok, report.detail)


def _controller(url: str) -> Finding:
    try:
        response = httpx.get(url.rstrip("/") + "/readyz", timeout=10.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return Finding("controller", False, f"no controller answers at {url}")
    if response.status_code == 200:
        return Finding("controller", True, f"ready at {url}")
    return Finding("controller", False, f"answers {response.status_code} at {url}: not ready")
