"""A growing list and dict with a running checksum, until the file `go` is there (or for
$STEPS steps); then everything is checked again, and `count` and `out` tell the end."""
import hashlib
import os
import time

steps = int(os.environ.get("STEPS", 0))
digest = hashlib.sha256()
items, index = [], {}


def add(n):
    text = f"{n}:{n * n % 9973}".encode() * 3
    items.append(text)
    index[n] = len(items) - 1
    digest.update(text)


# Enough that there is something to restore lazily.
for n in range(200_000):
    add(n)
count = 0
progress = open("progress", "w")
while count != steps if steps else not os.path.exists("go"):
    count += 1
    for _ in range(20):
        add(len(items))
    # What was put away long ago.
    old = items[index[count * 7919 % len(items)]]
    digest.update(old)
    if count % 5 == 0:
        # Fresh memory, given back at once.
        assert bytearray(1_000_000).count(0) == 1_000_000, "fresh memory is not zero"
        print(count, digest.hexdigest(), file=progress, flush=True)
    time.sleep(0.002)

again = hashlib.sha256()
for n, text in enumerate(items):
    assert text == f"{n}:{n * n % 9973}".encode() * 3, f"item {n} is {text!r}"
    assert index[n] == n, f"index {n} is {index[n]}"
    again.update(text)
with open("out", "w") as out:
    print(len(items), len(index), digest.hexdigest(), again.hexdigest(), file=out)
with open("count", "w") as out:
    print(count, file=out)
