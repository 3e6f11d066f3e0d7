"""Takes the place of Python where tests run what the READMEs say to type: `python -m common` and `python -c` are forked
from the tests' process that has torch, as zygote.py describes; for all else it becomes the real Python.

    python -SEI forked_python.py SOCKET PYTHON ARGUMENTS...
"""

import os
import pickle
import socket
import struct
import sys

address, python, *words = sys.argv[1:]
program = {("-m", "common"): "common", ("-c",): "-c"}.get(tuple(words[: 1 + (words[:1] == ["-m"])]))
if program is None:
    os.execv(python, [python, *words])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    here = os.getcwd()
    request = pickle.dumps((program, words[2:] if program == "common" else words[1:], here, here, dict(os.environ)))
    socket.send_fds(connection, [struct.pack("!I", len(request))], [0, 1, 2])
    connection.sendall(request)
    connection.recv(4, socket.MSG_WAITALL)
    code = os.waitstatus_to_exitcode(struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))[0])
sys.exit(code if code >= 0 else 128 - code)  # as a shell does
