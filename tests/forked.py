"""A fork server: runs of the commands as forks of one process that has done the imports.

It reads one JSON object a line. {"run": [arguments], "err": file} starts a run; the answer is its
process id. {"wait": pid} waits for its end; the answer is its exit code. Other keys of "run":

    command   another command than train
    out       a file for stdout, which otherwise goes to `err` too
    network   false: downloads fail
"""

import json
import os
import signal
import sys
import traceback
import urllib.request

import sklearn.datasets  # noqa: F401

import rnode.app.evaluate
import rnode.app.sample
import rnode.app.train
import rnode.training.callbacks  # noqa: F401
from helpers import HANG
from rnode.app import cli


def run(request: dict) -> None:
    """In the child: run a command as its command line does, and exit."""
    for descriptor, key in ((2, "err"), (1, "out")):
        if key in request:
            with open(request[key], "w") as file:
                os.dup2(file.fileno(), descriptor)
        else:
            os.dup2(2, descriptor)
    signal.alarm(HANG)
    if not request.get("network", True):
        urllib.request.urlopen = no_network
    command = request.get("command", "train")
    sys.argv = [f"{command}.py", *request["run"]]
    code = 0
    try:
        cli.run(command)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def no_network(*arguments: object, **keywords: object) -> None:
    raise OSError("there is no network in this test")


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = os.fork()
            if answer == 0:
                run(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(answer, flush=True)
