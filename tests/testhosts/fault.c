/*
 * Preloaded into soak's tasks, this makes the network lie once: the 20th
 * message of the plain lane that a task sends is lost, doubled, sent after the
 * next one, sent to somebody else, or one of its bytes is changed on the way, as
 * MIST_FAULT says (lose, double, swap, stray, damage). soak must say so.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pvm3.h>
#include <stdlib.h>
#include <string.h>

enum { PLAIN = 100, WHEN = 20 };

static const char *fault(void)
{
    const char *name = getenv("MIST_FAULT");
    return name ? name : "";
}

int pvm_send(int tid, int tag)
{
    static int (*send)(int, int);
    static int count, held, held_tid, last_tid;
    int result;
    if (!send)
        *(void **)&send = dlsym(RTLD_NEXT, "pvm_send");
    if (held && tag == PLAIN && tid == held_tid) {
        int buffer = held;
        held = 0;
        result = send(tid, tag);
        pvm_freebuf(pvm_setsbuf(buffer));
        send(tid, tag);
        return result;
    }
    if (tag != PLAIN)
        return send(tid, tag);
    if (++count == WHEN) {
        if (!strcmp(fault(), "lose"))
            return 0;
        if (!strcmp(fault(), "double"))
            send(tid, tag);
        if (!strcmp(fault(), "stray") && last_tid != tid)
            return send(last_tid, tag);
        if (!strcmp(fault(), "stray"))
            count--;
        if (!strcmp(fault(), "swap")) {
            held = pvm_setsbuf(0);
            held_tid = tid;
            return 0;
        }
    }
    last_tid = tid;
    return send(tid, tag);
}

/* Contents in bytes, not soak's heads, which are ints. */
int pvm_pkbyte(char *data, int count, int stride)
{
    static int (*pack)(char *, int, int);
    static int done;
    if (!pack)
        *(void **)&pack = dlsym(RTLD_NEXT, "pvm_pkbyte");
    if (!done && count > 100 && !strcmp(fault(), "damage")) {
        done = 1;
        data[count / 2] ^= 4;
    }
    return pack(data, count, stride);
}
