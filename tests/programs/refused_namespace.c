// A network namespace of its own: refused, by name, and nobody is harmed.
// mist: refused namespace
#include "mist.h"

int main(void)
{
    MUST(unshare(CLONE_NEWNET));
    mist_ready();
    mist_wait();
    mist_pass();
}
