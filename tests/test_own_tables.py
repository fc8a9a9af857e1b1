"""Tables of users: every name of a column, every kind of file, and files that change."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import rnode
from helpers import SHORT, call, refused
from rnode import InputError
from rnode.data.tables import read_table, table

pytestmark = pytest.mark.usefixtures("blank_figures")
N = 60


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def train(path, folder, *options):
    data = ["dataset=table", f"dataset.path={path}", f"hydra.run.dir={folder}"]
    call("train", *data, *SHORT, *options)


@pytest.fixture(scope="module")
def names():
    """A hundred names of columns."""
    rng = random.Random(0)
    letters = "abcXYZ012 _-.,;:'\"`´!?#%&/()[]{}<>|@*+=~^°äßλ中🙂\\$\t"
    names = {"".join(rng.choices(letters, k=rng.randint(1, 12))).strip(" \t#") for _ in range(90)}
    names |= {"2019", "null", "true", "n", "count", "row", "rank", "index", "y", "x$y$", "a, b"}
    return sorted(names - {""})[:100]


@pytest.mark.slow(reason="a flow of 99 columns")
def test_a_hundred_names_of_columns_pass_through_every_command(names):
    frame = pl.DataFrame(dict(zip(names, normal(len(names), N), strict=True)))
    frame.write_csv("rows.csv")
    train("rows.csv", "run")
    train("rows.csv", "run", "ckpt_path=auto", "trainer.max_epochs=2")
    call("evaluate", "run", "hydra.run.dir=evaluation")
    call("sample", "run", "n=3", "hydra.run.dir=samples")
    call("score", "run", "path=rows.csv", "hydra.run.dir=scores")
    density = rnode.load("run")
    assert density.columns_ == names
    assert read_table(Path("samples/samples.csv")).columns == names
    scores = pl.read_csv("scores/scores.csv")["log_prob"]
    np.testing.assert_allclose(scores, density.log_prob(frame.select(reversed(names))), rtol=1e-5)


def test_options_take_names_of_every_kind(names):
    names = [name for name in names if "${" not in name]
    frame = pl.DataFrame(dict(zip(names, normal(len(names), N), strict=True)))
    frame.write_csv("rows.csv")
    fitted = rnode.fit(frame, columns=names[::9], context=names[1::50], overrides=SHORT)
    assert fitted.columns_ == names[::9]
    context = dict.fromkeys(["a, b", "x$y$", *names[::30]], 0.5)
    words = ",".join(json.dumps(name, ensure_ascii=False) for name in context)
    train("rows.csv", "run", "dataset.columns=[2019,null,true]", f"dataset.context=[{words}]")
    call("score", "run", "path=rows.csv", "id=[2019,n]")
    call("sample", "run", f"context={json.dumps(context)}", "hydra.run.dir=samples")
    assert rnode.load("run").columns_ == ["2019", "null", "true"]
    assert read_table(Path("samples/samples.csv")).columns[3:] == list(context)


def csv(columns, header="a,b", separator=","):
    lines = [separator.join(map(str, row)) for row in zip(*columns, strict=True)]
    return "\n".join([*filter(None, [header]), *lines, ""])


A, B = (column.round(3).tolist() for column in 1000 * normal(2, N))
FRAME = pl.DataFrame({"a": A, "b": B})
FILES = {  # what a file holds → the values of its columns a and b, or of two without names
    "plain.csv": csv([A, B]),
    "spaces.csv": csv([A, B], " a , b ", " , "),
    "tabs.tsv": csv([A, B], "a\tb", "\t"),
    "tabs.csv": csv([A, B], "a\tb", "\t"),
    "semicolons.csv": csv([A, B], "a;b", ";"),
    "decimal_commas.csv": csv([A, B], "a;b", ";").replace(".", ","),
    "pipes.csv": csv([A, B], "a|b", "|"),
    "no_header.csv": csv([A, B], ""),
    "text_but_no_header.csv": csv([A, B, ["u", "v"] * 30], ""),
    "bom.csv": "\ufeff" + csv([A, B]),
    "utf_16.csv": csv([A, B]).encode("utf-16"),
    "cp1252.csv": csv([A, B, ["Zoë"] * N], "a,b,name").encode("cp1252"),
    "windows.csv": csv([A, B]).replace("\n", "\r\n"),
    "carriage_returns.csv": csv([A, B]).replace("\n", "\r"),
    "empty_lines.csv": csv([A, B]).replace("\n", "\n\n"),
    "quoted.csv": csv([[f'"{v}"' for v in A], B], '"a","b"'),
    "dollars.csv": csv([[f'"${v:,.3f}"' for v in A], B]).replace("$-", "-$"),
    "thousands.csv": csv([[f'"{v:,}"' for v in A], B]),
    "apostrophes.csv": csv([[f"{v:,}".replace(",", "'") for v in A], B]),
    "german.csv": csv([[f"{v:,}" for v in A], B], "a;b", ";").translate(str.maketrans(",.", ".,")),
    "minus.csv": csv([A, B]).replace("-", "−"),
    "per_cent.csv": csv([[f"{v} %" for v in A], B]),
    "index.csv": csv([range(N), A, B], ",a,b"),
    "unnamed.csv": csv([range(N), A, B], "Unnamed: 0,a,b"),
    "labels.csv": csv([A, B, ["u", "v"] * 30], "a,b,city"),
    "dates.csv": csv([A, B, ["2020-01-02"] * N], "a,b,day"),
    "flags.csv": csv([A, B, ["true", "False"] * 30], "a,b,flag"),
    "nothing.csv": csv([A, B, ["NA", ""] * 30], "a,b,nothing"),
    "CAPITALS.CSV": csv([A, B]),
    "euros.csv": csv([[f"{v} €" for v in A], B]),
    "scientific.csv": csv([[f"{v:.9e}" for v in A], B]),
    "plus.csv": csv([[f"{v:+}" for v in A], B]),
    "upper_flags.csv": csv([A, B, ["TRUE", "FALSE"] * 30], "a,b,flag"),
}
KINDS = [*FILES, "b.parquet", "c.arrow", "d.npy"]


def write_kind(name, path):
    if name in FILES:
        content = FILES[name]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif name == "d.npy":
        np.save(path, FRAME.to_numpy())
    else:
        (FRAME.write_parquet if name == "b.parquet" else FRAME.write_ipc)(path)


@pytest.mark.slow(reason="six commands for each kind of files")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_passes_through_every_command(name, tmp_path):
    write_kind(name, path := tmp_path / name)
    train(path, "run", "base=gaussian")
    train(path, "run", "base=gaussian", "ckpt_path=auto", "trainer.max_epochs=2")
    call("evaluate", "run", "hydra.run.dir=evaluation")
    call("sample", "run", "n=3", "hydra.run.dir=samples")
    call("score", "run", f"path={path}", "hydra.run.dir=scores")
    scores = pl.read_csv("scores/scores.csv")["log_prob"]
    assert scores.is_finite().all()
    assert len(pl.read_csv("samples/samples.csv")) == 3
    density = rnode.load("run")
    np.testing.assert_allclose(density.log_prob(FRAME.to_numpy()), scores, rtol=1e-5, atol=1e-6)
    fitted = rnode.fit(path, overrides=[*SHORT, "base=gaussian"])
    assert fitted.columns_ == density.columns_


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_two_columns(name, tmp_path, capsys):
    write_kind(name, path := tmp_path / name)
    splits = table(path=str(path))
    nameless = "no_header" in name or name == "d.npy"
    assert splits.transform.names == (["column_0", "column_1"] if nameless else ["a", "b"])
    assert sum(map(len, splits.parts)) == N
    rows = torch.cat(splits.parts)
    np.testing.assert_allclose(rows[rows[:, 0].argsort()], FRAME.sort("a").to_numpy())
    printed = capsys.readouterr().out
    assert f"{name}: {N} rows; modelled: {', '.join(splits.transform.names)}" in printed
    others = {
        "index": "no name (Int64)",
        "unnamed": "Unnamed: 0 (Int64)",
        "dates": "day (String)",
        "labels": "city (String)",
        "flags": "flag (Boolean)",
        "nothing": "nothing (Null)",
        "text_but": "column_2 (String)",
        "cp1252": "read as Windows' cp1252",
    }
    for part, words in others.items():
        assert (words in printed) == (part in name)


@pytest.mark.parametrize("word", ["", "N/A", "NaN", "-", "inf"])
def test_missing_values_stop_a_run_or_are_left_out(word, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(csv([A, [word, *B[1:]]]))
    with pytest.raises(InputError, match=r"infinite in b \(1\); dataset.missing=drop leaves"):
        table(path=str(path))
    assert sum(map(len, table(path=str(path), missing="drop").parts)) == N - 1
    assert "1 of 60 rows are left out" in capsys.readouterr().out
    table(path=str(path), columns=["a"])


CITY = {"split_column": "city"}


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([*A[1:], "about 5"], {}, "rows.csv: a is about 5 in row 59, no number"),
        ([*(f"${v}" for v in A[1:]), "€5"], {}, "rows.csv: a is €5 in row 59, with another"),
        ([*(f"{v}%" for v in A[1:]), 5], {}, "rows.csv: a is 5 in row 59, with another sign"),
        (["x"] * N, {"columns": ["a"]}, "rows.csv: a is x in row 0, no number"),
        (A, {"columns": ["a", "a"]}, "columns=a: is there twice"),
        (A, {"columns": ["a", "b"], "context": ["b"]}, "columns=b: must be among a, city"),
        (A, {"columns": ["c"]}, "columns=c: must be among a, b"),
        (A, {"columns": ["b"], "integer": ["b"]}, "b=.*: must be a whole number"),
        (A, {"logit": {"b": [0.2, 0.3]}}, "must be between 0.2 and 0.3"),
        (A, {"log": ["b"], "logit": {"b": [-9e9, 9e9]}}, "log=b: must be among a"),
        (A, {"test": 60}, "test=60: must be 1 to 59, out of 60 samples"),
        (A, CITY, r"split_column=city: holds \['oslo'\], not train, val and test"),
        ([1.5] * N, {"columns": ["a"]}, "no column varies in the training split"),
        (A[:3], {}, "rows.csv: 3 rows are too few"),
        ([], {}, "rows.csv: holds no rows"),
    ],
)
def test_what_cannot_be_modelled_is_named(cells, options, message, tmp_path):
    path = tmp_path / "rows.csv"
    n = len(cells)
    path.write_text(csv([cells, B[:n], ["Oslo"] * n], "a,b,city"))
    with pytest.raises(InputError, match=message):
        table(path=str(path), **options).fit()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "none.csv: there is no such file"),
        ("rows.txt", "rows.txt: must end in one of .csv, .tsv"),
        ("broken.parquet", "broken.parquet: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name, message, capsys):
    for file in ("rows.txt", "broken.parquet"):
        Path(file).write_text("x")
    assert message in refused(capsys, "train", "dataset=table", f"dataset.path={name}", *SHORT)
    assert not list(Path().rglob("*.ckpt"))


CHANGES = {
    "nothing": lambda frame: frame,
    "unit": lambda frame: frame.with_columns(pl.col("a") * 1000),
    "fewer": lambda frame: frame[: 7 * N // 8],
    "more": lambda frame: pl.concat([frame, frame.with_columns(pl.col("a") + 0.1)]),
    "columns": lambda frame: frame.select("b", "a", "city", c="a"),
}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """The folder of a run on rows.csv, and its frame."""
    folder = tmp_path_factory.mktemp("conditional")
    frame = FRAME.with_columns(city=pl.Series(["u", "v"] * 30))
    frame.write_csv(folder / "rows.csv")
    train(folder / "rows.csv", folder / "run", "dataset.context=[city]")
    return folder / "run", frame


@pytest.mark.parametrize("change", CHANGES)
def test_evaluate_equals_score_after_any_change_of_the_file(change, conditional, capsys):
    folder, frame = conditional
    CHANGES[change](frame).write_csv("new.csv")
    data = rnode.load(folder).data_
    data.arguments["path"] = str(folder.parent / "rows.csv")
    data.setup()
    call("evaluate", str(folder), "dataset.path=new.csv", "hydra.run.dir=evaluation")
    printed = capsys.readouterr().out
    differs = "new.csv: differs from what the checkpoint was trained on" in printed
    assert differs == (change not in ("nothing", "columns"))
    call("score", str(folder), "path=new.csv", "hydra.run.dir=scores")
    scores = pl.read_csv("scores/scores.csv")["bits_per_dim"].to_numpy()
    found = pl.read_csv("evaluation/samples.csv")["bits_per_dim"].to_numpy()
    assert all(np.isclose(scores, bits, rtol=1e-4, atol=1e-4).any() for bits in found)
    # No row of the training split is in another split, and none of the others in it.
    again = rnode.load(folder).data_
    again.arguments["path"] = "new.csv"
    again.setup()
    old, now = ([set(map(tuple, x.tolist())) for x in d.splits.parts] for d in (data, again))
    assert not old[0] & (now[1] | now[2])
    assert not old[2] & now[0]
    assert torch.equal(again.transform.whitening, data.transform.whitening)


def test_resuming_uses_the_encoder_and_the_splits_of_the_checkpoint(conditional, tmp_path, capsys):
    folder, frame = conditional
    CHANGES["more"](frame).write_csv("new.csv")
    shutil.copytree(folder, "run")
    options = ["dataset.context=[city]", "trainer.max_epochs=2", "ckpt_path=auto"]
    train("new.csv", "run", *options)
    assert "new.csv: differs from what the checkpoint was trained on" in capsys.readouterr().out
    states = [torch.load(f / "last.ckpt")["DataModule"] for f in (folder, tmp_path / "run")]
    assert torch.equal(*(state["transform"]["whitening"] for state in states))
    known = [set(state["hashes"]["train"].tolist()) for state in states]
    assert known[0] < known[1]
    train("new.csv", "run", *options[:1], "ckpt_path=auto", "trainer.max_epochs=3")
    last = torch.load(tmp_path / "run" / "last.ckpt")["DataModule"]
    assert set(last["hashes"]["train"].tolist()) == known[1]
    data = ["dataset=table", "dataset.path=new.csv", "dataset.logit={a:[-99,99]}", *options[:1]]
    line = refused(capsys, "train", "run", *data, "hydra.run.dir=run", *SHORT)
    assert "those of the checkpoint" in line


def test_a_changed_file_keeps_the_units_of_the_checkpoint(tmp_path, capsys):
    """Other rows would have another smallest value, and another smallest difference."""
    rows = pl.DataFrame({"a": np.round(normal(N), 1), "b": np.round(normal(N) ** 2 + 1), "c": A})
    rows.write_csv("rows.csv")
    train("rows.csv", "run", "base=gaussian", "dataset.logit={b:[0,99]}")
    more = pl.DataFrame({"a": [-9.05, 7.0], "b": [1.0, 30.0], "c": [0.5, 0.7]})
    pl.concat([rows, more]).write_csv("rows.csv")
    call("evaluate", "run", "hydra.run.dir=evaluation")
    assert "rows.csv: differs from" in capsys.readouterr().out
    columns = {column.name: column for column in rnode.load("run").data_.transform.columns}
    assert (columns["a"].unit, columns["b"].unit) == (pytest.approx(0.1), 1.0)
    samples = pl.read_csv("evaluation/samples.csv")
    assert samples["bits_per_dim"].is_finite().all()


def test_score_and_sample_open_the_checkpoint_alone(conditional, tmp_path, capsys):
    folder, frame = conditional
    frame.write_csv("new.csv")
    kept = (folder.parent / "rows.csv").rename(tmp_path / "kept.csv")
    try:
        call("score", str(folder), "path=new.csv", "id=[city]", "hydra.run.dir=scores")
        call("sample", str(folder), "n=2", "context.city=u", "hydra.run.dir=samples")
    finally:
        kept.rename(folder.parent / "rows.csv")
    printed = capsys.readouterr().out
    assert "median" in printed
    assert "the 5 most unusual:" in printed
    (tmp_path / "wrong.ckpt").write_text("x")
    line = refused(capsys, "score", "wrong.ckpt", "path=none.csv")
    assert "wrong.ckpt: is damaged" in line
    taken = ("rank", f"contribution_{rnode.load(folder).columns_[0]}")
    frame.with_columns(pl.lit(1).alias(name) for name in taken).write_csv("ranked.csv")
    for name in taken:
        line = refused(capsys, "score", str(folder), "path=ranked.csv", f"id=[{name}]")
        assert f"id={name}: scores.csv has such a column; rename yours" in line
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    call("evaluate", str(folder), "hydra.run.dir=evaluation")
    assert json.loads(Path("evaluation/evaluation.json").read_text())["samples"] == 6
