"""The measurements of scripts/bench. Runs as the only child of the init of a pid namespace of its own."""

import argparse
import json
import mmap
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time

import late
import peer

MIB = 1 << 20


def now():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def size_name(mib):
    return f"{mib} MiB" if mib < 1024 else f"{mib // 1024} GiB"


class Program:
    """benches/program.c, and the page it shows its state in."""

    def __init__(self, bench, mib, mode):
        self.shown = os.path.join(bench.dir, "shown")
        with open(self.shown, "wb") as f:
            f.truncate(4096)
        with open(self.shown, "r+b") as f:
            self.page = mmap.mmap(f.fileno(), 4096)
        self.process = subprocess.Popen(
            [bench.tool("program"), str(mib), self.shown, mode],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )
        self.pid = self.process.pid
        self.await_beat(0)
        if mode == "write":
            while self.rounds < 5:
                time.sleep(0.01)

    def words(self, at, n):
        return struct.unpack_from(f"<{n}Q", self.page, at)

    @property
    def beat(self):
        return self.words(0, 1)[0]

    @property
    def rounds(self):
        return self.words(16, 1)[0]

    def clear_gap(self):
        struct.pack_into("<Q", self.page, 8, 0)

    @property
    def gap(self):
        return self.words(8, 1)[0] / 1e6

    @property
    def woke(self):
        return self.words(24, 1)[0]

    def times(self):
        """(start, end) in ns of the last rounds of writing."""
        w = self.words(32, 500)
        return sorted((a, b) for a, b in zip(w[::2], w[1::2]) if b > a)

    def await_beat(self, since):
        """Until it has shown a time after `since`."""
        limit = time.monotonic() + 120
        while self.beat <= since:
            if time.monotonic() > limit:
                raise SystemExit("bench: the program does not run")
            time.sleep(0.0002)
        return self.beat

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if self.process:
            self.process.wait()
            self.process = None
        # After a restore it is a child of the namespace's init, which takes its status.
        while os.path.exists(f"/proc/{self.pid}"):
            time.sleep(0.001)


class Bench:
    def __init__(self, args):
        self.args = args
        self.dir = args.dir
        self.image = os.path.join(self.dir, "image")
        self.figures = {}
        self.peak = {}

    @staticmethod
    def now():
        return now()

    def tool(self, name):
        return os.path.join(self.args.tools, name)

    def note(self, name, value):
        self.figures.setdefault(name, []).append(value)

    def mistctl(self, *args):
        """Runs it; its JSON, wall time in ms from fork to exit, peak memory in MiB, CPU time in ms."""
        out = os.path.join(self.dir, "out")
        start = now()
        with open(out, "wb") as f:
            child = subprocess.Popen([self.args.mistctl, *args, "--json"], stdin=subprocess.DEVNULL,
                                     stdout=f, close_fds=False, cwd="/")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        took = (now() - start) / 1e6
        with open(out) as f:
            text = f.read()
        if status:
            raise SystemExit(f"bench: mistctl {' '.join(args)}: {text}")
        cpu = (usage.ru_utime + usage.ru_stime) * 1e3
        return json.loads(text), took, usage.ru_maxrss / 1024, cpu, start

    def remove(self):
        shutil.rmtree(self.image, ignore_errors=True)

    def peaked(self, what, mib):
        self.peak[what] = max(self.peak.get(what, 0), mib)

    def yardstick(self, what, mib, path):
        out = subprocess.run([self.tool("fill"), what, path, str(mib)], check=True, capture_output=True)
        return json.loads(out.stdout)

    def size(self, mib, dumps, restores):
        name = size_name(mib)
        program = Program(self, mib, "sleep")
        plain = os.path.join(self.dir, "plain")
        for _ in range(dumps):
            if mib >= 1024:
                self.note(f"fork {name}", self.yardstick("fork", mib, plain)["plain fork"])
            if mib == 1024:
                self.note("plain write", self.yardstick("write", mib, plain)["plain write"])
                os.unlink(plain)
            self.remove()
            program.clear_gap()
            report, took, peak, cpu, _ = self.mistctl("dump", str(program.pid), "-o", self.image)
            program.await_beat(now())
            self.note(f"blackout {name}", report["blackout_us"] / 1e3)
            self.note(f"gap {name}", program.gap)
            self.note(f"dump {name}", took)
            self.note(f"dump cpu {name}", cpu)
            self.peaked(f"dump {name}", peak)
        program.kill()
        for _ in range(restores):
            if mib >= 1024:
                ways = self.yardstick("fill", mib, os.path.join(self.image, "pages"))
                for way, ms in ways.items():
                    self.note(f"fill {name}: {way}", ms)
            for lazy in (False, True):
                kind = "lazy" if lazy else "restore"
                args = ["--lazy"] if lazy else []
                # It is a child of ours until mistctl ends, then of init.
                report, took, peak, cpu, start = self.mistctl("restore", self.image, "--detach", *args)
                program.await_beat(now())
                # From before the fork of mistctl to the program's own first look at the clock.
                self.note(f"{kind} {name}", (program.woke - start) / 1e6)
                self.note(f"{kind} resume_us {name}", report["resume_us"] / 1e3)
                self.note(f"{kind} exit {name}", took)
                self.note(f"{kind} cpu {name}", cpu)
                self.peaked(f"{kind} {name}", peak)
                program.kill()
        self.remove()

    def cow(self, mib):
        """What a dump costs a program that writes all its memory over and over."""
        program = Program(self, mib, "write")
        usual = statistics.median(b - a for a, b in program.times())
        self.remove()
        start = now()
        report, _, _, _, _ = self.mistctl("dump", str(program.pid), "-o", self.image)
        end = now()
        n = program.rounds
        while program.rounds < n + 4:
            time.sleep(0.01)
        slow = [b - a for a, b in program.times() if b > start and a < end + 4 * usual]
        pages = mib * 256
        excess = sum(max(0, t - usual) for t in slow) - report["blackout_us"] * 1e3
        self.note("cow us a page", max(0, excess) / 1e3 / pages)
        during = [b - a for a, b in program.times() if b > start and a < end]
        self.note("cow slowdown", statistics.mean(during) / usual if during else 1.0)
        program.kill()
        self.remove()

    def table(self):
        def low(name):
            return min(self.figures[name])

        def mid(name):
            return statistics.median(self.figures[name])

        rows = []

        def row(figure, value, median, limit, unit, reach, ratio=True):
            rows.append({
                "figure": figure, "min": round(value, 3), "median": round(median, 3),
                "limit": None if limit is None else round(limit, 3), "unit": unit,
                "ratio": None if limit is None or not ratio else round(value / limit, 3), "reach": reach,
                "ok": None if limit is None else value <= limit,
            })

        def each(figure, name, beside, limit):
            """The same, of what was measured beside it in the same round: the machine is not always as fast."""
            ratios = [a / b for a, b in zip(self.figures[name], beside)]
            median = statistics.median(ratios)
            row(figure, min(ratios), median, limit, "x", "" if limit is None else "by the median")
            if limit is not None:
                rows[-1].update(ratio=round(median / limit, 3), ok=median <= limit)

        sizes = [s for s in ("8 MiB", "1 GiB", "4 GiB") if f"blackout {s}" in self.figures]
        reach = {"8 MiB": 3, "1 GiB": 30, "4 GiB": 110}
        for s in sizes:
            row(f"blackout, {s}", low(f"blackout {s}"), mid(f"blackout {s}"), reach[s], "ms", f"<= {reach[s]} ms")
            if f"fork {s}" in self.figures:
                row(f"  a plain fork of as much, {s}", low(f"fork {s}"), mid(f"fork {s}"), None, "ms", "")
                each(f"  of the fork in the same round, {s}", f"blackout {s}", self.figures[f"fork {s}"], None)
            row(f"  longest gap the program saw, {s}", low(f"gap {s}"), mid(f"gap {s}"), None, "ms", "")
        if "cow us a page" in self.figures:
            row("  copy-on-write afterwards", low("cow us a page"), mid("cow us a page"), None, "us/page", "")
            row("  a writing program during the dump", low("cow slowdown"), mid("cow slowdown"), None, "x", "")
        if "plain write" in self.figures:
            row("whole dump, 1 GiB", low("dump 1 GiB"), mid("dump 1 GiB"), 1.5 * low("plain write"), "ms",
                "<= 1.5 x plain write")
            row("  a plain write", low("plain write"), mid("plain write"), None, "ms", "")
            each("  of the write in the same round", "dump 1 GiB", self.figures["plain write"], 1.5)
        for s in sizes:
            if s == "8 MiB":
                row(f"restore, {s}", low(f"restore {s}"), mid(f"restore {s}"), 15, "ms", "<= 15 ms")
                continue
            ways = {k.split(": ")[1]: low(k) for k in self.figures if k.startswith(f"fill {s}: ")}
            best = min(ways, key=ways.get)
            row(f"restore, {s}", low(f"restore {s}"), mid(f"restore {s}"), 1.25 * ways[best], "ms",
                "<= 1.25 x fastest fill")
            fills = zip(*(self.figures[f"fill {s}: {way}"] for way in ways))
            each(f"  of the fastest fill in its round, {s}", f"restore {s}", [min(f) for f in fills], 1.25)
            for way in ways:
                row(f"  {way}", ways[way], mid(f"fill {s}: {way}"), None, "ms", "")
        for s in sizes:
            row(f"restore --lazy, {s}", low(f"lazy {s}"), mid(f"lazy {s}"), 25, "ms", "<= 25 ms")
        for what, mib in self.peak.items():
            if "8 MiB" not in what:
                row(f"peak memory, {what}", mib, mib, 32, "MiB", "<= 32 MiB")
        return rows


def main():
    p = argparse.ArgumentParser(prog="scripts/bench")
    p.add_argument("--mistctl", required=True)
    p.add_argument("--tools", required=True)
    p.add_argument("--dir", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--sizes", default="8,1024,4096")
    p.add_argument("--times", action="store_true")
    p.add_argument("--peer", choices=["criu"])
    args = p.parse_args()
    if args.times:
        late.table(args)
        return
    bench = Bench(args)
    other = peer.Criu(bench) if args.peer else None
    if other and (why := other.why_not()):
        print(f"bench: no side-by-side run with {args.peer}: {why}", file=sys.stderr)
        other = None
    names = []
    before = os.getloadavg()
    for mib in map(int, args.sizes.split(",")):
        small = mib < 1024
        rounds = args.rounds * 4 if small else args.rounds
        print(f"bench: {mib} MiB, {rounds} rounds", file=sys.stderr)
        bench.size(mib, rounds, rounds)
        names.append(size_name(mib))
        if other:
            other.size(Program(bench, mib, "sleep"), names[-1], rounds)
        if mib == 1024:
            for _ in range(args.rounds):
                bench.cow(256)
    rows = bench.table()
    load = f"{before[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"{os.cpu_count()} processors, Linux {os.uname().release}, images in {args.dir}, load {load}")
    form = "{:<40} {:>9} {:>9} {:<8} {:>9} {:>6} {:<24} {}"
    print(form.format("figure", "min", "median", "", "limit", "of it", "reach", "ok?"))
    for r in rows:
        ok = {None: "", True: "yes", False: "NO"}[r["ok"]]
        limit = "" if r["limit"] is None else f"{r['limit']:.2f}"
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        print(form.format(r["figure"], f"{r['min']:.2f}", f"{r['median']:.2f}", r["unit"], limit, ratio,
                          r["reach"], ok))
    if other:
        other.table(names)
    with open(args.out, "w") as f:
        json.dump({"load": load, "rows": rows, "samples": bench.figures}, f, indent=1)
        f.write("\n")


main()
