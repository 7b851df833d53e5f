/*
 * Fills memory, the last of it to be wiped in children; says "ready", waits for "go", forks, and says "forked". The child
 * looks at all of it: "child" holds how many pages are not as they should be. Ends with 0 if its own pages are, and if
 * /proc has shown its environment whole before it forked.
 */
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 384 << 8, WIPED = 512, WORDS = 512 };

static uint64_t mark(size_t page)
{
	return (page + 1) * 0x9e3779b97f4a7c15;
}

static size_t environment(void)
{
	static char text[1 << 20];
	FILE *f = fopen("/proc/self/environ", "r");
	size_t n = f ? fread(text, 1, sizeof text, f) : 0;

	if (f)
		fclose(f);
	return n;
}

int main(void)
{
	size_t size = (size_t)(PAGES + WIPED) * 4096, wrong = 0;
	uint64_t *m = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	FILE *f;

	if (m == MAP_FAILED || madvise(m + (size_t)PAGES * WORDS, (size_t)WIPED * 4096, MADV_WIPEONFORK))
		return 1;
	for (size_t i = 0; i < PAGES + WIPED; i++)
		m[i * WORDS] = mark(i);
	size_t before = environment();
	fclose(fopen("ready", "w"));
	while (access("go", F_OK)) {
		struct timespec nap = { 0, 1000000 };
		nanosleep(&nap, 0);
	}
	if (environment() != before)
		return 3;
	if (!fork()) {
		fclose(fopen("forked", "w"));
		for (size_t i = PAGES + WIPED; i-- > 0;)
			wrong += m[i * WORDS] != (i < PAGES ? mark(i) : 0);
		f = fopen("child.new", "w");
		fprintf(f, "%zu", wrong);
		fclose(f);
		rename("child.new", "child");
		_exit(0);
	}
	wait(0);
	for (size_t i = 0; i < PAGES + WIPED; i++)
		if (m[i * WORDS] != mark(i))
			return 2;
	return 0;
}
