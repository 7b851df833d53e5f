// A file that has another name, in another directory: what is written after a restore would not be there.
// mist: refused its name is gone
#include "mist.h"

int main(void)
{
    MUST(mkdir("there", 0700));
    int log = MUST(open("log", O_RDWR | O_CREAT | O_APPEND, 0600));
    MUST(link("log", "there/log"));
    MUST(unlink("log"));
    mist_ready();
    mist_wait();
    CALL(write(log, "x", 1));
    struct stat st;
    CALL(stat(mist_path("there/log"), &st));
    CHECK("its size", 1, st.st_size);
    mist_pass();
}
