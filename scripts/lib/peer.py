"""The same programs, dumped and restored by CRIU, for scripts/bench --peer criu."""

import os
import shutil
import statistics
import subprocess


class Criu:
    """criu(8), as an administrator would call it."""

    name = "criu"

    def __init__(self, bench):
        self.bench = bench
        self.images = os.path.join(bench.dir, "criu")

    def why_not(self):
        """None where it works, or why it does not."""
        if not shutil.which("criu"):
            return "it is not installed (apt install criu)"
        done = subprocess.run(["criu", "check"], capture_output=True, text=True)
        if done.returncode == 0:
            return None
        version = subprocess.run(["criu", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        told = "; ".join(e.split("): ")[-1] for e in errors if "exited" not in e)
        return f"{version} does not work on Linux {os.uname().release}: {told or 'criu check failed'}"

    def run(self, *args):
        """Wall time in ms, and when it began."""
        start = self.bench.now()
        done = subprocess.run(["criu", *args, "-D", self.images, "-o", "log", "--shell-job"], capture_output=True)
        if done.returncode:
            with open(os.path.join(self.images, "log"), errors="replace") as f:
                errors = [line.strip() for line in f if "Error" in line]
            raise SystemExit(f"bench: criu {args[0]}: " + "; ".join(errors[-3:]))
        return (self.bench.now() - start) / 1e6, start

    def size(self, program, name, rounds):
        """The figures of `program`; it has been killed at the end."""
        for _ in range(rounds):
            shutil.rmtree(self.images, ignore_errors=True)
            os.mkdir(self.images)
            program.clear_gap()
            took, _ = self.run("dump", "-t", str(program.pid), "--leave-running")
            program.await_beat(self.bench.now())
            self.bench.note(f"criu gap {name}", program.gap)
            self.bench.note(f"criu dump {name}", took)
        program.kill()
        for _ in range(rounds):
            _, start = self.run("restore", "-d")
            program.await_beat(self.bench.now())
            self.bench.note(f"criu restore {name}", (program.woke - start) / 1e6)
            program.kill()
        shutil.rmtree(self.images, ignore_errors=True)

    def table(self, sizes):
        """Both side by side: medians of what the program saw, and of whole runs."""
        form = "{:<40} {:>12} {:>12} {:>8}"
        print(form.format("medians, ms", "mistctl", "criu", "ratio"))
        mid = {k: statistics.median(v) for k, v in self.bench.figures.items()}
        for name in sizes:
            for figure in ("gap", "dump", "restore"):
                ours, theirs = mid[f"{figure} {name}"], mid[f"criu {figure} {name}"]
                what = {"gap": "longest gap the program saw"}.get(figure, figure)
                print(form.format(f"{what}, {name}", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}"))
