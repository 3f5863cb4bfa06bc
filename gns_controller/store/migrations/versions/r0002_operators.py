"""Operators: the override in force, and when somebody last spoke. Their words are lines of the log as it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Two columns that are NULL for every run so far, and a short way to the lines between measurements."""
    op.add_column("runs", sa.Column("override", sa.Text, nullable=True))
    op.add_column("runs", sa.Column("controlled_at", _BIG, nullable=True))
    others = sa.text("kind != 'measurement'")
    op.create_index("log_of_others", "log", ["run_id", "sequence"], sqlite_where=others, postgresql_where=others)


def downgrade() -> None:
    """Forget them."""
    op.drop_index("log_of_others", "log")
    op.drop_column("runs", "controlled_at")
    op.drop_column("runs", "override")
