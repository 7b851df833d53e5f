# An array that grows, until the file `go` is there (or for STEPS steps).
BEGIN {
    steps = ENVIRON["STEPS"] + 0
    while (steps ? count < steps : (getline line < "go") < 0) {
        count++
        for (i = 0; i < 200; i++) {
            n++
            seen[n] = (n * 7919) % 99991 "-" n
            sum = (sum * 31 + length(seen[int(n / 2) + 1]) + n) % 1000003
        }
        print count, sum > "progress"
        fflush("progress")
        system("sleep 0.01")
    }
    for (i = 1; i <= n; i++)
        if (seen[i] != (i * 7919) % 99991 "-" i) {
            print "item " i " is " seen[i] > "/dev/stderr"
            exit 1
        }
    print n, sum > "out"
    print count > "count"
}
