"""The scripts in forks of one process that has done the imports: a run starts in a moment and is a process of its own.

Reads a JSON object a line: {"run": [arguments], "err": file} is answered by the run's pid, {"wait": pid} by its exit code.
Of a run may also be given: "script", another than train; "out", a file for what goes to stdout, otherwise to `err` too;
"largest_file" and "memory", limits in bytes; "seconds", after which SIGALRM ends it; "network": false; "unprivileged", so
that files' permissions are meant for it too.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import urllib.request

import sklearn.datasets  # noqa: F401

import build  # noqa: F401
import cli
import evaluate
import rnode.callbacks  # noqa: F401
import sample
import train

SCRIPTS = {"train": train, "evaluate": evaluate, "sample": sample}
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
    """In the child: a script as its command line would run it, and out."""
    for descriptor, name in ((2, "err"), (1, request.get("out") and "out")):
        if name:
            with open(request[name], "w") as file:
                os.dup2(file.fileno(), descriptor)
        else:
            os.dup2(2, descriptor)
    for name, limit in (("largest_file", resource.RLIMIT_FSIZE), ("memory", resource.RLIMIT_AS)):
        if name in request:
            resource.setrlimit(limit, (request[name],) * 2)
    signal.alarm(request.get("seconds", 0))
    if not request.get("network", True):
        urllib.request.urlopen = no_network
    if request.get("unprivileged"):
        obey_permissions()
    script = request.get("script", "train")
    sys.argv = [f"{script}.py", *request["run"]]
    code = 1
    try:
        cli.run(SCRIPTS[script].main, f"{script}.py", "")
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


def no_network(*arguments: object, **keywords: object) -> None:
    raise OSError("there is no network in this test")


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
