/*
 * What the parts of soak share: soak.c is the master, which starts the tasks and
 * passes judgement; soak_task.c is a task, which talks at random; soak_message.c
 * writes, reads and checks its messages.
 */
#ifndef SOAK_H
#define SOAK_H

#include "example.h"

enum { MAX_TASKS = 64 };

/* Tags between master and tasks, and of the collective part of a phase. */
enum {
    TAG_START = 1, /* master: settings, all tids */
    TAG_PHASE,     /* task: has finished a phase */
    TAG_GO,        /* master: next phase, or stop */
    TAG_FINAL,     /* task: what it sent to and got from each */
    TAG_FAULT,     /* task: text */
    TAG_ENDED,     /* pvmd: a task has ended */
    TAG_ROUTE,     /* among tasks, before the first phase */
    TAG_SHIFT_RIGHT,
    TAG_SHIFT_LEFT,
    TAG_REDUCE,
    TAG_GATHER,
    TAG_SCATTER,
    TAG_LANE = 100,   /* + lane */
    TAG_EMPTY = 1000, /* + sequence number modulo EMPTY_TAGS */
    EMPTY_TAGS = 1000
};

struct settings {
    int tasks;
    int rank;  /* of the task that gets them */
    int steps; /* per phase */
    int max_size;
    int stall; /* seconds without progress that count as a loss */
    int direct;
    int context; /* the second one */
    int seed;
};
enum { SETTINGS = sizeof(struct settings) / sizeof(int) };

void run_task(void);

/* ---- of a task ---- */

enum lane {
    PACKED,  /* pvm_send, all encodings and types */
    PSEND,   /* pvm_psend; pvm_precv among the ways to receive it */
    MCAST,   /* pvm_mcast to some */
    BCAST,   /* pvm_bcast to the group, whose members are all tasks */
    OTHER,   /* in the second context */
    HANDLED, /* for a message handler */
    ACK,     /* how many of the receiver's messages were received, and their bytes */
    DONE,    /* the sender has taken its steps of this phase, and all it sent was received */
    EMPTY,   /* no contents: the number is in the tag, so they have no domain */
    LANES
};

enum { DOMAINS = 3, NO_DOMAIN = -1, WINDOW = 4096 };

/* What is known of traffic with one other task. */
struct peer {
    int sent[LANES], next[LANES];         /* numbers given; numbers expected */
    int domain_sent[DOMAINS];             /* likewise, per domain */
    int domain_base[DOMAINS];             /* all below have come */
    unsigned char came[DOMAINS][WINDOW];  /* those above, by number modulo WINDOW */
    int unacked, unacked_blocking;        /* messages it has not confirmed; of domain 0 */
    int unacked_bytes;
    int owe, owe_blocking, owe_bytes;     /* what it has not been told we received */
    int done;                             /* phases it has finished */
};

extern struct settings set;
extern int tids[MAX_TASKS], me, master, phase;
extern struct peer peers[MAX_TASKS];
extern char group[40];
extern double bytes_got;
extern int messages_sent;

unsigned pick(unsigned n);
void make_buffers(void);
void fault(const char *format, ...);
void accept_message(int mid, int wild, const char *how);
void accept_block(int src, const char *how);
void send_message(int lane, const int *to, int count, int limit);
void send_empty(int to);
void pay_debts(void);

#endif
