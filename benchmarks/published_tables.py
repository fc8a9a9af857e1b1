"""The tables POWER, HEPMASS, MINIBOONE and BSDS300 of Papamakarios et al. (2017), as Parquet files.

python benchmarks/published_tables.py

It reads the folders of https://zenodo.org/record/1161203 in the current folder, and writes a file
for each table beside them, with a column `part` of train, val and test. BSDS300 needs h5py.
"""

import h5py
import numpy as np
import polars as pl


def write(name, **splits):
    frames = (
        pl.DataFrame(np.asarray(rows, dtype=float)).with_columns(part=pl.lit(part))
        for part, rows in splits.items()
    )
    pl.concat(frames).write_parquet(f"{name}.parquet")


def last_tenths(rows):
    rest, test = np.split(rows, [len(rows) - len(rows) // 10])
    train, val = np.split(rest, [len(rest) - len(rest) // 10])
    return {"train": train, "val": val, "test": test}


write("miniboone", **last_tenths(np.load("miniboone/data.npy")))

rng = np.random.RandomState(42)
rows = np.load("power/data.npy")
rng.shuffle(rows)
rows = np.delete(rows, [1, 3], axis=1)
rows += np.array([0.001, 0.01, 1, 1, 1, 0]) * rng.rand(*rows.shape)
write("power", **last_tenths(rows))

train, test = (pl.read_csv(f"hepmass/1000_{part}.csv") for part in ("train", "test"))
label = train.columns[0]
train, test = (part.filter(pl.col(label) == 1).drop(label) for part in (train, test))
kept = [c for c in train.columns if train[c].value_counts()["count"].max() <= 5]
train, test = (part.select(kept).to_numpy() for part in (train, test))
train, val = np.split(train, [len(train) - len(train) // 10])
write("hepmass", train=train, val=val, test=test)

with h5py.File("bsds300/BSDS300.hdf5") as file:
    write("bsds300", train=file["train"], val=file["validation"], test=file["test"])
