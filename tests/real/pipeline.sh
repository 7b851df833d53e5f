#!/bin/bash
# A pipeline of children that come and go, until the file `go` is there (or for $STEPS lines).
set -e -o pipefail
lines() {
    n=0
    while if [ -n "$STEPS" ]; then [ $n -lt "$STEPS" ]; else [ ! -e go ]; fi; do
        n=$((n + 1))
        echo "line $n $((n * n % 9973))"
        # A child, too, and time for others.
        if [ $((n % 50)) = 0 ]; then word=$(printf %08x $n | rev); echo "also $n $word"; sleep 0.02; echo $n >>progress; fi
    done
    echo $n >count
}
lines | awk '{ sum += $3; print sum, $0; fflush() }' | sed -u 's/line/LINE/' | tee copy |
    gzip -1 | gzip -d | sha256sum >out
sha256sum <copy | cmp - out
wc -l <copy >>out
