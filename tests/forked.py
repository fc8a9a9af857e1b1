"""train.py in forks of one process that has done the imports: a run starts in a moment and is a process of its own.

Reads a JSON object a line: {"run": [arguments], "err": file} is answered by the run's pid, {"wait": pid} by its exit code.
A run may have limits: "largest_file" in bytes; "unprivileged", so that files' permissions are meant for it too.
"""

import ctypes
import json
import os
import resource
import sys

import sklearn.datasets  # noqa: F401

import build  # noqa: F401
import cli
import rnode.callbacks  # noqa: F401
import train

CAPABILITY_VERSION, DAC_OVERRIDE = 0x20080522, 1 << 1


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
    if request.get("unprivileged"):
        obey_permissions()
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


def obey_permissions() -> None:
    """Give up root's privilege to write whatever a file's permissions say. (As another user it could not read what is
    imported late, where Python lies in root's home.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)  # effective, permitted and inheritable, twice 32 of each
    for i in range(3):
        data[i] &= ~DAC_OVERRIDE
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    main()
