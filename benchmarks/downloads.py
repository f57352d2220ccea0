"""How fast URLs are fetched, for how much of a processor and in how much memory: many threads on one
host, and on a thousand hosts.

A server in a process of its own answers with the same bytes at once, on all of 127.0.0.0/8: the client is what is
measured. Each case runs in a fresh process; those of this tree and of another one (`--before`) take turns.

    python benchmarks/downloads.py --before ../another/checkout --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path

THREADS, URLS, BODY = 256, 6_000, 100_000
CASES = {"one host": 1, "a thousand hosts": 1_000}


async def serve() -> None:
    """Answer every request, and print the port."""
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % BODY + bytes(BODY)

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(reply, "0.0.0.0", 0, backlog=1_024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(port: int, hosts: int) -> None:
    """Print URLs a second, milliseconds of a processor for each, and the process's peak memory in MB."""
    from graphbuild.sources.fetch import Fetcher, Policy

    fetcher = Fetcher(Policy(allow_private_hosts=True))

    def fetch(number: int) -> int:
        host = number % hosts
        request = urllib.request.Request(f"http://127.0.{host // 250}.{host % 250 + 1}:{port}/{number}")
        return len(fetcher.open(request).read())

    with ThreadPool(THREADS) as threads:
        threads.map(fetch, range(THREADS), chunksize=1)
        begin, busy = time.perf_counter(), time.process_time()
        sizes = threads.map(fetch, range(URLS), chunksize=1)
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    assert sizes == [BODY] * URLS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
    print(json.dumps({"rate": URLS / seconds, "busy": busy / URLS * 1e3, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of graphbuild")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    trees = {"now": Path(__file__).parents[1], **({"before": options.before} if options.before else {})}
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    try:
        for case, hosts in CASES.items():
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    command = [sys.executable, __file__, "measure", port, str(hosts)]
                    environment = {**os.environ, "PYTHONPATH": str(tree)}
                    said = subprocess.run(
                        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                    ).stdout
                    runs[name].append(json.loads(said))
            for name, results in runs.items():
                rate, busy, peak = (statistics.median(run[key] for run in results) for key in ("rate", "busy", "peak"))
                print(
                    f"{case:17} {name:7} {rate:6,.0f} URLs/s, {busy:.2f} ms of a processor each, {peak:,.0f} MB at most"
                )
        print(f"Medians of {options.rounds}; {THREADS} threads, {URLS:,} URLs of {BODY:,} bytes.")
    finally:
        server.terminate()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            asyncio.run(serve())
        case ["measure", port, hosts]:
            measure(int(port), int(hosts))
        case _:
            main()
