"""Keys of earlier versions and what they are called today, so that old files and checkpoints keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]

MOVED: dict[Path, Path] = {
    ("model", key): ("model", "published", key)
    for key in ("padded_query_positions", "suppress_invalid_proposals", "prediction_eps")
}
_COST = ("criterion", "matcher", "cost")
_MODULATION = (*_COST, "position_modulation")


def modernise(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in today's keys; values that need no change, wrong ones included, stay as they are."""
    result = _copy(values)
    for old, new in MOVED.items():
        if _holds(result, old):
            _put(result, new, _take(result, old))
    if _holds(result, _MODULATION):
        beta = _take(result, _MODULATION)
        if beta != 0:  # 0 switched it off
            _put(result, (*_COST, "name"), "position_modulated")
            _put(result, (*_COST, "beta"), beta)
    return result


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _holds(values: Any, path: Path) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _take(values: dict[str, Any], path: Path) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values.pop(path[-1])


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = value
