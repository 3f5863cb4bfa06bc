from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from gns_controller.core.errors import StoreBusyError, StoreUnavailableError
from gns_controller.store import SqlStore, Transaction
from gns_controller.store.tables import probe
from tests.gns_controller.running_service import Service, report


def connection_of(transaction: Transaction) -> Any:
    return transaction.connection  # type: ignore[attr-defined]


def put_probe(number: int) -> Any:
    return lambda transaction: connection_of(transaction).execute(insert(probe), {"number": number, "filler": ""})


def stored(store: SqlStore) -> list[int]:
    query = select(probe.c.number).order_by(probe.c.number)
    return store.submit(lambda t: list(connection_of(t).execute(query).scalars())).result()


class Held:
    """Holds the writer inside a job, so that those after it wait together."""

    def __init__(self, store: SqlStore) -> None:
        self.release = threading.Event()
        started = threading.Event()
        self.future: Future[object] = store.submit(lambda _: (started.set(), self.release.wait(10)))
        assert started.wait(10)


def test_jobs_that_wait_together_share_one_commit(service: Service) -> None:
    held = Held(service.store)
    futures = [service.store.submit(put_probe(number)) for number in range(20)]
    held.release.set()
    for future in futures:
        future.result(10)
    assert service.sample("gns_store_batch_size_jobs_count") == 2
    assert service.sample("gns_store_batch_size_jobs_sum") == 21


def test_a_job_that_raises_leaves_nothing_and_spares_its_neighbours(service: Service) -> None:
    def fail_after_writing(transaction: Transaction) -> None:
        put_probe(2)(transaction)
        raise RuntimeError("mine alone")

    held = Held(service.store)
    first, bad, last = (service.store.submit(job) for job in (put_probe(1), fail_after_writing, put_probe(3)))
    held.release.set()
    first.result(10)
    last.result(10)
    with pytest.raises(RuntimeError, match="mine alone"):
        bad.result(10)
    assert stored(service.store) == [1, 3]


def test_a_database_failure_fails_every_job_of_the_commit_and_records_none(service: Service) -> None:
    def break_the_database(transaction: Transaction) -> None:
        connection_of(transaction).execute(text("SELECT * FROM no_such_table"))

    held = Held(service.store)
    jobs = (put_probe(1), break_the_database, put_probe(3))
    futures = [service.store.submit(job) for job in jobs]
    held.release.set()
    for future in futures:
        with pytest.raises(StoreUnavailableError, match="nothing of this request was recorded"):
            future.result(10)
    assert stored(service.store) == []


def test_a_failed_commit_is_not_remembered(service: Service) -> None:
    """The run's state goes on from what is on disk, not from what the failed transaction had computed."""
    service.register()
    before = service.client.get("/api/v1/runs/run").json()
    held = Held(service.store)
    responses: list[int] = []
    poster = threading.Thread(target=lambda: responses.append(service.report(report(1)).status_code))
    poster.start()
    while service.store.num_queued() < 1:
        pass
    spoiler = service.store.submit(lambda t: connection_of(t).execute(text("SELECT * FROM no_such_table")))
    held.release.set()
    poster.join(10)
    assert spoiler.exception(10) is not None
    assert responses == [503]
    assert service.client.get("/api/v1/runs/run").json() == before
    assert service.report(report(1)).json()["accepted"] == 1


def test_a_full_queue_refuses_instead_of_growing(make_service: Any) -> None:
    service = make_service(write_queue_size=2)
    held = Held(service.store)
    waiting = [service.store.submit(put_probe(number)) for number in range(2)]
    with pytest.raises(StoreBusyError):
        service.store.submit(put_probe(3))
    response = service.register()
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "2"
    assert response.json()["type"] == "urn:gns-controller:problem:store-busy"
    held.release.set()
    for future in waiting:
        future.result(10)


def test_closing_finishes_what_is_queued_and_refuses_the_rest(service: Service) -> None:
    held = Held(service.store)
    future = service.store.submit(put_probe(1))
    threading.Timer(0.1, held.release.set).start()
    service.store.close()
    assert future.done()
    with pytest.raises(StoreUnavailableError):
        service.store.submit(put_probe(2))
    assert service.client.get("/readyz").status_code == 503
