// System V semaphores that a process holds by SEM_UNDO: its end gives them back, and a restore takes them again.
#include "mist.h"
#include <sys/ipc.h>
#include <sys/sem.h>

static int set;

static int change(int number, int by)
{
    struct sembuf op = {number, by, SEM_UNDO | IPC_NOWAIT};
    return semop(set, &op, 1);
}

int main(void)
{
    set = MUST(semget(IPC_PRIVATE, 3, 0600));
    struct sembuf open = {1, 1, 0};
    MUST(semop(set, &open, 1));
    MUST(change(1, -1)); // a lock that it holds
    MUST(change(2, 4));
    mist_ready();
    mist_wait();
    CHECK("the lock", 0, CALL(semctl(set, 1, GETVAL)));
    CHECK("the other", 4, CALL(semctl(set, 2, GETVAL)));
    CHECK_ERR("the lock is held", EAGAIN, change(1, -1));
    CALL(change(1, 1));
    CHECK("given back", 1, CALL(semctl(set, 1, GETVAL)));
    CALL(semctl(set, 0, IPC_RMID));
    mist_pass();
}
