"""train.py in forks of one process that has done the imports: a run starts in a moment and is a process of its own.

Reads a JSON object a line: {"run": [arguments], "err": file} is answered by the run's pid, {"wait": pid} by its exit code.
A run may have limits: "largest_file" in bytes; "unprivileged", so that files' permissions are meant for it too.
"""

import json
import os
import resource
import sys

import sklearn.datasets  # noqa: F401

import build  # noqa: F401
import cli
import rnode.callbacks  # noqa: F401
import train

NOBODY = 65534


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            pid = os.fork()
            if pid == 0:
                run(request)
            print(pid, flush=True)
        else:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict) -> None:
    """In the child: train.py as its command line would run it, and out."""
    with open(request["err"], "w") as err:
        os.dup2(err.fileno(), 1)
        os.dup2(err.fileno(), 2)
    if "largest_file" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request.get("unprivileged") and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    sys.argv = ["train.py", *request["run"]]
    code = 1
    try:
        cli.run(train.main, "train.py", "")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
