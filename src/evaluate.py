"""`python src/evaluate.py …` is the command `rnode evaluate …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("evaluate")
