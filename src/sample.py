"""`python src/sample.py …` is the command `rnode sample …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("sample")
