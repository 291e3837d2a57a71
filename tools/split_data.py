"""Split a COCO file into several, deterministically: by image, with each class in its share everywhere.

    python -m tools.split_data instances.json --splits train=0.8 val=0.1 test=0.1 --group-by video_id --out data/split

This writes ``data/split/instances_train.json`` and so on, with all entries as they are. Images with the same value of
the field ``--group-by`` stay together; without the option each image is on its own. Groups with the rarest class are
dealt first, each to the split that lacks most of that class (after Sechidis et al. 2011, iterative stratification).
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole_files import replacing
from tools import console
from tools.convert_annotations import INFO


def deal(
    groups: Sequence[tuple[int, Mapping[Any, int]]], shares: Sequence[float], seed: int, stratify: bool = True
) -> list[int]:
    """The split of each group.

    Args:
        groups: (number of images, number of objects by class) of each.
        shares: of each split; they add up to 1.
        seed: of the order in which groups of equal claim are dealt.
        stratify: whether classes count, or images only.
    """
    images = None  # stands for the class that every image has
    contents: list[dict[Any, int]] = [{**(classes if stratify else {}), images: size} for size, classes in groups]
    holders: dict[Any, list[int]] = defaultdict(list)
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    for group in order:
        for name in contents[group]:
            holders[name].append(group)
    totals = Counter[Any]()
    for content in contents:
        totals.update(content)
    lacking = [{name: share * total for name, total in totals.items()} for share in shares]
    chosen = [-1] * len(groups)
    for name in sorted(holders, key=lambda name: (name is images, totals[name], str(name))):
        # The largest first: what is left to even things out are small ones.
        for group in sorted(holders[name], key=lambda group: -contents[group][name]):
            if chosen[group] < 0:
                split = max(range(len(shares)), key=lambda s: (lacking[s][name] / totals[name], lacking[s][images]))
                chosen[group] = split
                for entry, count in contents[group].items():
                    lacking[split][entry] -= count
    return chosen


def split(content: dict[str, Any], shares: dict[str, float], group_by: str | None, seed: int, stratify: bool) -> Any:
    """The content of each split by name.

    Raises:
        ValueError: an image has no such field.
    """
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content.get("annotations", []):
        of_image[annotation["image_id"]].append(annotation)
    members: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for image in content["images"]:
        if group_by is not None and group_by not in image:
            raise ValueError(f"image {image['id']} has no field {group_by!r}: --group-by must name one that all have")
        members[json.dumps(image[group_by], sort_keys=True) if group_by else image["id"]].append(image)
    counts = [
        (len(group), Counter(a["category_id"] for image in group for a in of_image[image["id"]]))
        for group in members.values()
    ]
    # Splits are not the converter's, which would replace its own.
    others = {key: value for key, value in content.items() if (key, value) != ("info", INFO)}
    result = {name: {**others, "images": [], "annotations": []} for name in shares}
    names = list(shares)
    for group, place in zip(members.values(), deal(counts, list(shares.values()), seed, stratify), strict=True):
        for image in group:
            result[names[place]]["images"].append(image)
            result[names[place]]["annotations"] += of_image[image["id"]]
    return result


def read_shares(texts: Sequence[str]) -> dict[str, float]:
    """Name and share of each split, as in "train=0.8"; ValueError where they are not that, or do not add up to 1."""
    pairs = [text.partition("=") for text in texts]
    try:
        shares = {name: float(value) for name, _, value in pairs}
    except ValueError:
        shares = {}
    good = all(name.isidentifier() and 0.0 < share < 1.0 for name, share in shares.items())
    if not good or len(shares) < len(pairs) or abs(sum(shares.values()) - 1.0) > 1e-6:
        raise ValueError(f"--splits {' '.join(texts)}: give each name once, as train=0.8, and shares that add up to 1")
    return shares


@console.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = console.parser("split_data", __doc__)
    parser.add_argument("annotations", type=Path, help="COCO file to split")
    parser.add_argument(
        "--splits", nargs="+", default=["train=0.8", "val=0.2"], metavar="NAME=SHARE", help="(train=0.8 val=0.2)"
    )
    parser.add_argument("--out", type=Path, default=Path("split"), help="folder to write to (%(default)s)")
    parser.add_argument("--group-by", metavar="FIELD", help="images with the same value of this field stay together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (%(default)s)")
    parser.add_argument("--no-stratify", action="store_true", help="share out the images only, not each class")
    options = parser.parse_args(arguments)
    shares = read_shares(options.splits)
    targets = {name: options.out / f"instances_{name}.json" for name in shares}
    for target in targets.values():
        if target.exists():
            raise ValueError(f"{target} is there already: remove it, or choose another --out")
    try:
        content = json.loads(options.annotations.read_text(encoding="utf-8-sig"))
        parts = split(content, shares, options.group_by, options.seed, not options.no_stratify)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{options.annotations}: not a COCO file ({type(error).__name__}: {error})") from error
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with replacing(targets[name]) as temporary:
            temporary.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
        print(f"{targets[name]}: {len(part['images'])} images, {len(part['annotations'])} boxes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
