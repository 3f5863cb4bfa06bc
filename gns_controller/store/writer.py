"""The one thread that writes: jobs that wait together share one transaction and one fsync.

Each job runs in its own savepoint, so that a bad one fails alone. A future resolves after COMMIT returned; if it did
not, every job of the batch failed and nothing was recorded or remembered.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gns_controller.core.errors import StoreBusyError, StoreUnavailableError
from gns_controller.store.engine import running_error
from gns_controller.store.protocol import RunHead, Transaction
from gns_controller.store.transaction import SqlTransaction

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Job = Callable[[Transaction], Any]
CommitObserver = Callable[[float, int], None]
"""Told after each commit how many seconds it took and how many jobs it carried."""

_MAX_CACHED_HEADS = 2000


class Writer:
    """Runs jobs in order of submission.

    Args:
        engine: whose transactions begin by locking.
        queue_size: jobs that may wait; more are refused.
        max_batch: most jobs in one transaction.
        observe_commit: called in the writer thread.
    """

    def __init__(
        self, engine: Engine, *, queue_size: int, max_batch: int = 256, observe_commit: CommitObserver | None = None
    ) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._observe_commit = observe_commit
        self._queue: queue.Queue[tuple[Job, Future[Any]] | None] = queue.Queue(queue_size)
        self._committed: OrderedDict[str, RunHead] = OrderedDict()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gns-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[Transaction], Result]) -> Future[Result]:
        """Queue a job; see `Store.submit`."""
        if self._closing or not self._thread.is_alive():
            raise StoreUnavailableError("the store is closed; nothing of this request was recorded.")
        future: Future[Result] = Future()
        try:
            self._queue.put_nowait((job, future))
        except queue.Full:
            raise StoreBusyError("too many writes are waiting; nothing of this request was recorded.") from None
        return future

    @property
    def num_queued(self) -> int:
        """Jobs that wait."""
        return self._queue.qsize()

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
        self._closing = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while True:
            batch, last = self._next_batch()
            if batch:
                try:
                    self._commit(batch)
                except Exception as error:  # a bug of ours must not end the thread that everybody waits for
                    logger.exception("writer failed: jobs=%d", len(batch))
                    _fail(batch, error)
            if last:
                return

    def _next_batch(self) -> tuple[list[tuple[Job, Future[Any]]], bool]:
        """Everything that waits, and whether the writer shall end after it."""
        batch = []
        item = self._queue.get()
        while item is not None:
            if item[1].set_running_or_notify_cancel():
                batch.append(item)
            if len(batch) == self._max_batch:
                return batch, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit(self, batch: list[tuple[Job, Future[Any]]]) -> None:
        pending: dict[str, RunHead] = {}
        outcomes: list[tuple[Future[Any], Any, Exception | None]] = []
        began = time.perf_counter()
        try:
            with self._engine.begin() as connection:
                for job, future in batch:
                    transaction = SqlTransaction(connection, self._committed, pending)
                    savepoint = connection.begin_nested()
                    try:
                        result = job(cast(Transaction, transaction))
                    except Exception as error:
                        if isinstance(error, SQLAlchemyError) and not isinstance(error, IntegrityError):
                            raise
                        savepoint.rollback()
                        outcomes.append((future, None, error))
                    else:
                        savepoint.commit()
                        pending.update(transaction.changed)
                        outcomes.append((future, result, None))
        except SQLAlchemyError as error:
            self._committed.clear()
            _fail(batch, running_error(error, doing="write"))
            return
        self._remember(pending)
        if self._observe_commit is not None:
            self._observe_commit(time.perf_counter() - began, len(batch))
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _remember(self, heads: dict[str, RunHead]) -> None:
        for run_id, head in heads.items():
            self._committed[run_id] = head
            self._committed.move_to_end(run_id)
        while len(self._committed) > _MAX_CACHED_HEADS:
            self._committed.popitem(last=False)


def _fail(batch: list[tuple[Job, Future[Any]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
