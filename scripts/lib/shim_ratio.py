"""What scripts/bench-shim has measured, as one JSON object. Arguments: the directory, library, route, largest size.

Result files are plain.N and with.N of round N, with lines "bytes megabits seconds" and "cpu user system".
"""

import json
import math
import os
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


def main():
    work, library, route, largest = sys.argv[1:]
    count = sum(name.startswith("plain.") for name in os.listdir(work))
    rounds = [[read(f"{work}/{side}.{i + 1}") for side in ("plain", "with")] for i in range(count)]
    sizes = sorted(rounds[0][0][0])
    best = [{s: min(r[side][0][s] for r in rounds) for s in sizes} for side in (0, 1)]
    result = {"library": library, "route": route, "rounds": count}

    def figure(name, chosen, shown, power):
        if not chosen:
            return
        plain, with_it = (mean(shown(s, best[side][s]) for s in chosen) for side in (0, 1))
        paired = [mean((r[1][0][s] / r[0][0][s]) ** power for s in chosen) for r in rounds]
        result[name] = {
            "plain": round(plain, 2), "with": round(with_it, 2), "ratio": round(with_it / plain, 4), **middle(paired),
        }

    figure("latency_us", [s for s in sizes if s <= 64], lambda s, t: t * 1e6, 1)
    figure("bandwidth_mbit", [s for s in sizes if s >= int(largest) / 4], lambda s, t: s * 8 / t / 1e6, -1)
    plain, with_it = (min(r[side][1] for r in rounds) for side in (0, 1))
    result["sender_cpu_s"] = {
        "plain": plain, "with": with_it, "ratio": round(with_it / plain, 4),
        **middle([r[1][1] / r[0][1] for r in rounds]),
    }
    print(json.dumps(result, indent=1))


main()
