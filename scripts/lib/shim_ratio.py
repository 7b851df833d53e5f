"""What scripts/bench-shim has measured, as one JSON object. Arguments: the directory, library, route, largest size, round
trips of a trial.

Result files are plain.N and with.N of round N, with lines "bytes megabits seconds" and "cpu user system"; turns.N of set
N, with lines "side microseconds" of every trial in order; count.2 and count.12 are callgrind's of so many trials of
benches/self.c, moved.2 and moved.12 on a host where a task has moved.
"""

import json
import math
import os
import re
import statistics
import sys


def read(path):
    times, cpu = {}, None
    for words in map(str.split, open(path)):
        if words[0] == "cpu":
            cpu = float(words[1]) + float(words[2])
        else:
            times[int(words[0])] = float(words[2])
    return times, cpu


def mean(numbers):
    return math.exp(statistics.fmean(map(math.log, numbers)))


def middle(ratios):
    """The median of the rounds, and between which two rounds the true one lies with 95 % (order statistics)."""
    ratios, n = sorted(ratios), len(ratios)
    tail, out = 0, 0
    while out < n // 2 and (tail := tail + math.comb(n, out) / 2**n) <= 0.025:
        out += 1
    return {
        "median": round(statistics.median(ratios), 4),
        "range_95": [round(ratios[max(out - 1, 0)], 4), round(ratios[n - 1 - max(out - 1, 0)], 4)],
    }


def instructions(path):
    """Instructions by object file (callgrind's format: what a call costs stands behind the call, and is not ours)."""
    names, counts, here, call = {}, {}, None, False
    for line in open(path):
        named = re.match(r"c?ob=\((\d+)\)(?: (.*))?", line)
        if named:
            if named[2]:
                names[named[1]] = os.path.basename(named[2].strip())
            if line.startswith("ob="):
                here = names[named[1]]
        elif line.startswith("calls="):
            call = True
        elif re.match(r"[-+*\d]", line) and here:
            if not call:
                counts[here] = counts.get(here, 0) + int(line.split()[1])
            call = False
    return counts


def counted(work):
    """Of one message, from the difference of 10 trials of 200 messages."""

    def each(kind):
        few, many = (instructions(f"{work}/{kind}.{n}") for n in (2, 12))
        return {name: (count - few.get(name, 0)) / 2000 for name, count in many.items()}

    first, moved = each("count"), each("moved")
    library = round(first.pop("library.so"))
    return {"library": library, "after_a_move": round(moved["library.so"]), "beside": round(sum(first.values()))}


def turns(path):
    """Times of each side's trials but the first, which is for warming up, in us; the times of a turn stand together."""
    sides = {"plain": [], "with": [], "control": []}
    for side, time in map(str.split, open(path)):
        if time != "waits":
            sides[side].append(float(time))
    return list(zip(*(sides[side][1:] for side in sides), strict=True))


def latency(sets, repeat):
    """Of `with` and `control` next to the trial of `plain` in the same turn."""
    trials = [trial for one in sets for trial in one]

    def figure(side):
        return {
            "us": round(statistics.median(trial[side] for trial in trials) / (2 * repeat), 2),
            "ratio": round(statistics.median(trial[side] / trial[0] for trial in trials), 4),
            **middle([statistics.median(trial[side] / trial[0] for trial in one) for one in sets]),
        }

    with_it = figure(1)
    plain = round(statistics.median(trial[0] for trial in trials) / (2 * repeat), 2)
    return {"plain": plain, "with": with_it.pop("us"), "trials": len(trials), **with_it, "control": figure(2)}


def main():
    work, library, route, largest, repeat = sys.argv[1:]

    def files(kind):
        return [f"{work}/{kind}.{i + 1}" for i in range(sum(name.startswith(kind + ".") for name in os.listdir(work)))]

    rounds = [[read(path) for path in both] for both in zip(files("plain"), files("with"))]
    sets = [turns(path) for path in files("turns")]
    result = {"library": library, "route": route, "rounds": len(rounds), "sets": len(sets)}
    result["instructions"] = counted(work)
    result["latency_us"] = latency(sets, int(repeat))

    sizes = [size for size in rounds[0][0][0] if size >= int(largest) / 4]
    best = [mean(size * 8 / min(r[side][0][size] for r in rounds) / 1e6 for size in sizes) for side in (0, 1)]
    result["bandwidth_mbit"] = {
        "plain": round(best[0], 2), "with": round(best[1], 2), "ratio": round(best[1] / best[0], 4),
        **middle([mean(r[0][0][size] / r[1][0][size] for size in sizes) for r in rounds]),
    }
    plain, with_it = (min(r[side][1] for r in rounds) for side in (0, 1))
    result["sender_cpu_s"] = {
        "plain": plain, "with": with_it, "ratio": round(with_it / plain, 4),
        **middle([r[1][1] / r[0][1] for r in rounds]),
    }
    print(json.dumps(result, indent=1))


main()
