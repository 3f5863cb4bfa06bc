"""Everything that can be set, read from the environment once, by cli.py."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_SHA256_HEX = re.compile(r"[0-9a-f]{64}")


class Settings(BaseSettings):
    """How one controller process runs. Every field is the environment variable GNS_<NAME>."""

    model_config = SettingsConfigDict(
        env_prefix="GNS_", frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    database_url: str = "sqlite:///gns.db"
    """Where runs are kept: sqlite:///relative/path, sqlite:////absolute/path or postgresql://user:password@host/name."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs token_hashes."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line written to standard error."""
    token_hashes: Annotated[tuple[str, ...], NoDecode] = ()
    """SHA-256, in hex and separated by commas, of the bearer tokens that are accepted. Empty: no token is asked for."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 2**20
    """Largest request body."""
    max_measurements_per_request: Annotated[int, Field(ge=1, le=100_000)] = 500
    """Most measurements in one request."""
    write_queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Writes that may wait for the disk; more are answered 429."""
    max_event_streams: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Event streams and waiting schedule requests open at once; more are answered 503."""
    silent_after_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A run is silent after this long without a report, or after ten times its usual gap if that is longer."""
    metrics_retention_seconds: Annotated[float, Field(ge=0)] = 3600.0
    """How long the series of a finished or silent run stay in /metrics."""
    metrics_max_runs: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Most runs with series in /metrics; those that reported last are kept."""

    replay_max_measurements: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    """Most measurements of a run that is replayed here; longer ones are answered 413."""

    @field_validator("token_hashes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            value = tuple(part.strip().lower() for part in value.split(",") if part.strip())
        if isinstance(value, tuple | list) and not all(_SHA256_HEX.fullmatch(str(part)) for part in value):
            raise ValueError("each token hash is 64 hex digits, as `gns-controller token create` prints them.")
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether this names only the machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
