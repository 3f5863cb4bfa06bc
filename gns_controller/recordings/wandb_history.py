"""Weights & Biases: the log that an offline run leaves behind, and the history of a run on a server.

A .wandb file is a LevelDB log: blocks of 32 KiB, each record cut into pieces that carry checksum, length and type.
Recent wandb packages have no reader for it in Python, so the framing is read here and the records by their protobuf.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gns_controller.core.errors import InvalidInputError, MissingDependencyError
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, names_shown, shown
from gns_controller.recordings.tables import Row, Table, table_recording

ONLINE_PREFIX = "wandb:"
BLOCK_BYTES = 32768
LARGEST_RECORD_BYTES = 64 * 2**20
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_PIECE_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_MISSING = "runs of Weights & Biases need wandb: pip install 'gns-controller[importers]'."


def offline_log(folder: Path) -> Path | None:
    """The log in the folder of an offline run, or of the only run below it; None where there is none.

    Raises:
        InvalidInputError: several runs.
    """
    found = sorted(folder.glob("*.wandb")) or sorted(
        path for path in folder.glob("*run-*/*.wandb") if not path.parent.is_symlink()
    )
    if len(found) > 1:
        raise InvalidInputError(
            f"{shown(folder.name)} holds several runs: name one of {names_shown([path.name for path in found])}."
        )
    return found[0] if found else None


def read_wandb_offline(
    path: Path, *, columns: Mapping[str, str] | None, defaults: ImportDefaults, limits: Limits
) -> Recording:
    """The folder or the .wandb file of an offline run as a recording.

    Raises:
        InvalidInputError: no such log, or it cannot be read.
        MissingDependencyError: wandb is not installed.
    """
    log = offline_log(path) if path.is_dir() else path
    if log is None:
        raise InvalidInputError(f"{shown(path.name)} holds no .wandb file: name the folder of one offline run.")
    source = shown(log.name)
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise MissingDependencyError(_MISSING) from None
    rows: list[Row] = []
    notes: list[str] = []
    for data in log_records(log, source=source, notes=notes):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(data)
        except DecodeError:
            raise InvalidInputError(f"{source}: a record is not one of wandb's; the file is damaged.") from None
        if record.WhichOneof("record_type") != "history":
            continue
        history = record.history
        cells: dict[str, object] = {"_step": history.step.num} if history.HasField("step") else {}
        for item in history.item:
            cells[item.key or ".".join(item.nested_key)] = _cell(item.value_json)
        rows.append(Row(len(rows) + 1, cells))
        limits.check_rows(len(rows), source=source)
    return _recording(
        rows,
        source=source,
        name=log.stem.removeprefix("run-"),
        columns=columns,
        defaults=defaults,
        limits=limits,
        notes=notes,
    )


def read_wandb_online(
    address: str,
    *,
    columns: Mapping[str, str] | None,
    defaults: ImportDefaults,
    limits: Limits,
    api: Any = None,
) -> Recording:
    """The history of ENTITY/PROJECT/RUN as a recording.

    Args:
        address: "wandb:ENTITY/PROJECT/RUN".
        columns: our names -> the history's.
        defaults: what the history does not say.
        limits: most rows and columns.
        api: instead of wandb.Api(), which finds server and key as wandb's own commands do.

    Raises:
        InvalidInputError: no such run, no key, or no answer.
        MissingDependencyError: wandb is not installed.
    """
    path = address.removeprefix(ONLINE_PREFIX)
    if len(path.split("/")) != 3 or not all(part.strip() for part in path.split("/")):
        raise InvalidInputError(f"{shown(address)} is not of the form wandb:ENTITY/PROJECT/RUN.")
    source = f"wandb run {shown(path)}"
    if api is None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError(_MISSING) from None
    rows: list[Row] = []
    try:
        api = wandb.Api() if api is None else api
        for cells in api.run(path).scan_history():
            rows.append(Row(len(rows) + 1, cells))
            limits.check_rows(len(rows), source=source)
    except InvalidInputError:
        raise
    except Exception as error:  # wandb raises its own, requests' and plain ValueErrors
        raise InvalidInputError(
            f"{source} could not be fetched: {type(error).__name__} {shown(error)}. Check its name and `wandb login`."
        ) from None
    return _recording(
        rows, source=source, name=path.split("/")[2], columns=columns, defaults=defaults, limits=limits, notes=[]
    )


def log_records(path: Path, *, source: str, notes: list[str]) -> Iterator[bytes]:
    """The records of a .wandb file. A torn end, which a killed run leaves, ends it with a note.

    Raises:
        InvalidInputError: not a .wandb file, or damaged before its end.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_FILE_HEADER)) != _FILE_HEADER:
                raise InvalidInputError(f"{source} does not begin like a .wandb file of a known version.")
            size = path.stat().st_size
            pieces: list[bytes] = []
            held = 0
            while (piece := _next_piece(file, size=size, source=source)) is not None:
                kind, data = piece
                if (kind in (_FULL, _FIRST)) != (not pieces):
                    raise InvalidInputError(f"{source} is damaged: a record begins inside another.")
                pieces.append(data)
                held += len(data)
                if held > LARGEST_RECORD_BYTES:
                    raise InvalidInputError(f"{source}: a record of more than {LARGEST_RECORD_BYTES} bytes.")
                if kind in (_FULL, _LAST):
                    yield b"".join(pieces)
                    pieces, held = [], 0
            if pieces or file.tell() < size:
                notes.append("the log ends inside a record: the run was killed, or is still writing.")
    except OSError as error:
        raise InvalidInputError(f"{source} cannot be read: {error.strerror or type(error).__name__}.") from None


def _next_piece(file: IO[bytes], *, size: int, source: str) -> tuple[int, bytes] | None:
    """Type and data of the next piece; None at the end, or where it is torn."""
    room = BLOCK_BYTES - file.tell() % BLOCK_BYTES
    if room < _PIECE_HEADER.size:
        file.read(room)  # padding
    start = file.tell()
    header = file.read(_PIECE_HEADER.size)
    if len(header) < _PIECE_HEADER.size:
        file.seek(start)
        return None
    checksum, length, kind = _PIECE_HEADER.unpack(header)
    data = file.read(length)
    if len(data) == length and kind in (_FULL, _FIRST, _MIDDLE, _LAST) and checksum == zlib.crc32(bytes([kind]) + data):
        return kind, data
    if start + _PIECE_HEADER.size + length < size:
        raise InvalidInputError(f"{source} is damaged at byte {start}: its checksum is wrong.")
    file.seek(start)
    return None


def _cell(value_json: str) -> object:
    """A logged value; text, lists and objects are no numbers, and None unless somebody maps them."""
    try:
        value = json.loads(value_json)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, int | float | str) else None


def _recording(
    rows: list[Row],
    *,
    source: str,
    name: str,
    columns: Mapping[str, str] | None,
    defaults: ImportDefaults,
    limits: Limits,
    notes: list[str],
) -> Recording:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(map(str, row.cells)))
    if not names:
        raise InvalidInputError(f"{source} holds no history: nothing was logged.")
    table = Table(rows, names=names, source=source, name=name, notes=notes)
    return table_recording(table, columns=columns, defaults=defaults, limits=limits)
