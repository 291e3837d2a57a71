"""Names of classes, in the order of their index, from the files that labelling tools and YOLO write."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from ops.errors import describe_error
from tools.label_formats.labels import read_text


class ClassNames(NamedTuple):
    """What a file says about the classes."""

    names: list[str]
    """By index."""
    keypoints: tuple[int, int] | None
    """``kpt_shape`` of a YOLO pose data set: points of an object, numbers of a point (2 or 3)."""


def read_class_names(path: Path) -> ClassNames:
    """``names`` of a YAML file (list or mapping), word by word as they are written, or the lines of a text file.

    YAML would turn ``yes``, ``007`` or ``12:30`` into something else; a name is a name.

    Raises:
        ValueError: the file does not hold names, or one is empty or given twice.
    """
    text = read_text(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        found = ClassNames([line.strip() for line in text.rstrip().splitlines()], None)
    else:
        found = _from_yaml(path, text)
    first: dict[str, int] = {}
    for index, name in enumerate(found.names):
        if not name:
            raise ValueError(f"{path}: class {index} has an empty name")
        if name in first:
            raise ValueError(f"{path}: classes {first[name]} and {index} are both named {name!r}; rename one of them")
        first[name] = index
    if not found.names:
        raise ValueError(f"{path}: has no names")
    return found


def _from_yaml(path: Path, text: str) -> ClassNames:
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # values such as dates can be wrong in other ways
        raise ValueError(f"{path}: not valid YAML ({describe_error(error):.100})") from error
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    values = {key.value: value for key, value in entries if isinstance(key, yaml.ScalarNode)}
    names, shape = values.get("names"), values.get("kpt_shape")
    if isinstance(names, yaml.MappingNode):
        numbered = {key.value: value for key, value in names.value if isinstance(key, yaml.ScalarNode)}
        complete = len(numbered) == len(names.value) and set(numbered) == {str(i) for i in range(len(numbered))}
        words = [numbered[str(index)] for index in range(len(numbered))] if complete else []
    else:
        words = names.value if isinstance(names, yaml.SequenceNode) else []
    if not words or not all(isinstance(word, yaml.ScalarNode) for word in words):
        raise ValueError(f"{path}: has no 'names', a list or a mapping from 0, 1, 2, … each once")
    keypoints = None
    if shape is not None:
        numbers = [str(n.value) for n in shape.value] if isinstance(shape, yaml.SequenceNode) else []
        if len(numbers) != 2 or not numbers[0].isdecimal() or numbers[1] not in ("2", "3"):
            raise ValueError(f"{path}: kpt_shape must be [number of points, 2 or 3]")
        keypoints = int(numbers[0]), int(numbers[1])
    return ClassNames([word.value.strip() for word in words], keypoints)
