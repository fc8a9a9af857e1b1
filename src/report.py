"""`python src/report.py …` is the command `rnode report …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("report")
