// Standard output is a pipe to somebody outside the dump: it becomes that of mistctl restore.
// mist: stdout
#include "mist.h"

int main(void)
{
    MUST(write(1, "before\n", 7));
    mist_ready();
    mist_wait();
    CHECK("write to standard output", 6, write(1, "after\n", 6));
    mist_pass();
}
