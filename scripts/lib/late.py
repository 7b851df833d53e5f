"""The times of scripts/bench --times: how late a call ends, next to the same call left alone."""

import json
import mmap
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time

RELATIVE = (
    "poll ppoll select pselect epoll_wait epoll_pwait2 futex nanosleep clock_nanosleep sigtimedwait semtimedop "
    "recv_rcvtimeo recv_waitall_rcvtimeo send_sndtimeo accept_rcvtimeo connect_sndtimeo connect_tcp_sndtimeo "
    "readv_rcvtimeo writev_sndtimeo recvmmsg_rcvtimeo recv_high_rcvtimeo recv_shared_rcvtimeo recv_many_rcvtimeo"
).split()
ABSOLUTE = "futex_bitset clock_nanosleep_abs mq_timedreceive".split()
# Without a time-out: another thread or a child ends them, which sleeps as long.
EVENTS = (
    "read write send recv_waitall accept connect poll ppoll select epoll_wait futex sigwaitinfo pause sigsuspend semop "
    "msgrcv flock wait4 vfork"
).split()
LIMIT = 2.0


class Sleeper:
    """benches/late.c, and the page it shows its times in."""

    def __init__(self, tool, call, shown, start):
        with open(shown, "wb") as f:
            f.truncate(4096)
        with open(shown, "r+b") as f:
            self.page = mmap.mmap(f.fileno(), 4096)
        self.process = subprocess.Popen([tool, call, shown, str(start)], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, cwd="/")
        self.pid = self.process.pid

    def words(self):
        return struct.unpack_from("<8q", self.page, 0)

    def end(self):
        limit = time.monotonic() + 20
        while not self.words()[1]:
            if time.monotonic() > limit:
                raise SystemExit(f"bench: process {self.pid} does not wake")
            time.sleep(0.002)
        self.process.wait()
        while os.path.exists(f"/proc/{self.pid}"):
            time.sleep(0.001)
        began, ended, gap, wanted, result, errno, _, _ = self.words()
        return {"began": began, "ended": ended, "gap": gap, "late": (ended - began - wanted) / 1e6,
                "result": (result, errno)}


def run(args, call, way):
    """(lateness of the one that is dumped, of its twin that is left alone, whether both saw the same), ms."""
    image = os.path.join(args.dir, "late-image")
    shutil.rmtree(image, ignore_errors=True)
    tool = os.path.join(args.tools, "late")
    # In the middle of a tick of 4 ms, for both.
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 60_000_000
    start += 2_000_000 - start % 4_000_000
    one = Sleeper(tool, call, os.path.join(args.dir, "late-one"), start)
    twin = Sleeper(tool, call, os.path.join(args.dir, "late-twin"), start)
    while not one.words()[0]:
        time.sleep(0.001)
    time.sleep(0.15)

    def mistctl(*words):
        done = subprocess.run([args.mistctl, *words, "--json"], stdin=subprocess.DEVNULL, capture_output=True,
                              cwd="/", text=True)
        if done.returncode:
            raise SystemExit(f"bench: mistctl {' '.join(words)}: {done.stdout}{done.stderr}")

    if way == "go on":
        mistctl("dump", str(one.pid), "-o", image, "--tree")
    elif way == "restore":
        mistctl("dump", str(one.pid), "-o", image, "--tree", "--kill")
        one.process.wait()
        mistctl("restore", image, "--detach")
    a, b = one.end(), twin.end()
    late = a["late"] - (a["gap"] / 1e6 if way == "restore" and call not in ABSOLUTE else 0)
    # They may have begun a little apart.
    return late, b["late"], a["result"] == b["result"]


def table(args):
    rows = []
    print(f"{'late by, ms':<24} {'':>8} {'alone':>9} {'dumped':>9} {'worst':>9} {'limit':>6} ok?")
    for call in RELATIVE + ABSOLUTE + [f"{call}_event" for call in EVENTS]:
        for way in ("alone", "go on", "restore"):
            # It is saved when the call is over.
            if call == "vfork_event" and way == "restore":
                continue
            samples = [run(args, call, way) for _ in range(args.rounds)]
            more = [late - alone for late, alone, _ in samples]
            row = {
                "call": call, "way": way, "alone_ms": round(statistics.median(s[1] for s in samples), 3),
                "late_ms": round(statistics.median(s[0] for s in samples), 3),
                "more_median_ms": round(statistics.median(more), 3),
                "more_worst_ms": round(max(more, key=abs), 3), "limit_ms": LIMIT,
                "same_result": all(s[2] for s in samples), "samples": samples,
            }
            row["ok"] = row["same_result"] and abs(row["more_median_ms"]) <= LIMIT
            rows.append(row)
            print(f"{call:<24} {way:>8} {row['alone_ms']:>9.3f} {row['more_median_ms']:>+9.3f} "
                  f"{row['more_worst_ms']:>+9.3f} {LIMIT:>6.1f} {'yes' if row['ok'] else 'NO'}", flush=True)
    with open(args.out, "w") as f:
        json.dump({"load": os.getloadavg(), "rows": rows}, f, indent=1)
        f.write("\n")
    bad = [f"{r['call']} ({r['way']})" for r in rows if not r["ok"]]
    print("beyond the limit: " + ", ".join(bad) if bad else "all within the limit", file=sys.stderr)
