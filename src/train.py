"""`python src/train.py …` is the command `rnode train …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("train")
