// System V shared memory: attached, attached twice, attached and already removed, read-only.
#include "mist.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#define SIZE (64 * 4096)

int main(void)
{
    int id = MUST(shmget(0x4d495354, SIZE, IPC_CREAT | IPC_EXCL | 0600));
    char *a = MUST(shmat(id, NULL, 0));
    char *b = MUST(shmat(id, NULL, 0));
    char *ro = MUST(shmat(id, NULL, SHM_RDONLY));
    mist_fill(a, SIZE / 2, 31);
    int gone = MUST(shmget(IPC_PRIVATE, SIZE, 0600));
    char *g = MUST(shmat(gone, NULL, 0));
    MUST(shmctl(gone, IPC_RMID, NULL));
    mist_fill(g, SIZE, 32);

    mist_ready();
    mist_wait();

    mist_check_fill("content", a, SIZE / 2, 31);
    mist_check_byte("never written", a + SIZE / 2, SIZE / 2, 0);
    memset(b, 0x77, 4096);
    mist_check_byte("attached twice is one", a, 4096, 0x77);
    mist_check_byte("read-only is the same", ro, 4096, 0x77);
    CHECK_STR("read-only", "r--s", mist_smaps(ro, NULL));
    mist_check_fill("removed, still attached", g, SIZE, 32);
    struct shmid_ds ds;
    CALL(shmctl(id, IPC_STAT, &ds));
    CHECK("attachments", 3, ds.shm_nattch);
    CHECK("the key leads to it", id, shmget(0x4d495354, 0, 0));
    char *c = CALL(shmat(id, NULL, 0));
    mist_check_byte("attached again", c, 4096, 0x77);
    CALL(shmdt(c));
    CALL(shmdt(b));
    CALL(shmctl(id, IPC_RMID, NULL));
    CALL(shmdt(a));
    CALL(shmdt(ro));
    CALL(shmdt(g));
    CHECK_ERR("gone with its last attachment", ENOENT, shmget(0x4d495354, 0, 0));
    mist_pass();
}
