"""The tables: one row per run, and one log of everything that happened to all runs, in order.

Measurements, decisions, events and schedules are filtered reads of the log. Times are microseconds since 1970, UTC,
because every database keeps an integer exactly; documents are JSON text for the same reason.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, text

metadata = MetaData()

_BIG = BigInteger().with_variant(Integer, "sqlite")

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(128), primary_key=True),
    Column("registered_sequence", _BIG, nullable=False, unique=True),
    Column("registered_at", _BIG, nullable=False),
    Column("specification", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("policy_revision", _BIG, nullable=False),
    Column("attempt", _BIG, nullable=False),
    Column("attempt_at", _BIG, nullable=False),
    Column("attempt_step", _BIG, nullable=True),
    Column("state_sequence", _BIG, nullable=False),
    Column("measurement_sequence", _BIG, nullable=True),
    Column("num_measurements", _BIG, nullable=False),
    Column("last_report_at", _BIG, nullable=True),
    Column("usual_gap_seconds", Float, nullable=True),
    Column("override", Text, nullable=True),
    Column("controlled_at", _BIG, nullable=True),
)

log = Table(
    "log",
    metadata,
    Column("sequence", _BIG, primary_key=True, autoincrement=True),
    Column("run_id", String(128), nullable=False),
    Column("attempt", _BIG, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("optimizer_step", _BIG, nullable=True),
    Column("samples_seen", _BIG, nullable=True),
    Column("changes_plan", Boolean, nullable=False),
    Column("body", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("at", _BIG, nullable=False),
    Index("log_by_run", "run_id", "sequence"),
    Index("log_by_step", "run_id", "attempt", "optimizer_step", unique=True),
    Index("log_by_plan", "run_id", "changes_plan", "sequence"),
    sqlite_autoincrement=True,
)
"""One row per registration and per operator command (optimizer_step is NULL), and per measurement with its decision;
`state` is what the policy remembers after it."""
IS_NO_MEASUREMENT = log.c.kind != text("'measurement'")
Index("log_of_others", log.c.run_id, log.c.sequence, sqlite_where=IS_NO_MEASUREMENT, postgresql_where=IS_NO_MEASUREMENT)
"""Finds the few lines between measurements without reading those."""

probe = Table("probe", metadata, Column("number", Integer, primary_key=True), Column("filler", Text, nullable=False))
"""Empty but for the moment of a readiness check, which writes here."""
