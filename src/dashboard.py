"""`python src/dashboard.py …` is the command `rnode dashboard …`; --help lists what can be set."""

from rnode.app.cli import run

if __name__ == "__main__":
    run("dashboard")
