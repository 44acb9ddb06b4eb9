"""A process that has imported what the commands import, and forks into one when it is asked to: they start at once.

Started by `tests.commands` with its end of a socket and the modules' names. A request is a line of JSON with three open
files: standard output, standard error, and a pipe that the process number and then the exit status are written into.
When the other end is closed, or its process dies, every command still running is killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

NUMBER = struct.Struct("i")


def serve(requests: socket.socket) -> None:
    """Fork for each request; returns in the child, as the command it is to be, and never in the parent."""
    running: dict[int, int] = {}  # process number -> where its status is to be written
    while True:
        if select.select([requests], [], [], 0.01)[0]:
            message, files, _, _ = socket.recv_fds(requests, 2**16, 3)
            if not message:
                for pid in running:
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            while not message.endswith(b"\n"):
                message += requests.recv(2**16)
            out, err, status = files
            pid = os.fork()
            if pid == 0:
                for other in running.values():
                    os.close(other)
                requests.close()
                _become(json.loads(message), out, err, status)
                return
            os.close(out)
            os.close(err)
            running[pid] = status
        for pid in list(running):
            ended, wait_status = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = running.pop(pid)
                with suppress(BrokenPipeError):  # nobody asks any more
                    os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(wait_status)))
                os.close(status)


def _become(request: dict, out: int, err: int, status: int) -> None:
    """Take on what makes a process the command it is: session, files, folder, environment and arguments."""
    os.setsid()
    os.write(status, NUMBER.pack(os.getpid()))  # only now can all of the session be killed
    os.close(status)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # or each command would look through, and so copy, all of it
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(sys.argv[0], run_name="__main__")
