"""Writes transactions to an SQLite database in WAL mode (its index is a shared mapping, its
locks are fcntl locks), and reads them back through a second connection, until the file `go` is
there (or $STEPS transactions)."""
import os
import sqlite3
import time

steps = int(os.environ.get("STEPS", 0))
writer = sqlite3.connect("db", isolation_level=None)
assert writer.execute("pragma journal_mode=wal").fetchone() == ("wal",)
writer.execute("create table t(id integer primary key, k int, v text)")
writer.execute("create index k on t(k)")
reader = sqlite3.connect("db")
count = 0
progress = open("progress", "w")
while count != steps if steps else not os.path.exists("go"):
    count += 1
    writer.execute("begin immediate")
    for i in range(10):
        writer.execute(
            "insert into t(k, v) values (?, ?)",
            (count * 7919 % 1009, f"{count}/{i} " * 20),
        )
    if count % 3 == 0:
        writer.execute("update t set v = v || 'x' where k = ?", (count * 31 % 1009,))
    # In the middle of a transaction, with its locks held.
    time.sleep(0.002)
    writer.execute("commit")
    (rows,) = reader.execute("select count(*) from t").fetchone()
    assert rows == count * 10, f"{rows} rows after {count} transactions"
    if count % 100 == 0:
        writer.execute("pragma wal_checkpoint")
    print(count, file=progress, flush=True)
reader.close()
writer.close()
with open("count", "w") as out:
    print(count, file=out)
