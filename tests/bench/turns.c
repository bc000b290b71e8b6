/* How long a thread runs between two waits for events, in processor time of its own: loaded into a program beside its C
 * library (LD_PRELOAD), it stands before epoll_wait. A turn of an event loop is one poll of a task or several, so the
 * longest turn is no shorter than the longest poll. Each thread has a file of its own in the folder TURNS, named by its
 * id, which holds a struct turns; whoever reads it may set it to zero. registry.py does. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct turns {
    long longest_ns, all_ns, count;
};

static __thread struct turns *turns;
static __thread long began;

static long processor_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static struct turns *make(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%ld", getenv("TURNS"), syscall(SYS_gettid));
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0 || ftruncate(file, sizeof(struct turns)) != 0) abort();
    void *page = mmap(NULL, sizeof(struct turns), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) abort();
    close(file);
    return page;
}

int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout) {
    if (!turns) turns = make();
    if (began) {
        long turn = processor_time() - began;
        if (turn > turns->longest_ns) turns->longest_ns = turn;
        turns->all_ns += turn;
        turns->count++;
    }
    int ready = syscall(SYS_epoll_pwait, epoll, events, most, timeout, NULL, 8L);
    began = processor_time();
    return ready;
}
