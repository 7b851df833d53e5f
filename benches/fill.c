/* The yardsticks of scripts/bench, each printed in milliseconds.
 *
 *     fill write FILE MIB    a plain write of incompressible memory to a new FILE, 1 MiB at a time, and fsync
 *     fill fill FILE MIB     ways to fill as much fresh anonymous memory from FILE (in the page cache) with two threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef UFFDIO_MOVE
struct uffdio_move { uint64_t dst, src, len, mode; int64_t move; };
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
#define HUGE (2ul << 20)
#define THREADS 2

static int fd, uffd;
static char *source;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void read_all(char *to, size_t len, size_t at)
{
	while (len) {
		ssize_t n = pread(fd, to, len, at);
		if (n <= 0)
			die("pread");
		to += n, at += n, len -= n;
	}
}

enum way { READ, POPULATE, COPY, STAGED, MOVE, WAYS };
static const char *const names[WAYS] = {
	"pread, 4 KiB pages", "populate + pread, huge pages", "UFFDIO_COPY from the cache", "pread, then UFFDIO_COPY",
	"pread to a huge page, then UFFDIO_MOVE",
};

struct part {
	enum way way;
	char *to;
	size_t at, len;
};

static void copy(char *to, char *from, size_t len)
{
	struct uffdio_copy c = { (uintptr_t)to, (uintptr_t)from, len, 0, 0 };

	if (ioctl(uffd, UFFDIO_COPY, &c))
		die("UFFDIO_COPY");
}

static void move(char *to, char *from, size_t len)
{
	struct uffdio_move m = { (uintptr_t)to, (uintptr_t)from, len, 0, 0 };

	while (ioctl(uffd, UFFDIO_MOVE, &m)) {
		if (errno != EAGAIN)
			die("UFFDIO_MOVE");
		if (m.move > 0)
			m.dst += m.move, m.src += m.move, m.len -= m.move;
		m.move = 0;
	}
}

static void *run(void *arg)
{
	struct part *p = arg;
	size_t step = p->way == COPY ? HUGE : 256 << 10;
	char *stage;

	switch (p->way) {
	case POPULATE:
		if (madvise(p->to + p->at, p->len, MADV_POPULATE_WRITE))
			die("MADV_POPULATE_WRITE");
		/* fall through */
	case READ:
		read_all(p->to + p->at, p->len, p->at);
		return 0;
	case MOVE:
		/* Eight fresh huge pages at a time; those moved away are made anew. */
		stage = mmap(0, 9 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		stage = (char *)(((uintptr_t)stage + HUGE - 1) & ~(HUGE - 1));
		madvise(stage, 8 * HUGE, MADV_HUGEPAGE);
		for (size_t at = p->at, end = p->at + p->len, n; at < end; at += n) {
			n = end - at < 8 * HUGE ? end - at : 8 * HUGE;
			read_all(stage, n, at);
			move(p->to + at, stage, n);
		}
		return 0;
	default:
		stage = malloc(step);
		for (size_t at = p->at, end = p->at + p->len; at < end; at += step) {
			if (p->way == STAGED)
				read_all(stage, step, at);
			copy(p->to + at, p->way == STAGED ? stage : source + at, step);
		}
		free(stage);
		return 0;
	}
}

static double fill(enum way way, size_t len)
{
	char *m = mmap(0, len + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *to = (char *)(((uintptr_t)m + HUGE - 1) & ~(HUGE - 1));
	struct part parts[THREADS];
	pthread_t threads[THREADS];

	if (m == MAP_FAILED)
		die("mmap");
	if (way == POPULATE)
		madvise(to, len, MADV_HUGEPAGE);
	double start = now();
	if (way >= COPY) {
		struct uffdio_register r = { { (uintptr_t)to, len }, UFFDIO_REGISTER_MODE_MISSING, 0 };
		if (ioctl(uffd, UFFDIO_REGISTER, &r))
			die("UFFDIO_REGISTER");
	}
	for (int i = 0; i < THREADS; i++) {
		parts[i] = (struct part){ way, to, len / THREADS * i, len / THREADS };
		pthread_create(&threads[i], 0, run, &parts[i]);
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], 0);
	double took = now() - start;
	if (memcmp(to, source, 4096) || memcmp(to + len - 4096, source + len - 4096, 4096))
		die("the memory is not what was in the file");
	munmap(m, len + HUGE);
	return took;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: fill write|fork|fill FILE MIB\n");
		return 2;
	}
	size_t len = strtoull(argv[3], 0, 10) << 20;
	if (!strcmp(argv[1], "write")) {
		uint64_t *m = malloc(len), x = 0x9e3779b97f4a7c15;
		for (size_t i = 0; i < len / 8; i++) {
			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			m[i] = x;
		}
		double start = now();
		fd = open(argv[2], O_WRONLY | O_CREAT | O_EXCL, 0600);
		for (size_t at = 0; at < len; at += 1 << 20)
			if (write(fd, (char *)m + at, 1 << 20) != 1 << 20)
				die("write");
		if (fsync(fd))
			die("fsync");
		printf("{\"plain write\": %.3f}\n", now() - start);
		return 0;
	}
	if (!strcmp(argv[1], "fork")) {
		char *m = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (size_t at = 0; m != MAP_FAILED && at < len; at += 4096)
			m[at] = 1;
		double start = now();
		pid_t child = syscall(SYS_fork);
		if (!child)
			_exit(0);
		double took = now() - start;
		if (child < 0)
			die("fork");
		waitpid(child, 0, 0);
		printf("{\"plain fork\": %.3f}\n", took);
		return 0;
	}
	fd = open(argv[2], O_RDONLY);
	source = mmap(0, len, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
	struct uffdio_api api = { UFFD_API, 0, 0 };
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0 || source == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("setting up");
	for (int w = 0; w < WAYS; w++)
		printf("%s\"%s\": %.3f", w ? ", " : "{", names[w], fill(w, len));
	printf("}\n");
}
