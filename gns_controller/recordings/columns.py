"""Which column of somebody's table holds what: a map that was given, or a guess from common names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from gns_controller.core.errors import InvalidInputError
from gns_controller.recordings.recording import ImportDefaults, names_shown, shown

ALIASES: dict[str, tuple[str, ...]] = {
    "optimizer_step": ("optimizer_step", "global_step", "step", "iteration", "iter", "_step"),
    "attempt": ("attempt",),
    "samples_seen": (
        "samples_seen",
        "n_samples_seen",
        "num_samples_seen",
        "consumed_samples",
        "consumed_train_samples",
        "examples_seen",
        "samples",
    ),
    "tokens_seen": (
        "tokens_seen",
        "n_tokens_seen",
        "num_tokens_seen",
        "num_input_tokens_seen",
        "consumed_tokens",
        "total_tokens",
        "tokens",
    ),
    "global_batch_size": ("global_batch_size", "batch_size", "train_batch_size", "total_batch_size", "bsz"),
    "loss": ("loss", "train_loss", "training_loss", "global_avg_loss", "lm_loss"),
    "validation_loss": ("validation_loss", "val_loss", "valid_loss", "eval_loss"),
    "learning_rate": ("learning_rate", "lr"),
    "step_seconds": ("step_seconds", "seconds_per_step", "step_time_seconds", "step_time_s", "sec_per_step"),
    "samples_per_second": ("samples_per_second", "samples_per_sec", "examples_per_second", "train_samples_per_second"),
    "schedule_factor": ("schedule_factor",),
    "noise": ("noise",),
    "signal": ("signal",),
    "progress": ("progress",),
    "noise_sq": ("noise_sq", "noise_squared"),
    "signal_sq": ("signal_sq", "signal_squared"),
    "noise_scale": ("noise_scale", "gradient_noise_scale", "noise_scale_ema", "gns_ema", "gns"),
}
"""Our names, and names that others use for the same thing, most telling first."""

_PARTS_OF_A_READING = (("noise", "signal"), ("noise_sq", "signal_sq"))
_VALIDATION = re.compile(r"^(val|valid|validation|eval|test|dev)([^a-z]|$)")


def column_map(
    names: Collection[str], *, columns: Mapping[str, str] | None, defaults: ImportDefaults, source: str
) -> dict[str, str]:
    """Our names -> the file's.

    Args:
        names: the file's columns.
        columns: what the caller knows; the rest is guessed. "" says that the file has no such column.
        defaults: what need not be in a column.
        source: the file's name, for errors.

    Raises:
        InvalidInputError: a column is missing, or a map names one that does not exist.
    """
    given = dict(columns or {})
    unknown = [ours for ours in given if ours not in ALIASES]
    if unknown:
        raise InvalidInputError(f"no column is called {names_shown(unknown)} here: map {', '.join(ALIASES)}.")
    absent = [theirs for theirs in given.values() if theirs and theirs not in names]
    if absent:
        raise InvalidInputError(f"{source} has no column {names_shown(absent)}; it has {names_shown(list(names))}.")
    guesses = _guesses(names)
    found = {ours: given.get(ours, guesses.get(ours, "")) for ours in ALIASES}
    found = {ours: theirs for ours, theirs in found.items() if theirs}
    _settle_readings(found, given=given, defaults=defaults, source=source, names=names)
    if "samples_seen" in found and "tokens_seen" not in given:
        found.pop("tokens_seen", None)
    elif "tokens_seen" in given and "samples_seen" not in given:
        found.pop("samples_seen", None)
    missing = []
    if "optimizer_step" not in found:
        missing.append("optimizer_step")
    if not found.keys() & {"global_batch_size", "samples_seen", "tokens_seen"} and defaults.global_batch_size is None:
        missing.append("global_batch_size (or samples_seen, or tokens_seen)")
    if missing:
        raise InvalidInputError(
            f"{source} has no column that we take for {', nor for '.join(missing)}; it has {names_shown(list(names))}. "
            "Map our names to its columns."
        )
    if "tokens_seen" in found and defaults.tokens_per_sample is None:
        raise InvalidInputError(
            f"{source} counts tokens, in {shown(found['tokens_seen'])}: give tokens_per_sample as well "
            "(--tokens-per-sample)."
        )
    return found


def _guesses(names: Collection[str]) -> dict[str, str]:
    """For each of our names the first column that is called like it, with or without a prefix such as "train/"."""
    whole: dict[str, str] = {}
    last: dict[str, str] = {}
    for name in names:
        prefix, _, tail = name.lower().rpartition("/")
        whole.setdefault(_plain(name), name)
        if _VALIDATION.match(prefix):
            tail = f"validation_{tail}"
        last.setdefault(_plain(tail), name)
    found = {}
    for ours, aliases in ALIASES.items():
        for table in (whole, last):
            match = next((table[alias] for alias in aliases if alias in table), None)
            if match is not None and ours not in found:
                found[ours] = match
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).rstrip("_")


def _settle_readings(
    found: dict[str, str],
    *,
    given: Mapping[str, str],
    defaults: ImportDefaults,
    source: str,
    names: Collection[str],
) -> None:
    """Keep one way to make a reading: norms, else squared norms, else a noise scale. Whole, or not at all."""
    for pair in _PARTS_OF_A_READING:
        lone = [ours for ours in pair if ours in found]
        if len(lone) == 1:
            if given.get(lone[0]):
                other = pair[1 - pair.index(lone[0])]
                raise InvalidInputError(
                    f"{lone[0]} is mapped and {other} is not: a reading needs both. "
                    f"{source} has {names_shown(list(names))}."
                )
            del found[lone[0]]
    ways: tuple[tuple[str, ...], ...] = (*_PARTS_OF_A_READING, ("noise_scale",))
    chosen = next((way for way in ways if any(given.get(ours) for ours in way)), None)
    chosen = chosen or next((way for way in ways if all(ours in found for ours in way)), ())
    for way in ways:
        if way != chosen:
            for ours in way:
                found.pop(ours, None)
    if chosen != ("noise", "signal") or defaults.estimator == "rank_variance":
        if given.get("progress"):
            raise InvalidInputError("progress belongs to noise and signal of the split estimator: map these, too.")
        found.pop("progress", None)
    elif defaults.estimator == "split" and "progress" not in found:
        raise InvalidInputError(f"split readings need progress; {source} has {names_shown(list(names))}.")
