"""The figures and the table of the paper, from runs of the command line."""
