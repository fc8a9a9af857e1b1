"""`python src/reproduce.py …` is the command `rnode reproduce …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("reproduce")
