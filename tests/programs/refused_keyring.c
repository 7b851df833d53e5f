// A keyring of the process's own.
// mist: refused a keyring of its own
#include "mist.h"
#include <linux/keyctl.h>

int main(void)
{
    long key = syscall(SYS_add_key, "user", "mist", "secret", 6, KEY_SPEC_PROCESS_KEYRING);
    if (key < 0)
        mist_skip("this kernel keeps no keys, or none for us");
    mist_ready();
    mist_wait();
    char payload[8] = {0};
    CHECK("its length", 6, CALL(syscall(SYS_keyctl, KEYCTL_READ, key, payload, sizeof payload)));
    CHECK_STR("the key", "secret", payload);
    mist_pass();
}
