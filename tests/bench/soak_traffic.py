"""The parts of the soak's traffic that no program of the distribution makes. Started by soak.py as one of

    echo PORT                        a server that gives back each line
    talk HOST PORT COUNT FILE        so many connections of lines at a time, each for some seconds
    upload HOST PORT PATH COUNT FILE so many slow uploads at a time, each going on after its answer has come

The clients write what they counted into FILE every second, as JSON, until they are stopped.
"""

import asyncio
import collections
import json
import os
import random
import sys

LINE = 1024  # bytes
PAUSE = 0.2  # seconds between two lines, or two pieces of an upload
LONGEST = 15  # seconds of a connection
UPLOAD = 8  # seconds of an upload, however early its answer comes
PATIENCE = 10  # seconds for an answer
AGAIN = 0.5  # seconds until a client that got nowhere tries again

counts = collections.Counter()
random.seed(11)


async def echo(reader, writer):
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except (OSError, ValueError):
        pass
    finally:
        writer.close()


async def talk(host, port):
    """One connection: each line must come back as it was."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        answered = 0
        for number in range(int(random.uniform(1, LONGEST) / PAUSE)):
            line = (b"%d " % number).ljust(LINE, b"x") + b"\n"
            writer.write(line)
            back = await asyncio.wait_for(reader.readexactly(len(line)), PATIENCE)
            if back != line:
                counts["wrong"] += 1
            answered += 1
            counts["lines"] += 1
            await asyncio.sleep(PAUSE)
        counts["complete"] += 1
    finally:
        if not answered:
            counts["without an answer"] += 1
        writer.close()


async def upload(host, port, path):
    """One upload in pieces. The server answers its head; what follows is for nobody."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"POST {path} HTTP/1.1\r\nHost: soak\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        answer = asyncio.ensure_future(asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE))
        try:
            for _ in range(int(UPLOAD / PAUSE)):
                writer.write(b"400\r\n" + b"x" * LINE + b"\r\n")
                await writer.drain()
                await asyncio.sleep(PAUSE)
        except OSError:
            # A server may close once it has answered.
            counts["cut"] += 1
        head = await answer
        counts[f"status {head.split(b' ', 2)[1].decode()}"] += 1
    finally:
        writer.close()


async def again_and_again(one):
    while True:
        try:
            counts["begun"] += 1
            await one()
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            counts[f"broken: {type(error).__name__}"] += 1
            await asyncio.sleep(AGAIN)


async def report(file):
    while True:
        with open(file + ".new", "w") as out:
            json.dump(counts, out)
        os.replace(file + ".new", file)
        await asyncio.sleep(1)


async def main():
    what, *arguments = sys.argv[1:]
    if what == "echo":
        server = await asyncio.start_server(echo, "0.0.0.0", int(arguments[0]), limit=4 * LINE)
        await server.serve_forever()
    one = {"talk": talk, "upload": upload}[what]
    *target, count, file = arguments
    clients = [again_and_again(lambda: one(*target)) for _ in range(int(count))]
    await asyncio.gather(report(file), *clients)


asyncio.run(main())
