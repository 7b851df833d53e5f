/*
 * The messages of soak. Every one belongs to a lane: a way of sending, with a
 * tag of its own. It carries its sender's rank, and for each receiver its number
 * in that lane between the two, and its number in that lane's domain: the lanes
 * whose order among each other PVM keeps (one context, one way to be taken). Its
 * contents follow from a seed. So the receiver knows what must come next,
 * whatever it asked for.
 */
#include "soak.h"

#include <stdarg.h>

static const char *const lane_names[] = {"send", "psend", "mcast", "bcast", "context", "handler",
                                         "ack",  "done",  "empty"};

/* The head of a message; then for each receiver {rank, lane number, domain number}. */
enum { MAGIC, FROM, LANE, STYLE, SIZE, SEED, SEED2, HASH, RECEIVERS, HEAD };
enum { MAGIC_VALUE = 0x50764d21, MAX_HEAD = HEAD + 3 * MAX_TASKS };

/* Ways to pack the contents. */
enum style { BYTES, INTS, RAW_INTS, IN_PLACE, DOUBLES, TEXT, STRIDE, SHORTS, STYLES };

struct settings set;
int tids[MAX_TASKS], me, master, phase;
struct peer peers[MAX_TASKS];
char group[40];
double bytes_got;
int messages_sent;
static uint64_t random_state;
/* Sending and receiving have buffers of their own: a handler may run inside a send. */
static char *out_buffer, *in_buffer, *expected_buffer;

void make_buffers(void)
{
    random_state = (uint64_t)set.seed * 1000 + (uint64_t)me;
    /* Room for a head in front, and for STRIDE's gaps. */
    in_buffer = grab((size_t)set.max_size + sizeof(int[MAX_HEAD]) + 8);
    expected_buffer = grab((size_t)set.max_size + 8);
    out_buffer = grab(2 * (size_t)set.max_size + sizeof(int[MAX_HEAD]) + 8);
}

unsigned pick(unsigned n) { return (unsigned)(next_random(&random_state) % n); }

/* Reports and ends. */
void fault(const char *format, ...)
{
    char text[900];
    int at = snprintf(text, sizeof text, "rank %d (t%x) in phase %d: ", me, (unsigned)tids[me], phase);
    va_list args;
    va_start(args, format);
    vsnprintf(text + at, sizeof text - (size_t)at, format, args);
    va_end(args);
    fprintf(stderr, "soak: FAULT %s\n", text);
    pvm_setsbuf(pvm_mkbuf(PvmDataDefault)); /* may be inside a handler, or half way through packing */
    pvm_pkstr(text);
    pvm_send(master, TAG_FAULT);
    pvm_exit();
    exit(1);
}

static int domain_of(int lane)
{
    switch (lane) {
    case OTHER: return 1;
    case HANDLED: return 2; /* is taken when it arrives, the others when they are asked for */
    case EMPTY: return NO_DOMAIN;
    default: return 0;
    }
}

/* The contents that belong to a seed. */
static void fill(char *buffer, int size, int style, const int *head)
{
    uint64_t state = (uint64_t)(uint32_t)head[SEED] << 32 | (uint32_t)head[SEED2];
    for (int i = 0; i < size; i += 8) {
        uint64_t word = next_random(&state);
        memcpy(buffer + i, &word, size - i < 8 ? (size_t)(size - i) : 8);
    }
    if (style == TEXT)
        for (int i = 0; i < size; i++)
            if (!buffer[i])
                buffer[i] = 'x';
}

static int head_hash(const int *head)
{
    uint64_t hash = fnv(FNV_START, head, HASH * sizeof *head);
    hash = fnv(hash, head + RECEIVERS, (size_t)(1 + 3 * head[RECEIVERS] + HEAD - RECEIVERS - 1) * sizeof *head);
    return (int)(hash ^ hash >> 32);
}

/* ---- receiving -------------------------------------------------------------- */

/* Numbers of a message from src: exactly the next in its lane, and when all of its
 * domain was asked for (wild), exactly the next there too. */
static void check_order(int src, int lane, int number, int in_domain, int wild, const char *how)
{
    struct peer *p = &peers[src];
    int expected = p->next[lane], domain = domain_of(lane);
    if (number != expected)
        fault("%s: %s message from rank %d (t%x), by %s: expected number %d, got %d",
              number < expected ? "DOUBLED" : "LOST or REORDERED", lane_names[lane], src, (unsigned)tids[src], how,
              expected, number);
    p->next[lane]++;
    if (domain == NO_DOMAIN)
        return;
    int base = p->domain_base[domain];
    if (in_domain < base || in_domain >= base + WINDOW || p->came[domain][in_domain % WINDOW])
        fault("DOUBLED or LOST: %s message from rank %d, by %s: number %d in domain %d, where %d is next",
              lane_names[lane], src, how, in_domain, domain, base);
    if (wild && in_domain != base)
        fault("REORDERED or LOST: %s message from rank %d (t%x), by %s: number %d in domain %d came before %d",
              lane_names[lane], src, (unsigned)tids[src], how, in_domain, domain, base);
    p->came[domain][in_domain % WINDOW] = 1;
    while (p->came[domain][base % WINDOW])
        p->came[domain][base++ % WINDOW] = 0;
    p->domain_base[domain] = base;
}

/* Checks everything about a message, given its head and contents, and accounts for it. */
static void verify(const int *head, const char *contents, int tid, int tag, int wild, const char *how)
{
    int src = head[FROM], lane = head[LANE], size = head[SIZE], mine = 0;
    const int *to = head + HEAD;
    if (head_hash(head) != head[HASH])
        fault("DAMAGED: head of a message from t%x, tag %d, by %s", (unsigned)tid, tag, how);
    if (tag != TAG_LANE + lane || tid != tids[src])
        fault("MISATTRIBUTED: a %s message that rank %d (t%x) sent came as from t%x, tag %d, by %s", lane_names[lane],
              src, (unsigned)tids[src], (unsigned)tid, tag, how);
    while (mine < head[RECEIVERS] && to[3 * mine] != me)
        mine++;
    if (mine == head[RECEIVERS])
        fault("MISATTRIBUTED: a %s message from rank %d to rank %d came here, by %s", lane_names[lane], src, to[0], how);
    check_order(src, lane, to[3 * mine + 1], to[3 * mine + 2], wild, how);
    fill(expected_buffer, size, head[STYLE], head);
    if (memcmp(contents, expected_buffer, (size_t)size)) {
        int at = 0;
        while (contents[at] == expected_buffer[at])
            at++;
        fault("DAMAGED: %s message %d from rank %d, by %s: byte %d of %d is %02x, not %02x (style %d)",
              lane_names[lane], to[3 * mine + 1], src, how, at, size, contents[at] & 255, expected_buffer[at] & 255,
              head[STYLE]);
    }
    bytes_got += size;
    struct peer *p = &peers[src];
    if (lane == ACK) {
        p->unacked -= head[SEED] & 0xffff;
        p->unacked_blocking -= head[SEED] >> 16;
        p->unacked_bytes -= head[SEED2];
    } else if (lane == DONE) {
        p->done++;
    } else {
        p->owe++;
        p->owe_blocking += domain_of(lane) == 0;
        p->owe_bytes += size;
    }
}

static void head_is_sane(const int *head, int tid, int tag, const char *how)
{
    if (head[MAGIC] != MAGIC_VALUE || head[FROM] < 0 || head[FROM] >= set.tasks || head[LANE] < 0 ||
        head[LANE] >= EMPTY || head[STYLE] < 0 || head[STYLE] >= STYLES || head[SIZE] < 0 ||
        head[SIZE] > set.max_size || head[RECEIVERS] < 1 || head[RECEIVERS] > set.tasks)
        fault("DAMAGED: head of a message from t%x, tag %d, by %s", (unsigned)tid, tag, how);
}

/* Unpacks and checks the message in buffer mid, which is the current one. */
void accept_message(int mid, int wild, const char *how)
{
    int head[MAX_HEAD], bytes, tag, tid, size;
    check(pvm_bufinfo(mid, &bytes, &tag, &tid), "pvm_bufinfo");
    if (tag >= TAG_EMPTY && tag < TAG_EMPTY + EMPTY_TAGS) {
        int src = 0;
        while (src < set.tasks && tids[src] != tid)
            src++;
        if (src == set.tasks)
            fault("MISATTRIBUTED: an empty message from t%x, who is none of us, by %s", (unsigned)tid, how);
        if (bytes)
            fault("DAMAGED: an empty message from rank %d has %d bytes", src, bytes);
        /* Never more than a few are on their way: the nearest number with that remainder. */
        int next = peers[src].next[EMPTY], off = (tag - TAG_EMPTY - next % EMPTY_TAGS + EMPTY_TAGS) % EMPTY_TAGS;
        check_order(src, EMPTY, off < EMPTY_TAGS / 2 ? next + off : next + off - EMPTY_TAGS, 0, 0, how);
        peers[src].owe++;
        return;
    }
    check(pvm_upkint(head, HEAD, 1), "pvm_upkint");
    head_is_sane(head, tid, tag, how);
    check(pvm_upkint(head + HEAD, 3 * head[RECEIVERS], 1), "pvm_upkint");
    size = head[SIZE];
    switch (head[STYLE]) {
    case INTS:
    case RAW_INTS:
    case STRIDE: check(pvm_upkint((int *)in_buffer, size / 4, 1), "pvm_upkint"); break;
    case SHORTS: check(pvm_upkshort((short *)in_buffer, size / 2, 1), "pvm_upkshort"); break;
    case DOUBLES: check(pvm_upkdouble((double *)in_buffer, size / 8, 1), "pvm_upkdouble"); break;
    case TEXT: check(pvm_upkstr(in_buffer), "pvm_upkstr"); break;
    default: check(pvm_upkbyte(in_buffer, size, 1), "pvm_upkbyte");
    }
    verify(head, in_buffer, tid, tag, wild, how);
}

/* A psend message as pvm_precv gives it: one block of bytes. */
void accept_block(int src, const char *how)
{
    int head[MAX_HEAD], tid, tag, len, head_bytes;
    check(pvm_precv(src, TAG_LANE + PSEND, in_buffer, set.max_size + (int)sizeof head, PVM_BYTE, &tid, &tag, &len),
          "pvm_precv");
    memcpy(head, in_buffer, HEAD * sizeof *head);
    head_is_sane(head, tid, tag, how);
    head_bytes = (HEAD + 3 * head[RECEIVERS]) * (int)sizeof *head;
    memcpy(head, in_buffer, (size_t)head_bytes);
    if (len != head_bytes + head[SIZE])
        fault("DAMAGED: pvm_precv gave %d bytes from t%x, not %d", len, (unsigned)tid, head_bytes + head[SIZE]);
    verify(head, in_buffer + head_bytes, tid, tag, 0, how);
}

/* ---- sending ---------------------------------------------------------------- */

static int choose_size(int limit)
{
    int size;
    switch (pick(64)) {
    case 0: size = (int)pick((unsigned)limit + 1); break;
    case 1: case 2: case 3: size = 0; break;
    case 4: case 5: case 6: size = 4096 * (int)(1 + pick(5)) - 60 + (int)pick(120); break; /* about a fragment's */
    case 7: case 8: case 9: case 10: case 11: size = (int)pick(65536); break;
    default: size = (int)pick(2000);
    }
    return size < limit ? size : limit;
}

static int make_head(int *head, int lane, int style, int size, const int *to, int count)
{
    static const int unit[STYLES] = {[INTS] = 4, [RAW_INTS] = 4, [STRIDE] = 4, [DOUBLES] = 8, [SHORTS] = 2};
    if (style == TEXT && size > 65536)
        style = BYTES;
    if (unit[style])
        size -= size % unit[style];
    head[MAGIC] = MAGIC_VALUE;
    head[FROM] = me;
    head[LANE] = lane;
    head[STYLE] = style;
    head[SIZE] = size;
    head[SEED] = (int)next_random(&random_state);
    head[SEED2] = (int)next_random(&random_state);
    head[RECEIVERS] = count;
    for (int i = 0; i < count; i++) {
        struct peer *p = &peers[to[i]];
        head[HEAD + 3 * i] = to[i];
        head[HEAD + 3 * i + 1] = p->sent[lane]++;
        head[HEAD + 3 * i + 2] = p->domain_sent[domain_of(lane)]++;
        if (lane != ACK && lane != DONE) {
            p->unacked++;
            p->unacked_blocking += domain_of(lane) == 0;
            p->unacked_bytes += size;
            messages_sent++;
        }
    }
    head[HASH] = head_hash(head);
    return size;
}

/* Packs head and contents in the head's style into a fresh buffer. */
static void pack(int *head, char *buffer)
{
    static const int encoding[STYLES] = {[RAW_INTS] = PvmDataRaw, [STRIDE] = PvmDataRaw, [IN_PLACE] = PvmDataInPlace};
    int size = head[SIZE], style = head[STYLE];
    check(pvm_initsend(encoding[style]), "pvm_initsend");
    check(pvm_pkint(head, HEAD + 3 * head[RECEIVERS], 1), "pvm_pkint");
    fill(buffer, size, style, head);
    switch (style) {
    case INTS:
    case RAW_INTS: check(pvm_pkint((int *)buffer, size / 4, 1), "pvm_pkint"); break;
    case STRIDE: /* every other int of an array */
        for (int i = size / 4 - 1; i >= 0; i--)
            memcpy(buffer + 8 * (size_t)i, buffer + 4 * (size_t)i, 4);
        check(pvm_pkint((int *)buffer, size / 4, 2), "pvm_pkint");
        break;
    case SHORTS: check(pvm_pkshort((short *)buffer, size / 2, 1), "pvm_pkshort"); break;
    case DOUBLES: check(pvm_pkdouble((double *)buffer, size / 8, 1), "pvm_pkdouble"); break;
    case TEXT:
        buffer[size] = 0;
        check(pvm_pkstr(buffer), "pvm_pkstr");
        break;
    default: check(pvm_pkbyte(buffer, size, 1), "pvm_pkbyte");
    }
}

/* Sends one message in a lane to one receiver, or some. */
void send_message(int lane, const int *to, int count, int limit)
{
    int head[MAX_HEAD], list[MAX_TASKS], old = 0;
    int style = lane == PSEND ? BYTES : (int)pick(STYLES);
    int size = make_head(head, lane, style, limit ? choose_size(limit) : 0, to, count);
    if (lane == PSEND) {
        int head_bytes = (HEAD + 3 * count) * (int)sizeof *head;
        memcpy(out_buffer, head, (size_t)head_bytes);
        fill(out_buffer + head_bytes, size, style, head);
        check(pvm_psend(tids[to[0]], TAG_LANE + lane, out_buffer, head_bytes + size, PVM_BYTE), "pvm_psend");
        return;
    }
    pack(head, out_buffer);
    if (lane == OTHER)
        old = pvm_setcontext(set.context);
    if (lane == MCAST) {
        for (int i = 0; i < count; i++)
            list[i] = tids[to[i]];
        check(pvm_mcast(list, count, TAG_LANE + lane), "pvm_mcast");
    } else if (lane == BCAST) {
        check(pvm_bcast(group, TAG_LANE + lane), "pvm_bcast");
    } else {
        check(pvm_send(tids[to[0]], TAG_LANE + lane), "pvm_send");
    }
    if (lane == OTHER)
        pvm_setcontext(old);
}

/* Tells those who wait for it what has been received. */
void pay_debts(void)
{
    for (int i = 0; i < set.tasks; i++) {
        struct peer *p = &peers[i];
        int head[MAX_HEAD];
        if (!p->owe)
            continue;
        make_head(head, ACK, BYTES, 0, &i, 1);
        head[SEED] = p->owe | p->owe_blocking << 16;
        head[SEED2] = p->owe_bytes;
        head[HASH] = head_hash(head);
        /* Before the call: a handler that runs inside it makes new debts. */
        p->owe = p->owe_blocking = p->owe_bytes = 0;
        pack(head, out_buffer);
        check(pvm_send(tids[i], TAG_LANE + ACK), "pvm_send");
    }
}

void send_empty(int to)
{
    check(pvm_initsend(PvmDataDefault), "pvm_initsend");
    peers[to].unacked++;
    messages_sent++;
    check(pvm_send(tids[to], TAG_EMPTY + peers[to].sent[EMPTY]++ % EMPTY_TAGS), "pvm_send");
}
