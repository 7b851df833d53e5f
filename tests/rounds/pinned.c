/* A write that has its page before it has what it writes: process_vm_writev(2) waits for its source, which a
 * userfaultfd gives when it is told to. Prints where the page is that is written. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096 };

static char *source, *target;

static void *writer(void *nothing)
{
	struct iovec from = { source, PAGE }, to = { target, PAGE };

	(void)nothing;
	if (process_vm_writev(getpid(), &from, 1, &to, 1, 0) != PAGE)
		err(1, "process_vm_writev");
	return 0;
}

static char *map(void)
{
	char *at = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		err(1, "mmap");
	return at;
}

int main(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	pthread_t thread;
	char what[PAGE];

	source = map(), target = map();
	memset(target, 'a', PAGE);
	struct uffdio_register range = { { (unsigned long)source, PAGE }, UFFDIO_REGISTER_MODE_MISSING, 0 };
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		err(1, "userfaultfd");
	setbuf(stdout, 0);
	printf("%lx\n", (unsigned long)target);
	getchar();
	pthread_create(&thread, 0, writer, 0);
	struct uffd_msg fault;
	if (read(fd, &fault, sizeof fault) != sizeof fault)
		err(1, "read");
	puts("waits");
	getchar();
	memset(what, 'b', PAGE);
	struct uffdio_copy copy = { (unsigned long)source, (unsigned long)what, PAGE, 0, 0 };
	if (ioctl(fd, UFFDIO_COPY, &copy))
		err(1, "UFFDIO_COPY");
	pthread_join(thread, 0);
	puts(*target == 'b' ? "written" : "not written");
	getchar();
	return 0;
}
