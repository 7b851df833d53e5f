// A current directory whose name is not UTF-8: an image cannot name it.
// mist: refused not UTF-8
#include "mist.h"

int main(void)
{
    MUST(mkdir("l\xe4tin", 0700));
    MUST(chdir("l\xe4tin"));
    MUST(close(MUST(open("file", O_RDWR | O_CREAT, 0600))));
    mist_ready();
    mist_wait();
    CHECK("it is there", 0, access("file", F_OK));
    mist_pass();
}
