// Files that have another name than they were opened by: linked to it, then unlinked, as sem_open(3) makes semaphores and
// mail spools their files. What is written after a restore has to be seen under that name.
// mist: cflags -pthread
#include "mist.h"
#include <semaphore.h>

int main(void)
{
    char name[64];
    snprintf(name, sizeof name, "/mist-%d-%lld", getpid(), (long long)mist_clock_us(CLOCK_REALTIME));
    sem_t *sem = sem_open(name, O_CREAT | O_EXCL, 0600, 5);
    if (sem == SEM_FAILED)
        mist_skip("no named semaphores here");

    int log = MUST(open("log.tmp", O_RDWR | O_CREAT | O_APPEND, 0600));
    MUST(write(log, "before", 6));
    MUST(link("log.tmp", "log"));
    MUST(unlink("log.tmp"));

    int data = MUST(open("data.tmp", O_RDWR | O_CREAT, 0600));
    MUST(ftruncate(data, 4096));
    char *map = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, data, 0));
    char *private = MUST(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, data, 0));
    close(data);
    MUST(link("data.tmp", "data"));
    MUST(unlink("data.tmp"));
    map[0] = 'b';

    mist_ready();
    mist_wait();

    char text[64];
    CALL(write(log, ", after", 7));
    mist_slurp(mist_path("log"), text, sizeof text);
    CHECK_STR("the log by its name", "before, after", text);
    map[1] = 'a';
    CHECK("the private mapping sees it", 'a', private[1]);
    mist_slurp(mist_path("data"), text, sizeof text);
    CHECK_STR("the data by its name", "ba", text);

    int value;
    CALL(sem_wait(sem));
    sem_t *same = sem_open(name, 0);
    sem_unlink(name);
    CHECK("the semaphore is found by its name", 1, same != SEM_FAILED);
    CALL(sem_getvalue(same, &value));
    CHECK("the value of the semaphore", 4, value);
    mist_pass();
}
