"""What scripts/bench-shim has measured, as one JSON object. Arguments: the directory, library, route, largest size.

Result files are plain.N and with.N of round N, short.plain.N and short.with.N of pair N, with lines "bytes megabits
seconds" and "cpu user system"; count.2 and count.12 are callgrind's of so many trials of benches/self.c.
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
    few, many = (instructions(f"{work}/count.{n}") for n in (2, 12))
    each = {name: (count - few.get(name, 0)) / 2000 for name, count in many.items()}
    return {"library": round(each.pop("library.so")), "beside": round(sum(each.values()))}


def main():
    work, library, route, largest = sys.argv[1:]

    def runs(kind):
        count = sum(name.startswith(f"{kind}plain.") for name in os.listdir(work))
        return [[read(f"{work}/{kind}{side}.{i + 1}") for side in ("plain", "with")] for i in range(count)]

    rounds, pairs = runs(""), runs("short.")
    result = {"library": library, "route": route, "rounds": len(rounds), "pairs": len(pairs)}
    result["instructions"] = counted(work)

    def figure(name, rounds, wanted, shown, power):
        chosen = [s for s in sorted(rounds[0][0][0]) if wanted(s)]
        best = [{s: min(r[side][0][s] for r in rounds) for s in chosen} for side in (0, 1)]
        plain, with_it = (mean(shown(s, best[side][s]) for s in chosen) for side in (0, 1))
        paired = [mean((r[1][0][s] / r[0][0][s]) ** power for s in chosen) for r in rounds]
        result[name] = {
            "plain": round(plain, 2), "with": round(with_it, 2), "ratio": round(with_it / plain, 4), **middle(paired),
        }

    figure("latency_us", pairs, lambda s: s <= 64, lambda s, t: t * 1e6, 1)
    figure("bandwidth_mbit", rounds, lambda s: s >= int(largest) / 4, lambda s, t: s * 8 / t / 1e6, -1)
    plain, with_it = (min(r[side][1] for r in rounds) for side in (0, 1))
    result["sender_cpu_s"] = {
        "plain": plain, "with": with_it, "ratio": round(with_it / plain, 4),
        **middle([r[1][1] / r[0][1] for r in rounds]),
    }
    print(json.dumps(result, indent=1))


main()
