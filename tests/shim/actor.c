/*
 * A PVM task that does what it is told: a command per line, an answer per command ("= ...").
 * actor [FIFO-IN FIFO-OUT]; without them it reads stdin and writes stdout.
 * Tids are written in hex.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <pvm3.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <sys/wait.h>
#include <unistd.h>

extern int pvmmytid, pvmudpmtu, pvmfrgsiz;
extern int pvmreset(int, int, char *, int);

static FILE *in, *out;
static char said[65536];
static int hooks, jump;
static jmp_buf back;
static int (*old_match)(int, int, int);

static void say(const char *format, ...)
{
	va_list ap;
	size_t n = strlen(said);
	va_start(ap, format);
	vsnprintf(said + n, sizeof said - n, format, ap);
	va_end(ap);
}

static char *hoard;
static size_t hoarded;

/* writes the pages, or counts those that are not as they were written */
static int hoard_pages(int write)
{
	size_t at, wrong = 0;
	for (at = 0; at + 4096 <= hoarded; at += 4096) {
		size_t *page = (size_t *)(hoard + at), mark = (at + 1) * 0x9e3779b97f4a7c15u;
		if (write)
			page[0] = page[511] = mark;
		wrong += page[0] != mark || page[511] != mark;
	}
	return wrong != 0;
}

/* a message's body as text: strings were packed with pvm_pkstr */
static void show(int mid)
{
	int len = 0, tag = 0, src = 0;
	struct pvmminfo info = {0};
	char text[4096] = "";
	if (mid <= 0) {
		say("%d", mid);
		return;
	}
	pvm_bufinfo(mid, &len, &tag, &src);
	pvm_getminfo(mid, &info);
	if (pvm_upkstr(text) < 0)
		strcpy(text, "?");
	say("from %x tag %d text %s info %x", src, tag, text, info.src);
}

static int handler(int mid)
{
	int len, tag, src;
	pvm_bufinfo(mid, &len, &tag, &src);
	say("[handler from %x tag %d raw %x", src, tag, pvmmytid);
	say(" mytid %x", pvm_mytid());
	say(" collector %x] ", pvm_getopt(PvmOutputTid));
	if (jump == 2)
		longjmp(back, 1);
	return 0;
}

static int exits(int mid)
{
	int tid;
	pvm_upkint(&tid, 1, 1);
	say("[exit of %x] ", tid);
	return 0;
}

#define NOOP ((int)0x80030004)
#define CTX_TC 0x7ffff

static void nothing(int signal)
{
	(void)signal;
}

static int noop(int mid)
{
	int len, tag, src, value;
	pvm_bufinfo(mid, &len, &tag, &src);
	say("[noop from %x", src);
	for (; len > 0; len -= 4) {
		pvm_upkint(&value, 1, 1);
		say(" %x", value);
	}
	say("] ");
	return 0;
}

static int echo(int mid)
{
	int len, tag, src;
	char text[4096] = "";
	pvm_bufinfo(mid, &len, &tag, &src);
	pvm_upkstr(text);
	pvm_initsend(PvmDataDefault);
	pvm_pkstr(text);
	pvm_send(src, tag + 1);
	return 0;
}

/* works until the next line comes in */
static int works(int mid)
{
	char line[256];
	say("[%s] ", fgets(line, sizeof line, in) ? "worked" : "end");
	return 0;
}

static int match(int mid, int tid, int tag)
{
	int len, t, src;
	pvm_bufinfo(mid, &len, &t, &src);
	hooks++;
	say("[match %x raw %x] ", src, pvmmytid);
	if (jump == 1) {
		jump = 0;
		longjmp(back, 1);
	}
	return old_match(mid, tid, tag);
}

#define ARG(i) ((i) < argc ? argv[i] : "0")
#define TID(i) ((int)strtoul(ARG(i), 0, 16))
#define NUM(i) ((int)strtol(ARG(i), 0, 0))

static void pack(const char *text)
{
	pvm_initsend(PvmDataDefault);
	pvm_pkstr((char *)text);
}

static int run(int argc, char **argv)
{
	const char *c = argv[0];
	int i, n, cc, *list, ints[64];
	struct pvmtaskinfo *tasks;
	struct pvmmboxinfo *boxes;
	struct timeval time, delta;

	if (!strcmp(c, "mytid"))
		say("%x", pvm_mytid());
	else if (!strcmp(c, "clock")) {
		struct timespec now;
		clock_gettime(CLOCK_MONOTONIC, &now);
		say("%ld", (long)now.tv_sec);
	} else if (!strcmp(c, "raw"))
		say("%x", pvmmytid);
	else if (!strcmp(c, "hoard")) { /* so many MiB of memory; every page differs */
		hoarded = (size_t)NUM(1) << 20;
		hoard = malloc(hoarded);
		hoard_pages(1);
	} else if (!strcmp(c, "hoarded"))
		say(hoard_pages(0) ? "bad" : "good");
	else if (!strcmp(c, "signals_itself")) /* with the id that the C library keeps */
		say("%d", pthread_kill(pthread_self(), 0) || raise(SIGCONT));
	else if (!strcmp(c, "pid"))
		say("%d", getpid());
	else if (!strcmp(c, "parent"))
		say("%x", pvm_parent());
	else if (!strcmp(c, "siblings")) {
		n = pvm_siblings(&list);
		for (i = 0; i < n; i++)
			say("%x ", list[i]);
	} else if (!strcmp(c, "host"))
		say("%x", pvm_tidtohost(TID(1)));
	else if (!strcmp(c, "send")) {
		pack(ARG(3));
		say("%d", pvm_send(TID(1), NUM(2)));
	} else if (!strcmp(c, "fail")) { /* has pvmd take a host for dead */
		int order[] = {8, TID(1)};
		pvm_tickle(2, order, &n, ints);
		say("%d", n > 0 ? ints[0] : -1);
	} else if (!strcmp(c, "psend"))
		say("%d", pvm_psend(TID(1), NUM(2), ARG(3), strlen(ARG(3)) + 1, PVM_BYTE));
	else if (!strcmp(c, "big")) {
		char *p = calloc(1, NUM(3));
		pvm_initsend(PvmDataRaw);
		pvm_pkstr("big");
		pvm_pkbyte(p, NUM(3), 1);
		say("%d", pvm_send(TID(1), NUM(2)));
		free(p);
	} else if (!strcmp(c, "stream")) {
		pack("stream");
		for (i = 0; i < NUM(3); i++)
			cc = pvm_send(TID(1), NUM(2));
		say("%d", cc);
	} else if (!strcmp(c, "mcast")) {
		for (n = 0; n + 3 < argc; n++)
			ints[n] = TID(n + 3);
		pack(ARG(2));
		say("%d", pvm_mcast(ints, n, NUM(1)));
	} else if (!strcmp(c, "recv"))
		show(pvm_recv(TID(1), NUM(2)));
	else if (!strcmp(c, "nrecv"))
		show(pvm_nrecv(TID(1), NUM(2)));
	else if (!strcmp(c, "trecv")) {
		time.tv_sec = NUM(3) / 1000;
		time.tv_usec = NUM(3) % 1000 * 1000;
		show(pvm_trecv(TID(1), NUM(2), &time));
	} else if (!strcmp(c, "probe")) {
		n = pvm_probe(TID(1), NUM(2));
		say("%s", n > 0 ? "yes" : "no");
	} else if (!strcmp(c, "precv")) {
		char text[256] = "";
		int src = 0, tag = 0, len = 0;
		cc = pvm_precv(TID(1), NUM(2), text, sizeof text, PVM_BYTE, &src, &tag, &len);
		say("%d from %x tag %d text %s", cc, src, tag, text);
	} else if (!strcmp(c, "notice")) {
		n = pvm_recv(-1, NUM(1));
		int len, tag, src;
		pvm_bufinfo(n, &len, &tag, &src);
		for (i = 0; i < len / 4; i++) {
			pvm_upkint(&cc, 1, 1);
			say("%x ", cc);
		}
	} else if (!strcmp(c, "nnotice")) {
		n = pvm_nrecv(-1, NUM(1));
		if (n > 0)
			pvm_upkint(&cc, 1, 1), say("%x", cc);
		else
			say("none");
	} else if (!strcmp(c, "tasks")) {
		cc = pvm_tasks(argc > 1 ? TID(1) : 0, &n, &tasks);
		say("%d:", cc);
		for (i = 0; cc >= 0 && i < n; i++)
			say(" %x/%x/%x/%s", tasks[i].ti_tid, tasks[i].ti_ptid, tasks[i].ti_host, tasks[i].ti_a_out);
	} else if (!strcmp(c, "pstat"))
		say("%d", pvm_pstat(TID(1)));
	else if (!strcmp(c, "kill"))
		say("%d", pvm_kill(TID(1)));
	else if (!strcmp(c, "sendsig"))
		say("%d", pvm_sendsig(TID(1), NUM(2)));
	else if (!strcmp(c, "notify")) {
		for (n = 0; n + 3 < argc; n++)
			ints[n] = TID(n + 3);
		say("%d", pvm_notify(NUM(1), NUM(2), n, ints));
	} else if (!strcmp(c, "spawn")) {
		/* spawn COUNT FILE ARGS... */
		n = pvm_spawn(ARG(2), argv + 3, PvmTaskDefault, 0, NUM(1), ints);
		say("%d:", n);
		for (i = 0; i < n; i++)
			say(" %x", ints[i]);
	} else if (!strcmp(c, "spawnat")) {
		/* spawnat HOST FILE ARGS... */
		n = pvm_spawn(ARG(2), argv + 3, PvmTaskHost, argv[1], 1, ints);
		say("%d: %x", n, ints[0]);
	} else if (!strcmp(c, "addhost")) {
		cc = pvm_addhosts((char *[]){ARG(1)}, 1, &n);
		say("%d: %d", cc, n > 0);
	} else if (!strcmp(c, "catchout"))
		say("%d", pvm_catchout(out));
	else if (!strcmp(c, "showtids"))
		say("%d", pvm_setopt(PvmShowTids, NUM(1)));
	else if (!strcmp(c, "getopt"))
		say("%x", pvm_getopt(NUM(1)));
	else if (!strcmp(c, "setopt"))
		say("%x", pvm_setopt(NUM(1), TID(2)));
	else if (!strcmp(c, "put")) {
		pack(ARG(2));
		say("%d", pvm_putinfo(ARG(1), pvm_getsbuf(), NUM(3)));
	} else if (!strcmp(c, "get"))
		show(pvm_recvinfo(ARG(1), NUM(2), NUM(3)));
	else if (!strcmp(c, "del"))
		say("%d", pvm_delinfo(ARG(1), NUM(2), PvmMboxDefault));
	else if (!strcmp(c, "insert"))
		say("%d", pvm_insert(ARG(1), -1, TID(2)));
	else if (!strcmp(c, "lookup")) {
		n = 0;
		cc = pvm_lookup(ARG(1), -1, &n);
		say("%d %x", cc, n);
	} else if (!strcmp(c, "boxes")) {
		cc = pvm_getmboxinfo("", &n, &boxes);
		for (i = 0; cc >= 0 && i < n; i++)
			if (!strcmp(boxes[i].mi_name, ARG(1)))
				for (cc = 0; cc < boxes[i].mi_nentries; cc++)
					say("%x ", boxes[i].mi_owners[cc]);
	} else if (!strcmp(c, "boxflags")) {
		cc = pvm_getmboxinfo("", &n, &boxes);
		for (i = 0; cc >= 0 && i < n; i++)
			if (!strcmp(boxes[i].mi_name, ARG(1)))
				for (cc = 0; cc < boxes[i].mi_nentries; cc++)
					say("%d/%x ", boxes[i].mi_indices[cc], boxes[i].mi_flags[cc]);
	} else if (!strcmp(c, "noresets")) {
		pvm_getnoresets(&list, &n);
		for (i = 0; i < n; i++)
			say("%x ", list[i]);
	} else if (!strcmp(c, "reset"))
		say("%d", pvmreset(pvm_mytid(), 1, 0, 0));
	else if (!strcmp(c, "handler"))
		say("%d", pvm_addmhf(TID(1), NUM(2), 0, handler) >= 0);
	else if (!strcmp(c, "works"))
		say("%d", pvm_addmhf(-1, NUM(1), 0, works) >= 0);
	else if (!strcmp(c, "echo"))
		say("%d", pvm_addmhf(-1, NUM(1), 0, echo) >= 0);
	else if (!strcmp(c, "recvf")) {
		if (NUM(1)) {
			old_match = (int (*)(int, int, int))pvm_recvf(match);
			say("%d", old_match != 0 && old_match != match);
		} else
			say("%d", (int (*)(int, int, int))pvm_recvf(0) == match);
	} else if (!strcmp(c, "jump")) {
		jump = NUM(1);
		if (!setjmp(back))
			pvm_recv(TID(2), NUM(3));
		jump = 0;
		say("jumped raw %x", pvmmytid);
	} else if (!strcmp(c, "forward")) {
		/* forward FROM TAG TO TAG: the message inside another one */
		n = pvm_recv(TID(1), NUM(2));
		pvm_initsend(PvmDataDefault);
		pvm_pkmesg(n);
		say("%d", pvm_send(TID(3), NUM(4)));
	} else if (!strcmp(c, "unpack")) {
		pvm_recv(TID(1), NUM(2));
		n = pvm_upkmesg();
		pvm_setrbuf(n);
		show(n);
	} else if (!strcmp(c, "context"))
		say("%d", pvm_setcontext(NUM(1)));
	else if (!strcmp(c, "newcontext"))
		say("%x", pvm_newcontext());
	else if (!strcmp(c, "freecontext"))
		say("%d", pvm_freecontext(TID(1)));
	else if (!strcmp(c, "handles")) /* a signal, and does nothing */
		say("%d", signal(NUM(1), nothing) == SIG_ERR);
	else if (!strcmp(c, "blocks")) { /* a signal; 0: none */
		sigset_t set;
		sigemptyset(&set);
		if (NUM(1))
			sigaddset(&set, NUM(1));
		say("%d", sigprocmask(SIG_BLOCK, &set, 0));
	} else if (!strcmp(c, "minfo")) {
		struct pvmminfo info;
		n = pvm_recv(TID(1), NUM(2));
		pvm_getminfo(n, &info);
		info.tag++;
		cc = pvm_setminfo(n, &info);
		say("%d ", cc);
		show(n);
	} else if (!strcmp(c, "hoster"))
		say("%d", pvm_reg_hoster());
	else if (!strcmp(c, "hostsync"))
		say("%d", pvm_hostsync(TID(1), &time, &delta));
	else if (!strcmp(c, "perror")) {
		fflush(stderr);
		dup2(fileno(out), 2);
		say("%d", pvm_perror(ARG(1)));
	} else if (!strcmp(c, "fork")) {
		n = fork();
		if (!n)
			execlp("sh", "sh", "-c", "exit 3", (char *)0);
		waitpid(n, &cc, 0);
		say("%d", WEXITSTATUS(cc));
	} else if (!strcmp(c, "child")) {
		n = fork();
		while (!n)
			pause();
		say("%d", n);
	} else if (!strcmp(c, "reap"))
		say("%d", wait(0));
	else if (!strcmp(c, "open")) {
		/* what leads outside: a namespace, a process, and a connection to that address */
		struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(22)};
		inet_pton(AF_INET, ARG(1), &to.sin_addr);
		cc = socket(AF_INET, SOCK_STREAM, 0);
		n = open("/proc/self/ns/net", O_RDONLY);
		i = syscall(SYS_pidfd_open, getppid(), 0);
		say("%d %d %d %d", connect(cc, (void *)&to, sizeof to), cc, n, i);
	} else if (!strcmp(c, "entangle")) {
		/* a terminal of somebody else's session, and a descriptor that nobody has read yet: what to close, whom to end */
		char control[CMSG_SPACE(sizeof(int))] = "", byte = 0;
		struct iovec bytes = {&byte, 1};
		struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		int pair[2], master = posix_openpt(O_RDWR | O_NOCTTY);
		grantpt(master);
		unlockpt(master);
		int ready[2];
		if (pipe(ready))
			return 0;
		n = fork();
		if (!n) {
			setsid();
			cc = open(ptsname(master), O_RDWR);
			close(master);
			cc = write(ready[1], "", 1);
			for (;;)
				pause();
		}
		cc = read(ready[0], &byte, 1);
		close(ready[0]);
		close(ready[1]);
		socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
		i = open("/proc/self/ns/uts", O_RDONLY);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(rights), &i, sizeof i);
		sendmsg(pair[0], &message, 0);
		close(i);
		say("%d %d %d %d", n, master, pair[0], pair[1]);
	} else if (!strcmp(c, "getfork")) {
		/* as soon as that entry is in the mailbox, a child */
		pvm_recvinfo(ARG(1), 0, NUM(2));
		n = fork();
		while (!n)
			pause();
		say("%d", n);
	} else if (!strcmp(c, "hold"))
		say("%d", open(ARG(1), argc > 2 ? O_RDONLY : O_RDWR));
	else if (!strcmp(c, "close")) {
		for (i = 1; i < argc; i++)
			close(NUM(i));
		say("ok");
	} else if (!strcmp(c, "fds"))
		say("%d", pvm_getfds(&list));
	else if (!strcmp(c, "exits"))
		say("%d", pvm_addmhf(-1, NUM(1), 0, exits) >= 0);
	else if (!strcmp(c, "noops")) {
		/* instead of libpvm's own handler */
		pvm_delmhf(3);
		say("%d", pvm_addmhf(-1, NOOP, CTX_TC, noop) >= 0);
	} else if (!strcmp(c, "nudge")) {
		n = pvm_setopt(PvmResvTids, 1);
		cc = pvm_setcontext(CTX_TC);
		pvm_initsend(PvmDataDefault);
		say("%d", pvm_send(TID(1), NOOP));
		pvm_setcontext(cc);
		pvm_setopt(PvmResvTids, n);
	} else if (!strcmp(c, "errno")) {
		errno = 123;
		pvm_setrbuf(0);
		cc = pvm_getopt(PvmRoute);
		say("%d", errno);
	} else if (!strcmp(c, "errnosend")) {
		pack("text");
		errno = 123;
		cc = pvm_send(TID(1), NUM(2));
		n = errno;
		say("%d %d", cc, n);
	} else if (!strcmp(c, "setenv"))
		say("%d", setenv(ARG(1), ARG(2), 1));
	else if (!strcmp(c, "sizes"))
		say("%d %d", pvmudpmtu, pvmfrgsiz);
	else if (!strcmp(c, "setsizes")) {
		pvmudpmtu = NUM(1);
		pvmfrgsiz = NUM(2);
		say("ok");
	} else if (!strcmp(c, "added")) {
		/* of every host, or so many times */
		say("%d", pvm_notify(PvmHostAdd, NUM(1), argc > 2 ? NUM(2) : -1, (int *)0));
	} else if (!strcmp(c, "burst")) {
		/* burst NAME FLAGS TO TAG: as soon as that entry is in the mailbox, lines and a message of many fragments */
		static char lines[60001], bytes[12000];
		memset(lines, '.', sizeof lines - 1);
		for (i = 0; i < 60; i++) {
			n = sprintf(lines + 1000 * i, "%d", i);
			lines[1000 * i + n] = ' ';
			lines[1000 * i + 999] = '\n';
		}
		pvm_recvinfo(ARG(1), 0, NUM(2));
		fputs(lines, stdout);
		fflush(stdout);
		pvm_initsend(PvmDataRaw);
		pvm_pkstr("burst");
		pvm_pkbyte(bytes, sizeof bytes, 1);
		say("%d", pvm_send(TID(3), NUM(4)));
	} else if (!strcmp(c, "getenv"))
		say("%s", getenv(ARG(1)) ? getenv(ARG(1)) : "-");
	else if (!strcmp(c, "print")) {
		printf("%s\n", ARG(1));
		fflush(stdout);
		say("ok");
	} else if (!strcmp(c, "count")) {
		/* count N MICROSECONDS: so many lines, one at a time, without a word to PVM */
		for (i = 0; i < NUM(1); i++) {
			printf("%d\n", i);
			fflush(stdout);
			usleep(NUM(2));
		}
		say("ok");
	} else if (!strcmp(c, "exit"))
		say("%d", pvm_exit());
	else if (!strcmp(c, "last")) {
		/* still in a buffer when the program ends */
		printf("%s\n", ARG(1));
		return 0;
	} else if (!strcmp(c, "status")) {
		/* ends with this one, without a word to PVM */
		fprintf(out, "=\n");
		fflush(out);
		_exit(NUM(1));
	} else if (!strcmp(c, "quit"))
		return 0;
	else
		say("what is %s?", c);
	return 1;
}

int main(int argc, char **argv)
{
	static char line[65536];
	char *words[64];
	int more = 1;
	in = argc > 2 ? fopen(argv[1], "r") : stdin;
	out = argc > 2 ? fopen(argv[2], "w") : stdout;
	if (!in || !out)
		return 2;
	while (more && fgets(line, sizeof line, in)) {
		int n = 0;
		char *word = strtok(line, " \n");
		for (; word && n < 63; word = strtok(0, " \n"))
			words[n++] = word;
		words[n] = 0;
		if (!n)
			continue;
		said[0] = 0;
		more = run(n, words);
		fprintf(out, "= %s\n", said);
		fflush(out);
	}
	return 0;
}
