"""Downloads that nobody reads and uploads that nobody takes, and other requests beside them: BODIES SETTLED RELEASE.
Every request is answered while no byte of a stalled body moves: whoever waited for one would wait for ever."""
import http.client
import os
import statistics
import sys
import threading
import time

BODIES, SETTLED, RELEASE = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# More than all buffers on the way hold, the kernel's too.
SIZE = 20_000_000
PATIENCE = 30
# How many of each kind are read to their end when they are released.
WHOLE = 3


def download(bodies, number):
    connection = http.client.HTTPConnection("orders", 80)
    connection.request("GET", f"/slow?bytes={SIZE}&seconds=0")
    while not os.path.exists(RELEASE):
        time.sleep(0.05)
    if number < WHOLE:
        bodies.append(len(connection.getresponse().read()))


def upload(bodies, number):
    connection = http.client.HTTPConnection("orders", 80)
    # the app takes nothing before the release
    connection.request("POST", f"/hold?until={RELEASE}", BODY)
    if number < WHOLE:
        bodies.append(int(connection.getresponse().read()))


def ask(connection):
    start = time.monotonic()
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"one")
    return time.monotonic() - start


def asked(when, go_on):
    """Asks for as long as `go_on` says, in turn on a kept connection and on a new one."""
    times = []
    kept = http.client.HTTPConnection("orders", 80, timeout=PATIENCE)
    while go_on(len(times)):
        times.append(ask(kept))
        times.append(ask(http.client.HTTPConnection("orders", 80, timeout=PATIENCE)))
        assert not moved
    middle, worst = statistics.median(times) * 1000, max(times) * 1000
    print(f"{when}: {len(times)} answered, half of them within {middle:.1f} ms, all within {worst:.1f} ms", flush=True)


BODY = b"x" * SIZE
moved = []
asked("before", lambda count: count < 100)
threads = [threading.Thread(target=kind, args=(moved, number), daemon=True)
           for number in range(BODIES) for kind in (download, upload)]
for thread in threads:
    thread.start()
asked("filling", lambda count: count < 100 or not os.path.exists(SETTLED))
asked("stalled", lambda count: count < 100)
open(RELEASE, "w").close()
for thread in threads[:2 * WHOLE]:
    thread.join()
assert moved == [SIZE] * len(moved) and len(moved) == 2 * WHOLE, moved
print("released", flush=True)
os._exit(0)
