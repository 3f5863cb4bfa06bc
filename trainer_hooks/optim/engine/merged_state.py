"""States of an inner and an outer optimizer, seen and written as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor


class Entries(dict[str, Any]):
    """Entries of one parameter. One that is written or deleted is so where it lives, too. A copy is a plain dict."""

    home: Callable[[str], dict[str, Any]] = staticmethod(lambda name: {})
    """Function that returns the state which holds an entry of this name."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.home(name)[name] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.home(name).pop(name, None)

    # dict's own would go past the two above.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def __ior__(self, other: Any) -> Entries:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class MergedStates(MutableMapping[Tensor, dict[str, Any]]):
    """States of the inner and the outer optimizer, merged when looked up. Without any: an empty dict, as torch's.

    Args:
        inner: the inner optimizer's.
        outer: the outer one's.
        buffers: names of the outer entries.
        counts: shown beside each outer state. They are the optimizer's own: what is written into them is dropped.
    """

    def __init__(
        self,
        inner: MutableMapping[Tensor, dict[str, Any]],
        outer: MutableMapping[Tensor, dict[str, Any]],
        *,
        buffers: tuple[str, ...],
        counts: Mapping[str, Tensor],
    ) -> None:
        self._inner, self._outer, self._buffers, self._counts = inner, outer, buffers, counts

    def __getitem__(self, parameter: Tensor) -> Entries:
        # A new dict with the entries of both, whose writes go where each of them lives.
        entries = Entries(self._inner.get(parameter, {}))
        if parameter in self._outer:
            dict.update(entries, {**self._outer[parameter], **self._counts})
        entries.home = partial(self._home, parameter)
        return entries

    def _home(self, parameter: Tensor, name: str) -> dict[str, Any]:
        """Return the state that an entry of this name belongs to; counts are dropped with the dict they go into."""
        if name in self._counts:
            return {}
        return (self._outer if name in self._buffers else self._inner).setdefault(parameter, {})

    def __setitem__(self, parameter: Tensor, entries: Mapping[str, Any]) -> None:
        # Entries of before go from both optimizers, so that none is left over.
        own = dict(entries)
        self._inner.pop(parameter, None)
        self._outer.pop(parameter, None)
        for name, value in own.items():
            self._home(parameter, name)[name] = value

    def __delitem__(self, parameter: Tensor) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self._inner.pop(parameter, None)
        self._outer.pop(parameter, None)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._inner or parameter in self._outer

    def __iter__(self) -> Iterator[Tensor]:
        return iter({**self._inner, **self._outer})

    def __len__(self) -> int:
        return len({**self._inner, **self._outer})
