"""First tables: runs, log, probe.

Written out instead of taken from tables.py: a migration describes the past and must not follow later edits.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(128), primary_key=True),
        sa.Column("registered_sequence", _BIG, nullable=False, unique=True),
        sa.Column("registered_at", _BIG, nullable=False),
        sa.Column("specification", sa.Text, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("policy_revision", _BIG, nullable=False),
        sa.Column("attempt", _BIG, nullable=False),
        sa.Column("attempt_at", _BIG, nullable=False),
        sa.Column("attempt_step", _BIG, nullable=True),
        sa.Column("state_sequence", _BIG, nullable=False),
        sa.Column("measurement_sequence", _BIG, nullable=True),
        sa.Column("num_measurements", _BIG, nullable=False),
        sa.Column("last_report_at", _BIG, nullable=True),
        sa.Column("usual_gap_seconds", sa.Float, nullable=True),
    )
    op.create_table(
        "log",
        sa.Column("sequence", _BIG, primary_key=True, autoincrement=True),
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("attempt", _BIG, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("optimizer_step", _BIG, nullable=True),
        sa.Column("samples_seen", _BIG, nullable=True),
        sa.Column("changes_plan", sa.Boolean, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("at", _BIG, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("log_by_run", "log", ["run_id", "sequence"])
    op.create_index("log_by_step", "log", ["run_id", "attempt", "optimizer_step"], unique=True)
    op.create_index("log_by_plan", "log", ["run_id", "changes_plan", "sequence"])
    op.create_table(
        "probe",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("filler", sa.Text, nullable=False),
    )


def downgrade() -> None:
    """Drop everything."""
    for table in ("probe", "log", "runs"):
        op.drop_table(table)
