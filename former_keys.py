"""Keys of earlier versions and what they are called today, so that old files and checkpoints keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]

MOVED: dict[Path, Path] = {
    ("model", key): ("model", "published", key)
    for key in ("padded_query_positions", "suppress_invalid_proposals", "prediction_eps")
}
_MATCHER = ("criterion", "matcher")
_MODULATION = (*_MATCHER, "cost", "position_modulation")


def modernise(values: Mapping[str, Any], below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same configuration in today's keys; values that need no change, wrong ones included, stay as they are.

    Args:
        values: a file, an override or what a checkpoint holds.
        below: in today's keys, what the values are laid over; None for nothing.
    """
    result = _copy(values)
    for old, new in MOVED.items():
        if _holds(result, old):
            _put(result, new, _take(result, old))
    if _holds(result, _MODULATION):
        _pick_cost(result["criterion"]["matcher"], _take(result, _MODULATION), _at(below, _MATCHER))
    return result


def _pick_cost(matcher: dict[str, Any], modulation: Any, below: Any) -> None:
    """Name the cost that the number picked formerly; a name resets its siblings, which the number did not."""
    before = _at(below, ("cost",))
    same = matcher.get("name", _name(below)) == _name(below)
    kept = dict(before) if same and isinstance(before, Mapping) else {}
    name, _ = kept.pop("name", None), kept.pop("beta", None)
    if modulation != 0:
        matcher["cost"] = {**kept, **matcher["cost"], "name": "position_modulated", "beta": modulation}
    elif name == "position_modulated":  # 0 switched it off
        matcher["cost"] = {**kept, **matcher["cost"], "name": "focal"}


def _name(matcher: Any) -> Any:
    return matcher if isinstance(matcher, str) else (_at(matcher, ("name",)) or "hungarian")


def _at(values: Any, path: Path) -> Any:
    """What stands there; None for nothing."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _holds(values: Any, path: Path) -> bool:
    parent = _at(values, path[:-1])
    return isinstance(parent, dict) and path[-1] in parent


def _take(values: dict[str, Any], path: Path) -> Any:
    return _at(values, path[:-1]).pop(path[-1])


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = value
