/* PVM tasks that scripts/bench-moves moves, or that stand by meanwhile.
 *
 *     mover memory KIB random|text MB_PER_S FILE   KIB of memory, written to at a rate
 *     mover pair SELF HOST FILE                    exchanges messages with a task on HOST
 *
 * A line of FILE: CLOCK_REALTIME in us, and for "memory" a gap of more than a millisecond in its running (us); for
 * "pair" the exchanges of the last tenth of a second and the longest of them (us).
 */
#include <fcntl.h>
#include <pvm3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PING = 1 };

static uint64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static int log_file;

static void note(uint64_t a, uint64_t b)
{
	char line[96];
	int n = snprintf(line, sizeof line, "%llu %llu %llu\n", (unsigned long long)now(CLOCK_REALTIME),
			 (unsigned long long)a, (unsigned long long)b);

	if (write(log_file, line, n) != n)
		exit(1);
}

static int memory(size_t kib, int text, double rate)
{
	size_t words = kib << 7, at = 0;
	uint64_t *m = mmap(0, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t x = 0x9e3779b97f4a7c15;

	if (m == MAP_FAILED)
		return 1;
	for (size_t i = 0; i < words; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		m[i] = text ? i / 64 : x;
	}
	note(0, 0);
	for (uint64_t last = now(CLOCK_MONOTONIC), done = last;;) {
		struct timespec nap = { 0, 200000 };
		nanosleep(&nap, 0);
		uint64_t t = now(CLOCK_MONOTONIC);
		if (t - last > 1000)
			note(t - last, 0);
		last = t;
		/* Whole pages, one after the other; every one is written anew. */
		for (; rate > 0 && (t - done) * rate >= 4096; done += 4096 / rate) {
			for (int i = 0; i < 512; i++, at = (at + 1) % words) {
				x ^= x << 13, x ^= x >> 7, x ^= x << 17;
				m[at] = text ? m[at] + 1 : x;
			}
		}
	}
}

static _Noreturn void echo(void)
{
	for (;;) {
		int id = pvm_recv(-1, PING), from;

		pvm_bufinfo(id, 0, 0, &from);
		pvm_initsend(PvmDataRaw);
		pvm_send(from, PING);
	}
}

static int pair(char *self, char *host)
{
	int other;
	uint64_t from = now(CLOCK_MONOTONIC), count = 0, longest = 0;

	if (pvm_spawn(self, 0, PvmTaskHost, host, 1, &other) != 1)
		return 1;
	for (;;) {
		uint64_t a = now(CLOCK_MONOTONIC), b;

		pvm_initsend(PvmDataRaw);
		pvm_send(other, PING);
		pvm_recv(other, PING);
		b = now(CLOCK_MONOTONIC);
		count++;
		if (b - a > longest)
			longest = b - a;
		if (b - from < 100000)
			continue;
		note(count, longest);
		from = b, count = longest = 0;
	}
}

int main(int argc, char **argv)
{
	int tid = pvm_mytid();

	if (tid < 0)
		return 1;
	if (argc == 1)
		echo();
	log_file = open(argv[argc - 1], O_WRONLY | O_APPEND | O_CREAT, 0644);
	if (log_file < 0)
		return 1;
	printf("%x\n", tid);
	fflush(stdout);
	if (argc == 6 && !strcmp(argv[1], "memory"))
		return memory(strtoull(argv[2], 0, 10), *argv[3] == 't', atof(argv[4]));
	if (argc == 5 && !strcmp(argv[1], "pair"))
		return pair(argv[2], argv[3]);
	fprintf(stderr, "usage: see the head of benches/mover.c\n");
	return 2;
}
