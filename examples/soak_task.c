/*
 * A task of soak: takes random steps, sending and receiving in all of PVM's ways,
 * and meets the others after each phase.
 */
#include "soak.h"

#include <sys/select.h>

static int on_handled(int mid)
{
    accept_message(mid, 1, "a handler");
    return 0;
}

/* pvm_recvf: takes what the built-in function would for (tid, -1), in its own words. */
static int my_match(int mid, int tid, int tag)
{
    struct pvmminfo info;
    (void)tag;
    return pvm_getminfo(mid, &info) >= 0 && info.ctx == pvm_getcontext() && (tid == -1 || info.src == tid) &&
           info.tag >= TAG_LANE;
}

/* ---- random steps ------------------------------------------------------------ */

/* Not too much may be on its way to anyone: pvmd keeps it all in memory. */
static int may_send(void)
{
    int bytes = 0;
    for (int i = 0; i < set.tasks; i++) {
        if (peers[i].unacked >= 32)
            return 0;
        bytes += peers[i].unacked_bytes;
    }
    return bytes <= 2 * set.max_size;
}

static void random_send(void)
{
    static const char lanes[] = {PACKED, PACKED, PACKED, PSEND, PSEND, MCAST, BCAST, OTHER, HANDLED, EMPTY};
    int lane = lanes[pick(sizeof lanes)], to[MAX_TASKS], count = 0, limit = set.max_size;
    to[0] = (int)pick((unsigned)set.tasks); /* itself, too */
    if (lane == EMPTY) {
        send_empty(to[0]);
        return;
    }
    if (lane == MCAST || lane == BCAST) {
        limit /= set.tasks;
        for (int i = 0; i < set.tasks; i++)
            if (i != me && (lane == BCAST || pick(2)))
                to[count++] = i;
        if (!count)
            return;
    } else {
        count = 1;
    }
    send_message(lane, to, count, limit);
}

/* In the second context: one look. */
static int look_there(void)
{
    int old = pvm_setcontext(set.context), got = check(pvm_nrecv(-1, -1), "pvm_nrecv");
    pvm_setcontext(old);
    if (got)
        accept_message(got, 1, "pvm_nrecv in the second context");
    return got;
}

/* One attempt to receive, some way or other. */
static void random_receive(void)
{
    struct timeval wait = {0, (int)pick(20000)};
    int src = (int)pick((unsigned)set.tasks), lane = (int)pick(EMPTY), got = 0, waiting = 0;
    int from = pick(2) ? tids[src] : -1, tag = TAG_LANE + lane;
    pay_debts();
    switch (pick(10)) {
    case 0:
        if ((got = check(pvm_nrecv(from, -1), "pvm_nrecv")))
            accept_message(got, 1, "pvm_nrecv");
        break;
    case 1:
        if ((got = check(pvm_trecv(-1, -1, &wait), "pvm_trecv")))
            accept_message(got, 1, "pvm_trecv");
        break;
    case 2:
    case 3:
        /* Only when an answer must come; the partner stays until it has come (see finish_phase). */
        for (int i = 0; i < set.tasks; i++)
            waiting += peers[i].unacked_blocking;
        if (waiting)
            accept_message(check(pvm_recv(-1, -1), "pvm_recv"), 1, "pvm_recv");
        break;
    case 4:
        if (check(pvm_probe(from, tag), "pvm_probe"))
            accept_message(check(pvm_recv(from, tag), "pvm_recv"), 0, "pvm_probe and pvm_recv");
        break;
    case 5:
        if (check(pvm_probe(from, TAG_LANE + PSEND), "pvm_probe"))
            accept_block(from, "pvm_probe and pvm_precv");
        break;
    case 6:
        if ((got = check(pvm_trecv(tids[src], tag, &wait), "pvm_trecv")))
            accept_message(got, 0, "pvm_trecv of one lane");
        break;
    case 7:
        pvm_recvf(my_match);
        got = check(pvm_nrecv(from, -1), "pvm_nrecv");
        pvm_recvf(NULL); /* the built-in one again */
        if (got)
            accept_message(got, 1, "pvm_nrecv with pvm_recvf");
        break;
    case 8: look_there(); break;
    default: {
        /* A program that has other descriptors to watch selects on PVM's own among them. */
        fd_set readable;
        int *fds, count = check(pvm_getfds(&fds), "pvm_getfds"), top = 0;
        FD_ZERO(&readable);
        for (int i = 0; i < count; i++) {
            FD_SET(fds[i], &readable);
            top = fds[i] > top ? fds[i] : top;
        }
        select(top + 1, &readable, NULL, NULL, &wait);
        if ((got = check(pvm_nrecv(-1, -1), "pvm_nrecv")))
            accept_message(got, 1, "select and pvm_nrecv");
    }
    }
}

/* ---- phases ------------------------------------------------------------------ */

static int unacked(void)
{
    int sum = 0;
    for (int i = 0; i < set.tasks; i++)
        sum += peers[i].unacked;
    return sum;
}

static int all_done(void)
{
    for (int i = 0; i < set.tasks; i++)
        if (i != me && peers[i].done <= phase)
            return 0;
    return 1;
}

/* Receives until the condition holds; a stall is a loss. */
static void receive_until(int (*condition)(void), const char *what)
{
    int idle = 0; /* tenths of a second */
    for (;;) {
        struct timeval tenth = {0, 100000};
        int got;
        pay_debts();
        if (condition())
            return;
        got = look_there();
        if (!got && (got = check(pvm_trecv(-1, -1, &tenth), "pvm_trecv")))
            accept_message(got, 1, "pvm_trecv");
        idle = got ? 0 : idle + 1;
        if (idle < set.stall * 9)
            continue;
        char list[400] = "";
        for (int i = 0, at = 0; i < set.tasks && at < (int)sizeof list - 40; i++)
            if (peers[i].unacked || (i != me && peers[i].done <= phase))
                at += snprintf(list + at, sizeof list - (size_t)at, " %d (%d unconfirmed, %s)", i, peers[i].unacked,
                               peers[i].done <= phase ? "at work" : "done");
        fault("LOST: waited %d s for %s; ranks%s", set.stall * 9 / 10, what, list);
    }
}

/*
 * A direct route is made by the first pvm_send that wants it; a multicast takes
 * it if it is there. What goes one way may overtake what went the other, so all
 * routes are made before anything is counted.
 */
static void make_routes(void)
{
    check(pvm_setopt(PvmRoute, PvmRouteDirect), "pvm_setopt");
    for (int i = 0; i < set.tasks; i++) {
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_send(tids[i], TAG_ROUTE), "pvm_send");
    }
    for (int i = 0; i < set.tasks; i++)
        check(pvm_recv(tids[i], TAG_ROUTE), "pvm_recv");
}

static int none_unacked(void) { return unacked() == 0; }

/*
 * Everyone stays until everyone's messages have been received and confirmed:
 * who waits in pvm_recv for an answer gets it, and afterwards nothing is on its
 * way.
 */
static void finish_phase(void)
{
    receive_until(none_unacked, "confirmations");
    for (int i = 0; i < set.tasks; i++)
        if (i != me)
            send_message(DONE, &i, 1, 0);
    receive_until(all_done, "others to finish");
}

/* Blocking calls whose partner is certain: round the ring both ways, and the group's. */
static void meet(void)
{
    int n = set.tasks, right = tids[(me + 1) % n], left = tids[(me + n - 1) % n];
    int value = me + phase, got = -1, instance, *all, sum = phase;
    check(pvm_barrier(group, n), "pvm_barrier");
    check(pvm_psend(right, TAG_SHIFT_RIGHT, &value, 1, PVM_INT), "pvm_psend");
    check(pvm_precv(left, TAG_SHIFT_RIGHT, &got, 1, PVM_INT, NULL, NULL, NULL), "pvm_precv");
    if (got != (me + n - 1) % n + phase)
        fault("the ring's left neighbour said %d in phase %d", got, phase);
    /* In place means where it stands: given by value it is a copy that is gone when it is sent. */
    check(pvm_packf("%+ %1d", PvmDataInPlace, &value), "pvm_packf");
    check(pvm_send(left, TAG_SHIFT_LEFT), "pvm_send");
    check(pvm_recv(right, TAG_SHIFT_LEFT), "pvm_recv");
    check(pvm_unpackf("%d", &got), "pvm_unpackf");
    if (got != (me + 1) % n + phase)
        fault("the ring's right neighbour said %d in phase %d", got, phase);

    instance = check(pvm_getinst(group, tids[me]), "pvm_getinst");
    all = grab((size_t)n * sizeof *all);
    check(pvm_reduce(PvmSum, &sum, 1, PVM_INT, TAG_REDUCE, group, 0), "pvm_reduce");
    if (instance == 0 && sum != n * phase)
        fault("the sum over all is %d, not %d", sum, n * phase);
    value = instance * 1000 + phase;
    check(pvm_gather(all, &value, 1, PVM_INT, TAG_GATHER, group, 0), "pvm_gather");
    for (int i = 0; instance == 0 && i < n; i++)
        if (all[i] != i * 1000 + phase)
            fault("gathered %d from instance %d in phase %d", all[i], i, phase);
    for (int i = 0; i < n; i++)
        all[i] = i + 7 * phase;
    check(pvm_scatter(&got, all, 1, PVM_INT, TAG_SCATTER, group, 0), "pvm_scatter");
    if (got != instance + 7 * phase)
        fault("instance %d was scattered %d in phase %d", instance, got, phase);
    free(all);
}

void run_task(void)
{
    int stop = 0, sent[MAX_TASKS], got[MAX_TASKS];
    master = pvm_parent();
    check(pvm_recv(master, TAG_START), "pvm_recv");
    check(pvm_upkint((int *)&set, SETTINGS, 1), "pvm_upkint");
    check(pvm_upkint(tids, set.tasks, 1), "pvm_upkint");
    me = set.rank;
    make_buffers();
    if (set.direct)
        make_routes();
    check(pvm_addmhf(-1, TAG_LANE + HANDLED, pvm_getcontext(), on_handled), "pvm_addmhf");
    snprintf(group, sizeof group, "soak.%x", (unsigned)master);
    check(pvm_joingroup(group), "pvm_joingroup");
    check(pvm_barrier(group, set.tasks), "pvm_barrier");

    for (phase = 0; !stop; phase++) {
        messages_sent = 0;
        for (int step = 0; step < set.steps; step++)
            if (pick(5) < 3 && may_send())
                random_send();
            else
                random_receive();
        finish_phase();
        meet();
        check(pvm_initsend(PvmDataDefault), "pvm_initsend");
        check(pvm_pkint(&messages_sent, 1, 1), "pvm_pkint");
        check(pvm_send(master, TAG_PHASE), "pvm_send");
        check(pvm_recv(master, TAG_GO), "pvm_recv");
        check(pvm_upkint(&stop, 1, 1), "pvm_upkint");
    }

    for (int i = 0; i < set.tasks; i++) {
        sent[i] = got[i] = 0;
        for (int lane = 0; lane < LANES; lane++) {
            sent[i] += peers[i].sent[lane];
            got[i] += peers[i].next[lane];
        }
    }
    check(pvm_initsend(PvmDataDefault), "pvm_initsend");
    check(pvm_pkint(sent, set.tasks, 1), "pvm_pkint");
    check(pvm_pkint(got, set.tasks, 1), "pvm_pkint");
    check(pvm_pkdouble(&bytes_got, 1, 1), "pvm_pkdouble");
    check(pvm_send(master, TAG_FINAL), "pvm_send");
    check(pvm_barrier(group, set.tasks), "pvm_barrier");
    check(pvm_lvgroup(group), "pvm_lvgroup");
    pvm_exit();
}
