"""Quotes around arguments of the command line, for Hydra and for a shell."""

import re
import shlex


def quote(value: str) -> str:
    """Quote the value of an override if Hydra cannot read it without quotes."""
    if re.fullmatch(r"[\w/.:+@%-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def shell_quote(argument: str) -> str:
    """Quote an argument for a shell, by double quotes where they do."""
    quoted = shlex.quote(argument)
    plain = quoted == argument or re.search(r'["$`\\!]', argument)
    return quoted if plain else f'"{argument}"'
