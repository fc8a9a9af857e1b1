"""`python src/score.py …` is the command `rnode score …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("score")
