/*
 * Calls everything pvm3.h declares and prints what came of it, without tids, times and pids, so that two
 * runs (with and without the shim) can be compared line by line.
 */
#include <errno.h>
#include <pvm3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

extern int pvm_errno;
static int me;

#define R(call) printf("%d: %s = %d\n", __LINE__, #call, norm(call))
#define B(call) printf("%d: %s %s\n", __LINE__, #call, (call) > 0 ? "> 0" : (call) == 0 ? "0" : "< 0")

/* ids of messages depend on when messages arrive, so only whether there is one is shown */
static int norm(int n)
{
	return n == me ? 1000000 : n;
}

static int handled;
static int handler(int mid)
{
	int len, tag, src;
	pvm_bufinfo(mid, &len, &tag, &src);
	/* when it runs depends on when the message arrives */
	handled += 100 * len + tag + (src == me);
	return 0;
}

static int (*def)(int, int, int);
static int match(int mid, int tid, int tag)
{
	printf("match %d %d %d\n", mid > 0, tid, tag);
	return def(mid, tid, tag);
}

static void bufs(void)
{
	printf("bufs: s %d r %d errno %d\n", pvm_getsbuf() > 0, pvm_getrbuf() > 0, errno);
}

int main(int argc, char **argv)
{
	int i, n, m, x, tids[8], *list, ints[4] = {1, -2, 3, -4};
	char text[64], name[64], bytes[4] = {9, 8, 7, 6};
	short sh = -5;
	long lo = -123456789012L;
	float fl = 1.5f, cp[2] = {1, 2};
	double du = -2.25, dc[2] = {3, 4};
	unsigned short us = 5;
	unsigned int ui = 7;
	unsigned long ul = 8;
	struct pvmhostinfo *hosts;
	struct pvmtaskinfo *tasks;
	struct pvmmboxinfo *boxes;
	struct pvmminfo info;
	struct timeval tv = {0, 10000}, delta;
	char mask[256];
	FILE *collected;

	/* before enrolment */
	errno = 0;
	printf("version %s\n", pvm_version());
	R(pvm_getopt(PvmRoute));
	R(pvm_setopt(PvmRoute, PvmAllowDirect));
	R(pvm_setopt(PvmAutoErr, 0));
	B(pvm_getsbuf());
	B(pvm_getrbuf());
	if (argc > 1) { /* a child */
		me = pvm_mytid();
		if (!strcmp(argv[1], "sib"))
			printf("%d siblings\n", pvm_siblings(&list));
		else
			printf("child\n");
		fflush(stdout);
		pvm_initsend(PvmDataDefault);
		pvm_pkint(&me, 1, 1);
		pvm_send(pvm_parent(), 90);
		if (!strcmp(argv[1], "wait"))
			pvm_recv(-1, 91);
		pvm_exit();
		return 0;
	}
	me = pvm_mytid();
	B(me);
	bufs();
	R(pvm_mytid());
	R(pvm_parent());
	R(pvm_tidtohost(me) == (me & 0x3ffc0000));
	R(pvm_siblings(&list));
	R(list[0]);

	/* options */
	for (i = 0; i < 27; i++)
		printf("getopt %d = %d\n", i, norm(pvm_getopt(i)));
	R(pvm_setopt(PvmRoute, PvmRouteDirect));
	R(pvm_getopt(PvmRoute));
	R(pvm_setopt(PvmRoute, 17));
	R(pvm_setopt(PvmRoute, PvmDontRoute));
	R(pvm_setopt(PvmRoute, PvmAllowDirect));
	R(pvm_setopt(PvmFragSize, 8000));
	R(pvm_setopt(PvmFragSize, 3));
	R(pvm_getopt(PvmFragSize));
	R(pvm_setopt(PvmFragSize, 4080));
	R(pvm_setopt(PvmResvTids, 0));
	R(pvm_setopt(PvmShowTids, 0));
	R(pvm_setopt(PvmOutputTid, me));
	R(pvm_getopt(PvmOutputTid));
	R(pvm_setopt(PvmOutputTid, 0));
	R(pvm_setopt(PvmOutputTid, 0x40ffe));
	R(pvm_setopt(PvmTraceTid, 0));
	R(pvm_setopt(99, 0));
	R(pvm_gettmask(PvmTaskSelf, mask));
	R(pvm_settmask(PvmTaskSelf, mask));

	/* buffers and packing, every type and encoding */
	B(pvm_mkbuf(PvmDataRaw));
	n = pvm_mkbuf(PvmDataDefault);
	B(n);
	B(pvm_setsbuf(n));
	bufs();
	R(pvm_freebuf(n));
	bufs();
	R(pvm_freebuf(12345));
	for (i = 0; i < 3; i++) {
		int enc[] = {PvmDataDefault, PvmDataRaw, PvmDataInPlace};
		printf("encoding %d\n", enc[i]);
		B(pvm_initsend(enc[i]));
		R(pvm_pkbyte(bytes, 4, 1));
		R(pvm_pkshort(&sh, 1, 1));
		R(pvm_pkint(ints, 4, 1));
		R(pvm_pklong(&lo, 1, 1));
		R(pvm_pkfloat(&fl, 1, 1));
		R(pvm_pkdouble(&du, 1, 1));
		R(pvm_pkcplx(cp, 1, 1));
		R(pvm_pkdcplx(dc, 1, 1));
		R(pvm_pkushort(&us, 1, 1));
		R(pvm_pkuint(&ui, 1, 1));
		R(pvm_pkulong(&ul, 1, 1));
		if (i < 2) {
			R(pvm_pkstr("words"));
			R(pvm_packf("%d %s", 42, "more"));
		}
		R(pvm_bufinfo(pvm_getsbuf(), &n, &m, &x));
		printf("len %d tag %d src %d\n", n, m, norm(x));
		R(pvm_send(me, 10 + i));
		memset(ints, 0, sizeof ints);
		B(pvm_recv(me, 10 + i));
		bufs();
		R(pvm_bufinfo(pvm_getrbuf(), &n, &m, &x));
		printf("len %d tag %d src %d\n", n, m, norm(x));
		R(pvm_upkbyte(bytes, 4, 1));
		R(pvm_upkshort(&sh, 1, 1));
		R(pvm_upkint(ints, 4, 1));
		R(pvm_upklong(&lo, 1, 1));
		R(pvm_upkfloat(&fl, 1, 1));
		R(pvm_upkdouble(&du, 1, 1));
		R(pvm_upkcplx(cp, 1, 1));
		R(pvm_upkdcplx(dc, 1, 1));
		R(pvm_upkushort(&us, 1, 1));
		R(pvm_upkuint(&ui, 1, 1));
		R(pvm_upkulong(&ul, 1, 1));
		if (i < 2) {
			R(pvm_upkstr(text));
			R(pvm_unpackf("%d %s", &x, name));
			printf("%s %d %s\n", text, x, name);
		}
		R(pvm_upkint(&x, 1, 1));
		printf("%d %d %ld %g %g %g %g %u %u %lu\n", sh, ints[3], lo, fl, du, cp[1], dc[1], us, ui, ul);
		ints[0] = 1, ints[1] = -2, ints[2] = 3, ints[3] = -4;
	}
	R(pvm_getminfo(pvm_getrbuf(), &info));
	printf("minfo %d %d %d %d %x %d %d %d\n", info.len, info.ctx, info.tag, info.wid, info.enc, info.crc,
	       norm(info.src), norm(info.dst));
	info.tag = 5;
	R(pvm_setminfo(pvm_getrbuf(), &info));
	R(pvm_bufinfo(pvm_getrbuf(), &n, &m, &x));
	printf("tag %d\n", m);
	R(pvm_getminfo(999, &info));

	/* sending and receiving */
	B(pvm_initsend(PvmDataDefault));
	R(pvm_pkstr("first"));
	n = pvm_getsbuf();
	B(pvm_initsend(PvmDataDefault));
	R(pvm_pkint(ints, 1, 1));
	tids[0] = me, tids[1] = 0x40ffe;
	R(pvm_mcast(tids, 2, 20));
	R(pvm_mcast(tids, 0, 20));
	R(pvm_mcast(tids, -1, 20));
	R(pvm_send(me, 21));
	R(pvm_send(0, 21));
	R(pvm_send(me, -1));
	R(pvm_send(0x40ffe, 21));
	R(pvm_psend(me, 22, ints, 4, PVM_INT));
	R(pvm_psend(me, 22, ints, 4, PVM_STR));
	R(pvm_psend(me, 22, ints, 4, 77));
	B(pvm_nrecv(-1, 20));
	while (!pvm_probe(-1, 21))
		;
	B(pvm_probe(-1, 21));
	B(pvm_probe(-1, 99));
	B(pvm_recv(-1, 21));
	bufs();
	R(pvm_precv(-1, 22, ints, 4, PVM_INT, &n, &m, &x));
	printf("%d %d %d\n", norm(n), m, x);
	B(pvm_trecv(-1, 99, &tv));
	bufs();
	R(pvm_send(me, 23));
	tv.tv_sec = 20;
	B(pvm_trecv(me, 23, &tv));
	B(pvm_nrecv(me, 23));
	errno = 55;
	B(pvm_nrecv(-1, -1));
	R(pvm_getfds(&list));

	/* handlers, matching */
	R(pvm_addmhf(-1, 30, 0, handler));
	R(pvm_addmhf(-1, 30, 0, handler));
	R(pvm_addmhf(-1, -1, -1, handler));
	B(pvm_initsend(PvmDataDefault));
	R(pvm_send(me, 30));
	R(pvm_send(me, 31));
	B(pvm_recv(-1, 31));
	R(handled);
	R(pvm_delmhf(9));
	R(pvm_delmhf(9));
	R(pvm_delmhf(-1));
	R(pvm_delmhf(999));
	def = pvm_recvf(match);
	R(pvm_send(me, 32));
	B(pvm_recv(-1, 32));
	R(pvm_recvf(0) == match);
	R(pvm_recvf(def) == def);
	R(pvm_recvf(def) == def);

	/* contexts */
	n = pvm_newcontext();
	B(n);
	R(pvm_getcontext());
	R(pvm_setcontext(n));
	R(pvm_send(me, 33));
	R(pvm_setcontext(0));
	B(pvm_nrecv(-1, 33));
	pvm_setcontext(n);
	B(pvm_recv(-1, 33));
	pvm_setcontext(0);
	R(pvm_freecontext(n));
	R(pvm_freecontext(n));

	/* messages in messages */
	B(pvm_initsend(PvmDataDefault));
	R(pvm_pkstr("inner"));
	n = pvm_setsbuf(pvm_mkbuf(PvmDataDefault));
	R(pvm_pkmesg(n));
	R(pvm_pkmesg(-3));
	R(pvm_send(me, 34));
	B(pvm_recv(-1, 34));
	m = pvm_upkmesg();
	B(m);
	R(pvm_setrbuf(m) > 0);
	R(pvm_upkstr(text));
	puts(text);
	R(pvm_setsbuf(n) > 0);
	B(pvm_initsend(PvmDataDefault));
	R(pvm_pkmesgbody(m));

	/* mailboxes */
	B(pvm_initsend(PvmDataDefault));
	R(pvm_pkstr("boxed"));
	R(pvm_putinfo("class", pvm_getsbuf(), PvmMboxDefault));
	R(pvm_putinfo("class", pvm_getsbuf(), PvmMboxDefault));
	R(pvm_putinfo("many", pvm_getsbuf(), PvmMboxMultiInstance));
	R(pvm_putinfo("many", pvm_getsbuf(), PvmMboxMultiInstance));
	R(pvm_putinfo("", pvm_getsbuf(), PvmMboxDefault));
	B(pvm_recvinfo("class", 0, PvmMboxDefault));
	R(pvm_upkstr(text));
	puts(text);
	R(pvm_recvinfo("none", 0, PvmMboxDefault));
	R(pvm_getmboxinfo("*", &n, &boxes));
	for (i = 0; i < n; i++)
		printf("%s %d %d %d\n", boxes[i].mi_name, boxes[i].mi_nentries, boxes[i].mi_indices[0], norm(boxes[i].mi_owners[0]));
	R(pvm_delinfo("class", 0, PvmMboxDefault));
	R(pvm_delinfo("class", 0, PvmMboxDefault));
	R(pvm_insert("old", -1, 17));
	R(pvm_lookup("old", -1, &n));
	R(n);
	R(pvm_delete("old", 0));
	R(pvm_lookup("old", -1, &n));
	R(pvm_setopt(PvmNoReset, 1));
	R(pvm_getnoresets(&list, &n));
	R(n);
	R(list[0]);
	R(pvm_setopt(PvmNoReset, 0));

	/* the virtual machine */
	R(pvm_config(&n, &m, &hosts));
	printf("%d hosts %d archs %s %s\n", n, m, hosts[0].hi_name, hosts[0].hi_arch);
	strcpy(name, hosts[0].hi_name);
	R(pvm_config(0, 0, 0));
	R(pvm_mstat(name));
	R(pvm_mstat("nowhere"));
	R(pvm_archcode("LINUX64"));
	R(pvm_archcode("VAX"));
	R(pvm_pstat(me));
	R(pvm_pstat(0x40ffe));
	R(pvm_pstat(0));
	R(pvm_tasks(0, &n, &tasks));
	printf("%d tasks %d parent %d pid %d\n", n, norm(tasks[0].ti_tid), tasks[0].ti_ptid, tasks[0].ti_pid == getpid());
	R(pvm_tasks(me, &n, 0));
	R(pvm_tasks(0x3ff00001, &n, &tasks));
	R(pvm_hostsync(pvm_tidtohost(me), &tv, &delta));
	R(pvm_hostsync(0x3ffc0000, 0, 0));
	x = 0;
	R(pvm_tickle(1, &x, &n, 0));
	R(pvm_addhosts((char *[]){name}, 1, &x));
	R(x);
	R(pvm_addhosts(0, 0, &x));
	R(pvm_delhosts((char *[]){"nowhere"}, 1, &x));
	R(x);
	R(pvm_sendsig(me, 0));
	R(pvm_sendsig(0x40ffe, 0));
	R(pvm_sendsig(0, 0));
	R(pvm_kill(0x40ffe));
	R(pvm_start_pvmd(0, 0, 0));

	/* notices */
	tids[0] = 0x40ffe;
	R(pvm_notify(PvmTaskExit, 40, 1, tids));
	B(pvm_recv(-1, 40));
	R(pvm_upkint(&n, 1, 1));
	printf("%x\n", n);
	R(pvm_notify(PvmHostAdd, 41, 1, 0));
	R(pvm_notify(PvmHostAdd | PvmNotifyCancel, 41, 1, 0));
	tids[0] = pvm_tidtohost(me);
	R(pvm_notify(PvmHostDelete, 42, 1, tids));
	R(pvm_notify(PvmHostDelete | PvmNotifyCancel, 42, 1, tids));
	B(pvm_recv(-1, 42));
	R(pvm_notify(PvmRouteAdd, 43, 1, 0));
	tids[0] = 0x40ffe;
	R(pvm_notify(PvmRouteDelete, 44, 1, tids));
	B(pvm_recv(-1, 44));
	R(pvm_upkint(tids, 2, 1));
	printf("%x %d\n", tids[0], tids[1]);
	R(pvm_notify(PvmTaskExit, 45, 0, tids));
	R(pvm_notify(77, 45, 1, tids));
	R(pvm_notify(PvmTaskExit, 46, 1, &me));

	/* children */
	R(pvm_spawn("no such program", 0, 0, 0, 1, tids));
	R(tids[0]);
	R(pvm_spawn("api", 0, 0, 0, 0, tids));
	collected = tmpfile();
	R(pvm_catchout(collected));
	n = pvm_spawn("api", (char *[]){"child", 0}, PvmTaskDefault, "", 1, tids);
	R(n);
	B(pvm_recv(tids[0], 90));
	R(pvm_upkint(&x, 1, 1));
	R(x == tids[0]);
	n = pvm_spawn("api", (char *[]){"wait", 0}, PvmTaskDefault, "", 1, tids);
	R(pvm_notify(PvmTaskExit, 47, 1, tids));
	B(pvm_recv(tids[0], 90));
	R(pvm_kill(tids[0]));
	B(pvm_recv(-1, 47));
	R(pvm_upkint(&x, 1, 1));
	R(x == tids[0]);
	fflush(stdout);

	/* groups */
	R(pvm_joingroup("g"));
	R(pvm_joingroup("g"));
	R(pvm_gsize("g"));
	R(pvm_getinst("g", me));
	R(pvm_gettid("g", 0));
	R(pvm_barrier("g", 1));
	B(pvm_initsend(PvmDataDefault));
	R(pvm_bcast("g", 50));
	R(pvm_reduce(PvmSum, ints, 4, PVM_INT, 51, "g", 0));
	R(pvm_gather(ints, ints, 1, PVM_INT, 52, "g", 0));
	R(pvm_scatter(&x, ints, 1, PVM_INT, 53, "g", 0));
	R(pvm_freezegroup("g", 1));
	R(pvm_lvgroup("g"));
	R(pvm_lvgroup("g"));

	/* registrations, and the rest */
	R(pvm_reg_tasker());
	R(pvm_reg_tasker());
	R(pvm_reg_hoster());
	R(pvm_reg_hoster());
	R(pvm_export("HOME"));
	R(pvm_unexport("HOME"));
	R(pvm_errno);
	bufs();
	/* waits for the children's output to end */
	R(pvm_exit());
	rewind(collected);
	while (fgets(mask, sizeof mask, collected))
		printf("child: %s", mask);
	R(pvm_exit());
	R(pvm_mytid() != me);
	B(pvm_initsend(PvmDataDefault));
	R(pvm_send(pvm_mytid(), 60));
	B(pvm_recv(-1, 60));
	R(pvm_exit());
	return 0;
}
