"""Says bytes to a server and prints all it answers.

usage: say.py HOST PORT [--half-close | --reset] BYTES...
BYTES are Python escapes; `*N` repeats the ones before N times; `?TEXT` waits until TEXT was answered.
"""

import codecs
import socket
import struct
import sys

host, port, *rest = sys.argv[1:]
half_close = "--half-close" in rest
connection = socket.create_connection((host, int(port)), timeout=15)
answered = b""
was_reset = False
said = b""
for word in rest:
    if word in ("--half-close", "--reset"):
        continue
    if word.startswith("?"):
        while word[1:].encode() not in answered:
            data = connection.recv(65536)
            if not data:
                sys.exit(f"closed before {word[1:]!r} was answered: {answered!r}")
            answered += data
        continue
    if word.startswith("*"):
        said *= int(word[1:]) - 1
    else:
        said = codecs.decode(word, "unicode_escape").encode("latin-1")
    try:
        connection.sendall(said)
    except (ConnectionResetError, BrokenPipeError):
        # the server is faster than we are; what it answered before is still to be read
        was_reset = True
        break
if "--reset" in rest:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sys.exit()
try:
    if half_close and not was_reset:
        connection.shutdown(socket.SHUT_WR)
    while data := connection.recv(65536):
        answered += data
except (ConnectionResetError, BrokenPipeError):
    was_reset = True
sys.stdout.buffer.write(answered + (b"[reset]" if was_reset else b""))
