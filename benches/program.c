/* The program that scripts/bench dumps and restores: MIB of incompressible memory, and a page shared with
 * the bench that shows when it runs, and the longest gap in that.
 *
 *     program MIB FILE sleep      wakes every 100 us and shows the time
 *     program MIB FILE spin       shows the time without a pause
 *     program MIB FILE write      writes a word to every page, over and over, and notes how long each round took
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 250 };

/* 4 KiB, read by scripts/bench. Times are CLOCK_MONOTONIC in ns. */
struct shown {
	volatile uint64_t now;
	volatile uint64_t gap;
	volatile uint64_t rounds;
	volatile uint64_t woke; /* when the longest gap ended */
	struct { volatile uint64_t start, end; } round[ROUNDS];
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: program MIB FILE sleep|spin|write\n");
		return 2;
	}
	size_t words = strtoull(argv[1], 0, 10) << 17, page = 4096 / 8;
	int fd = open(argv[2], O_RDWR);
	struct shown *s = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	uint64_t *m = mmap(0, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (fd < 0 || s == MAP_FAILED || m == MAP_FAILED) {
		perror("program");
		return 1;
	}
	/* Incompressible (xorshift). */
	uint64_t x = 0x9e3779b97f4a7c15;
	for (size_t i = 0; i < words; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		m[i] = x;
	}
	char mode = argv[3][1]; /* sLeep, sPin, wRite */
	struct timespec nap = { 0, 100000 };
	for (uint64_t last = now();;) {
		if (mode == 'l')
			nanosleep(&nap, 0);
		if (mode == 'r') {
			uint64_t start = now(), n = s->rounds;
			for (size_t i = 0; i < words; i += page)
				m[i]++;
			s->round[n % ROUNDS].start = start;
			s->round[n % ROUNDS].end = now();
			s->rounds = n + 1;
		}
		uint64_t t = now();
		if (t - last > s->gap) {
			s->gap = t - last;
			s->woke = t;
		}
		s->now = last = t;
	}
}
