#!/bin/bash
# A shell that feeds transactions to sqlite3 through a pipe, until the file `go` is there (or
# $STEPS transactions).
set -e
transactions() {
    echo 'create table t(id integer primary key, k int, v text); create index k on t(k);'
    n=0
    while if [ -n "$STEPS" ]; then [ $n -lt "$STEPS" ]; else [ ! -e go ]; fi; do
        n=$((n + 1))
        echo 'begin;'
        for i in 1 2 3 4 5; do
            echo "insert into t(k, v) values ($((n * 7919 % 1009)), '$n/$i' || hex(zeroblob(100)));"
        done
        echo "update t set v = v || 'x' where k = $((n * 31 % 1009));"
        echo 'commit;'
        echo 'select max(id) from t;'
        if [ $((n % 10)) = 0 ]; then sleep 0.02; fi
    done
    echo $n >count
}
transactions | sqlite3 -batch -bail db >progress
