"""`python -m rnode train …` is the command `rnode train …`."""

from rnode.app.cli import main

main()
