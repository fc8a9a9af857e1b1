"""Folders of images, decoded once into a memory-mapped file that later runs read again."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from rnode.data.cache import cached
from rnode.data.context import label_contexts
from rnode.data.decoding import Format, decode
from rnode.data.splits import Splits, count_of, hold_out_indices
from rnode.errors import InputError, require

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PARTS = ("train", "val", "test")
CELEBA = dict(enumerate(PARTS))  # numbers in list_eval_partition.txt
CHUNK = 1000  # images decoded, or rows copied, at a time


def image_folder(
    root: str,
    channels: int = 3,
    size: int | Sequence[int] = 64,
    crop: int | None = None,
    bits: int = 8,
    pad: int | None = None,
    context: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    on_error: str = "stop",
    cache: str = "~/.cache/rnode",
) -> Splits:
    """Return the images below a folder, uint8 (N, channels, height, width).

    The folders train, val and test of `root` are the splits if there is a train. What they lack is
    cut off by a permutation that never changes: `test` of all images, `validation` of the rest,
    each a share below 1 or a number. Of files with equal bytes one is kept, so that no image is in
    two splits.

    Args:
        root: the folder; sub-folders are searched too.
        channels: 1 for grey images, 3 for RGB. Transparent pixels lie on black.
        size: the side of the images, or [height, width]: the shorter side is scaled, and the centre
            cropped.
        crop: side of a square in the centre that is cut out before.
        bits: the first so many bits of each pixel are kept.
        pad: the side to which zeros are added all around.
        context: `label` conditions on the name of an image's first folder.
        validation: the validation split.
        test: the test split.
        on_error: `stop` at a broken file, or `skip` it.
        cache: folder of the decoded images.
    """
    folder = Path(root).expanduser()
    files = find_images(folder)
    divided = (folder / "train").is_dir()
    parts = [FOLDERS.get(Path(file).parts[0]) if divided else None for file in files]
    files = [file for file, part in zip(files, parts, strict=True) if part or not divided]
    labels = [Path(file).parts[divided:-1][:1] for file in files]
    loose = next((f for f, label in zip(files, labels, strict=True) if not label), None)
    if context == "label":
        require(loose is None, f"context=label: {folder / str(loose)} lies in no folder of a class")
    form = Format(channels, size, crop, bits, pad).check()
    return decoded(
        folder,
        files,
        list(filter(None, parts)),
        form,
        validation,
        test,
        on_error,
        cache,
        [label[0] for label in labels] if context == "label" else None,
    )


def celeba(root: str, validation: float = 0.1, test: float = 0.1, **options: object) -> Splits:
    """Return the aligned images of CelebA in root/img_align_celeba; options as of `image_folder`.

    root/list_eval_partition.txt says which split an image is in.
    """
    folder, listed = (
        Path(root).expanduser() / name for name in ("img_align_celeba", "list_eval_partition.txt")
    )
    files = find_images(folder)
    parts = []
    if listed.is_file():
        lines = (line.split() for line in listed.read_text(encoding="utf-8").splitlines())
        chosen = {line[0]: CELEBA[int(line[1])] for line in lines if len(line) == 2}
        missing = next((file for file in files if file not in chosen), None)
        require(missing is None, f"{listed}: does not name {missing}")
        parts = [chosen[file] for file in files]
    options = {"on_error": "stop", "cache": "~/.cache/rnode"} | options
    error, cache = options.pop("on_error"), options.pop("cache")
    form = Format(3, **options).check()
    return decoded(folder, files, parts, form, validation, test, error, cache)


def find_images(folder: Path) -> list[str]:
    """Return the image files below a folder, relative to it, in order."""
    require(folder.is_dir(), f"root={folder}: there is no such folder")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    files = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    require(bool(files), f"root={folder}: holds no image ({', '.join(ENDINGS)})")
    return files


def decoded(
    folder: Path,
    files: list[str],
    parts: list[str],
    form: Format,
    validation: float,
    test: float,
    on_error: str,
    cache: str,
    labels: list[str] | None = None,
) -> Splits:
    """Return the images `files` of a folder; `parts` names the split of each, if that is known.

    Raises:
        InputError: for a broken file, unless `on_error` is `skip`, or too few images for a split.
    """
    stats = ((file, os.stat(folder / file)) for file in files)
    made_from = [str(folder.resolve()), [(f, s.st_size, s.st_mtime_ns) for f, s in stats]]
    made_from += [parts, form, validation, test, on_error]

    def write(path: Path) -> dict:
        """Decode all images, then write those that are kept in the order of their splits."""
        unsorted = path.with_suffix(".unsorted")
        try:
            rows = np.lib.format.open_memmap(unsorted, "w+", np.uint8, (len(files), *form.shape))
            digests: list[str | None] = []
            for i, result in enumerate(decode_all(folder, files, form)):
                if isinstance(result, InputError):
                    require(on_error == "skip", f"{result}; on_error=skip leaves such files out")
                    digests.append(None)
                else:
                    rows[i], digest = result
                    digests.append(digest)
            splits, lines = choose(folder, files, parts, digests, validation, test)
            order = list(itertools.chain(*splits))
            final = np.lib.format.open_memmap(path, "w+", np.uint8, (len(order), *form.shape))
            for start in range(0, len(order), CHUNK):
                final[start : start + CHUNK] = rows[order[start : start + CHUNK]]
            final.flush()
        finally:
            unsorted.unlink(missing_ok=True)
        kept = {"files": [files[i] for i in order], "counts": list(map(len, splits))}
        return kept | {"lines": lines}

    rows, notes = cached(cache, folder.resolve().name, made_from, write)
    if form.bits < 8:
        levels = f"{2**form.bits} grey levels"
        notes["lines"].append(f"{folder}: {levels}; bits/dim are of images of {form.bits} bits")
    print(*notes["lines"], sep="\n", end="\n" * bool(notes["lines"]))
    splits = Splits(*rows.split(notes["counts"]))
    if labels is None:
        return splits
    label_of = dict(zip(files, labels, strict=True))
    names = np.array([label_of[file] for file in notes["files"]])
    return label_contexts(splits, np.split(names, np.cumsum(notes["counts"])[:-1]))


def choose(
    folder: Path,
    files: list[str],
    parts: list[str],
    digests: list[str | None],
    validation: float,
    test: float,
) -> tuple[list[list[int]], list[str]]:
    """Return the indices of the images of each split, and what the user should know.

    Of equal files the one in the test split is kept, else the one in the validation split.
    """
    first: dict[str, int] = {}
    rank = {"test": 0, "val": 1, "train": 2}
    for i in sorted(range(len(files)), key=lambda i: (rank[parts[i]] if parts else 0, i)):
        if digests[i] is not None:
            first.setdefault(digests[i], i)
    broken = [i for i, digest in enumerate(digests) if digest is None]
    kept = [i for i, digest in enumerate(digests) if digest is not None and first[digest] == i]
    copies = sorted(set(range(len(files))) - set(kept) - set(broken))
    lines = []
    if broken:
        lines.append(f"{folder}: broken files left out: {len(broken)}, such as {files[broken[0]]}")
    if copies:
        same = files[first[digests[copies[0]]]]
        example = f"{files[copies[0]]}, equal to {same}"
        lines.append(f"{folder}: copies of other files left out: {len(copies)}, such as {example}")
    found = {name: [i for i in kept if (parts[i] if parts else "train") == name] for name in PARTS}
    for name, share in (("test", test), ("val", validation)):
        if not found[name]:
            train = found["train"]
            count = count_of(share, len(train))
            rest, held = hold_out_indices(len(train), count, {"val": "validation"}.get(name, name))
            found["train"], found[name] = ([train[i] for i in part] for part in (rest, held))
    return [found[name] for name in PARTS], lines


def decode_all(
    folder: Path, files: Sequence[str], form: Format
) -> Iterator[tuple[np.ndarray, str] | InputError]:
    """Decode files in threads, in their order, with a progress bar."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for start in track(range(0, len(files), CHUNK), f"decoding {len(files)} images"):
            paths = (folder / file for file in files[start : start + CHUNK])
            yield from pool.map(partial(decode, form=form), paths)
