"""Open a recording, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings.csv_table import read_csv
from gns_controller.recordings.json_lines import read_json_lines
from gns_controller.recordings.recording import ImportDefaults, Limits, Recording, shown
from gns_controller.recordings.tensorboard_events import event_folder, read_tensorboard
from gns_controller.recordings.wandb_history import ONLINE_PREFIX, offline_log, read_wandb_offline, read_wandb_online

Format = Literal["json_lines", "csv", "tensorboard", "wandb"]

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".json": "json_lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".wandb": "wandb",
}
_READERS = {
    "json_lines": read_json_lines,
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb_offline,
}


def read_recording(
    path: str | Path,
    *,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    defaults: ImportDefaults | None = None,
    limits: Limits | None = None,
) -> Recording:
    """One run's recording.

    Args:
        path: a file, the folder of a TensorBoard or an offline Weights & Biases run, or "wandb:ENTITY/PROJECT/RUN".
        format: what it is; None: told by its name and its first bytes.
        columns: our names -> the file's columns or tags, where the guess would be wrong; "" for "not in this file".
        defaults: what such files do not say.
        limits: largest file.

    Raises:
        InvalidInputError: it cannot be read; the message says where, and what to do.
        MissingDependencyError: the format needs a package that is not installed.
    """
    defaults, limits = defaults or ImportDefaults(), limits or Limits()
    if format is not None and format not in _READERS:
        raise InvalidInputError(
            f"{shown(format)} is no format of recordings: use one of {', '.join(get_args(Format))}."
        )
    if isinstance(path, str) and path.startswith(ONLINE_PREFIX) and format in (None, "wandb"):
        return read_wandb_online(path, columns=columns, defaults=defaults, limits=limits)
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:  # longer than a file's name can be, or in a folder that is closed to us
        raise InvalidInputError(f"{shown(path)} cannot be read: {error.strerror}.") from None
    if not exists:
        raise InvalidInputError(f"{shown(path)} does not exist: name a file, a folder, or wandb:ENTITY/PROJECT/RUN.")
    if not path.is_dir() and not path.is_file():
        raise InvalidInputError(f"{shown(path)} is neither a file nor a folder.")
    chosen = format or recognised_format(path)
    if path.is_dir() and chosen in ("json_lines", "csv"):
        raise InvalidInputError(f"{shown(path)} is a folder: name the file in it.")
    return _READERS[chosen](path, columns=columns, defaults=defaults, limits=limits)


def recognised_format(path: Path) -> Format:
    """What a file or folder is, from its name, else from its first bytes.

    Raises:
        InvalidInputError: neither tells.
    """
    if path.is_dir():
        if offline_log(path) is not None:
            return "wandb"
        if event_folder(path) is not None:
            return "tensorboard"
        raise InvalidInputError(f"{shown(path)} holds neither a .wandb file nor TensorBoard's event files.")
    if "tfevents" in path.name:
        return "tensorboard"
    if path.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[path.suffix.lower()]
    try:
        with path.open("rb") as file:
            beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InvalidInputError(f"{shown(path)} cannot be read: {error.strerror or type(error).__name__}.") from None
    if beginning.startswith(b":W&B"):
        return "wandb"
    if beginning.lstrip().startswith(b"{"):
        return "json_lines"
    if b"\0" not in beginning and any(mark in beginning.split(b"\n")[0] for mark in (b",", b";", b"\t")):
        return "csv"
    raise InvalidInputError(
        f"{shown(path)} is in no format that we recognise: say which of {', '.join(get_args(Format))}."
    )
