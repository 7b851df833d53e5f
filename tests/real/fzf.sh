#!/bin/bash
# Lines for fzf, a program in Go (its collector, its threads), which finds the best matches among
# all that it has read when the file `go` is there (or after $STEPS lines).
set -e -o pipefail
lines() {
    n=0
    while if [ -n "$STEPS" ]; then [ $n -lt "$STEPS" ]; else [ ! -e go ]; fi; do
        n=$((n + 1))
        echo "$((n * n % 99991)) line $n $((n * 7919 % 9973)) of many"
        if [ $((n % 200)) = 0 ]; then sleep 0.02; echo $n >>progress; fi
    done
    echo $n >count
}
{ seq -f '%.0f of the first ones' 1 200000; lines; } | fzf --filter '77 1' | tee found | sha256sum >out
wc -l <found >>out
