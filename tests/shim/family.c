/*
 * A PVM task with much memory, a second thread and a child process. To each message of tag 1 it answers, with tag 2,
 * "ok" if all of them are well, or what is wrong. family LOG: it notes each round in that file.
 */
#include <pthread.h>
#include <pvm3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS (20 << 20 >> 3)

static uint64_t *memory;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static int asked, answered;

static void *thread(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&lock);
	for (;;) {
		while (asked == answered)
			pthread_cond_wait(&turn, &lock);
		answered = asked;
		pthread_cond_broadcast(&turn);
	}
}

static const char *check(int to, int from, pid_t child, int round)
{
	int back = -1;
	for (size_t i = 0; i < WORDS; i++)
		if (memory[i] != (i ^ 0x5eed) * 0x9e3779b97f4a7c15ull)
			return "memory";
	pthread_mutex_lock(&lock);
	asked = round;
	pthread_cond_broadcast(&turn);
	while (answered != round)
		pthread_cond_wait(&turn, &lock);
	pthread_mutex_unlock(&lock);
	if (write(to, &round, sizeof round) != sizeof round || read(from, &back, sizeof back) != sizeof back)
		return "no child";
	if (back != round + 1)
		return "child";
	if (kill(child, 0) || waitpid(child, 0, WNOHANG) != 0)
		return "child's id";
	return "ok";
}

int main(int argc, char **argv)
{
	FILE *log = argc > 1 ? fopen(argv[1], "a") : 0;
	pthread_t other;
	int to[2], from[2], number;
	pid_t child;
	pvm_mytid();
	memory = malloc(WORDS * 8);
	for (size_t i = 0; i < WORDS; i++)
		memory[i] = (i ^ 0x5eed) * 0x9e3779b97f4a7c15ull;
	if (pipe(to) || pipe(from) || (child = fork()) < 0)
		return 1;
	if (!child) {
		/* Until its parent has ended. */
		close(to[1]);
		while (read(to[0], &number, sizeof number) == sizeof number) {
			number++;
			if (write(from[1], &number, sizeof number) < 0)
				break;
		}
		_exit(0);
	}
	close(to[0]);
	pthread_create(&other, 0, thread, 0);
	for (int round = 1;; round++) {
		int len, tag, src;
		const char *said;
		pvm_bufinfo(pvm_recv(-1, 1), &len, &tag, &src);
		said = check(to[1], from[0], child, round);
		if (!log || fprintf(log, "round %d\n", round) < 0 || fflush(log))
			said = "log";
		printf("round %d: %s\n", round, said);
		fflush(stdout);
		pvm_initsend(PvmDataDefault);
		pvm_pkstr((char *)said);
		pvm_send(src, 2);
	}
}
