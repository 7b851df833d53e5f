"""The measurements of scripts/bench-moves, whose virtual machine of h0 and h1 is up."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

MIB = 1 << 20
RATE = 10e6 / 8  # bytes a second of a 10 Mbit/s link


class Task:
    """benches/mover.c as a task on h0."""

    def __init__(self, bench, *arguments):
        bench.count += 1
        self.log = f"{bench.work}/log/{bench.count}"
        program = f"{bench.work}/mover"
        words = " ".join(map(str, arguments))
        # Through PVM's own console, so that pvmd is its parent; the log's first line says that it is ready.
        bench.console("h0", f"spawn -1 {bench.where('h0')} {program} {words} {self.log}")
        self.tid = bench.newest(program)
        bench.until(lambda: os.path.exists(self.log) and os.path.getsize(self.log) > 0)
        self.bench = bench
        self.at = "h0"

    def lines(self, since):
        with open(self.log) as log:
            rows = [tuple(map(int, line.split())) for line in log.read().splitlines() if line.count(" ") == 2]
        return [row for row in rows if row[0] >= since]

    def move(self):
        """To the other host; what mistctl said, and the longest gap the task itself saw (ms)."""
        self.at = "h1" if self.at == "h0" else "h0"
        began = time.time_ns() // 1000
        said = self.bench.mistctl("migrate", self.tid, self.at, "--json")
        report = json.loads(said)
        report["seconds"] = (time.time_ns() // 1000 - began) / 1e6
        # It notes a gap as soon as it runs again.
        time.sleep(0.02)
        report["gap_ms"] = max([row[1] for row in self.lines(began)], default=0) / 1000
        return report

    def kill(self):
        self.bench.console("h0", f"kill {self.tid}")


class Bench:
    def __init__(self, args):
        self.hosts, self.work, self.rounds = args.hosts, args.work, args.rounds
        self.count = 0
        self.samples = {}
        self.rows = []

    def exec(self, host, *command, root=False):
        verb = [self.hosts, "exec"] + (["--root"] if root else []) + [host, *map(str, command)]
        done = subprocess.run(verb, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} on {host} failed with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def console(self, host, line):
        return self.exec(host, "bash", "-c", f"printf '%s\\nquit\\n' '{line}' | pvm")

    def where(self, host):
        return f"-{host}"

    def mistctl(self, *arguments):
        return self.exec("h0", f"{self.work}/bin/mistctl", *arguments)

    def newest(self, program):
        tasks = json.loads(self.mistctl("ps", "--json"))["tasks"]
        mine = [t["virtual_tid"] for t in tasks if t["program"] == program]
        return max(mine, key=lambda tid: int(str(tid).lstrip("t"), 16))

    def until(self, ready, limit=60):
        end = time.monotonic() + limit
        while not ready():
            if time.monotonic() > end:
                sys.exit("a task does not come up")
            time.sleep(0.005)

    def shape(self, rate):
        for host in ("h0", "h1"):
            subprocess.run([self.hosts, *(["shape", host, rate] if rate else ["unshape", host])], check=True)

    def wire(self, size):
        """Seconds in which one TCP connection carries so many bytes from h0 to h1."""
        receive = ("import socket,time; s=socket.create_server(('',7777)); c=s.accept()[0]; n=0\n"
                   "while n<%d: n+=len(c.recv(1<<20))\n"
                   "c.send(b'x')" % size)
        send = ("import socket,time,os\nd=bytes(1<<20)\n"
                "while True:\n try: c=socket.create_connection(('h1',7777)); break\n"
                " except OSError: time.sleep(0.02)\n"
                "t=time.monotonic(); n=%d\n"
                "while n>0: c.sendall(d[:n]); n-=min(n,len(d))\n"
                "c.recv(1); print(time.monotonic()-t)" % size)
        other = subprocess.Popen([self.hosts, "exec", "h1", "python3", "-c", receive], stdin=subprocess.DEVNULL)
        seconds = float(self.exec("h0", "python3", "-c", send))
        other.wait()
        return seconds

    def sealed(self, size):
        """Seconds in which the stream that moves go over carries so many bytes from h0 to h1."""
        program = f"{self.work}/stream"
        other = subprocess.Popen([self.hosts, "exec", "h1", program, "receive", "7778"], stdin=subprocess.DEVNULL)
        seconds = float(self.exec("h0", program, "send", "h1:7778", size))
        other.wait()
        return seconds

    def whole(self, task):
        """Waits until the memory of a task that has moved is in place: that is work behind the move, and none of what
        is measured next."""
        self.exec(task.at, "bash", "-c", "while pgrep -x mist-understudy >/dev/null; do sleep 0.02; done", root=True)

    def figure(self, name, values, unit, limit=None, words="", more=False, by_median=False):
        """Records a row; `more`: values should be at least the limit, of which the best has to be, or the median."""
        self.samples[name] = values
        best = max(values) if more else min(values)
        middle = statistics.median(values)
        if limit is None:
            verdict = ""
        else:
            counts = middle if by_median else best
            good = counts >= limit if more else counts <= limit
            verdict = f"{limit:10.2f} {counts / limit:5.2f} {words:28} {'yes' if good else 'NO'}"
        self.rows.append(f"{name:52} {best:10.2f} {middle:10.2f} {unit:5} {verdict}")
        print(self.rows[-1], flush=True)

    def small(self):
        task = Task(self, "memory", 1024, "random", 0)
        task.move()  # starts agents
        moves = [task.move() for _ in range(self.rounds * 10)]
        task.kill()
        self.figure("1 MiB: whole move", [m["total_us"] / 1000 for m in moves], "ms", 60, "<= 60 ms")
        self.figure("1 MiB: blackout", [m["blackout_us"] / 1000 for m in moves], "ms", 20, "<= 20 ms")
        self.figure("  the gap the task saw", [m["gap_ms"] for m in moves], "ms")
        self.figure("  mistctl migrate, the command", [m["seconds"] * 1000 for m in moves], "ms")

    def large(self):
        task = Task(self, "memory", 1 << 20, "random", 20)
        task.move()
        moves = [task.move() for _ in range(self.rounds)]
        task.kill()
        self.figure("1 GiB, writing 20 MB/s: blackout", [m["blackout_us"] / 1000 for m in moves], "ms", 60, "<= 60 ms")
        self.figure("  the gap the task saw", [m["gap_ms"] for m in moves], "ms")
        task = Task(self, "memory", 1 << 20, "random", 0)
        task.move()
        self.whole(task)
        # What else the machine does changes from minute to minute: each move is compared with the streams right before
        # and behind it.
        rates, plain, sealed = [], [], [(1 << 30) / self.sealed(1 << 30) / 1e6]
        for _ in range(self.rounds):
            moved = task.move()
            rates.append(moved["bytes"] / moved["total_us"])
            self.whole(task)
            sealed.append((1 << 30) / self.sealed(1 << 30) / 1e6)
            plain.append((1 << 30) / self.wire(1 << 30) / 1e6)
        task.kill()
        self.figure("one TCP stream, plain", plain, "MB/s", more=True)
        self.figure("one TCP stream with the moves' cipher", sealed, "MB/s", more=True)
        self.figure("1 GiB: rate of the whole move", rates, "MB/s", more=True)
        shares = [2 * rate / (before + after) for rate, before, after in zip(rates, sealed, sealed[1:])]
        self.figure("  its share of the latter, before and behind it", shares, "", 0.7, "median >= 0.7", more=True,
                    by_median=True)

    def slow(self):
        self.shape("10mbit")
        for kind, words, limit in (("random", "within 6 % of the wire", 1.06), ("text", "below the wire", 1.0)):
            task = Task(self, "memory", 8_000_000 // 1024, kind, 0)
            self.shape(None)
            task.move()
            self.shape("10mbit")
            wire = [self.wire(8_000_000)]
            moves = [task.move() for _ in range(max(1, self.rounds // 2))]
            task.kill()
            self.figure(f"8 MB {kind}, 10 Mbit/s: whole move", [m["total_us"] / 1e6 for m in moves], "s",
                        limit * min(wire), words)
            self.figure("  the wire alone", wire, "s")
        self.shape(None)

    def bystanders(self):
        task = Task(self, "memory", 4096, "random", 1)
        pair = Task(self, "pair", f"{self.work}/mover", "h1")
        task.move()

        def count(during):
            began = time.time_ns() // 1000
            during()
            rows = pair.lines(began)[1:]
            return statistics.median(row[1] for row in rows), max(row[2] for row in rows) / 1000

        quiet, moving, longest = [], [], []
        for _ in range(self.rounds):
            quiet.append(count(lambda: time.sleep(2)))
            moving.append(count(lambda: [task.move() for _ in range(8)]))
        self.figure("bystanders' exchanges a tenth of a second", [q[0] for q in quiet], "", more=True)
        self.figure("  while another task moves to and fro", [m[0] for m in moving], "", more=True)
        self.figure("  their longest exchange, nobody moving", [q[1] for q in quiet], "ms")
        self.figure("  their longest exchange, another moving", [m[1] for m in moving], "ms")
        task.kill()
        pair.kill()


def main():
    parser = argparse.ArgumentParser()
    for name in ("hosts", "work", "only", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"{'figure':52} {'best':>10} {'median':>10} {'':5} {'limit':>10} {'of it':>5} {'reach':28} ok?")
    for name in args.only.split(","):
        getattr(bench, name)()
    print(f"load {os.getloadavg()[0]:.1f} afterwards")
    with open(args.out, "w") as out:
        json.dump(bench.samples, out, indent=1)


main()
