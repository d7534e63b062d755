/* Names that the kernel remembers to be missing. It holds no reference for them and can be asked for
 * none, so who changes the layers has to know them: they are in a ring, in the order in which the kernel
 * will have forgotten them, in memory that a successor of this process has, too.
 */
#include "kernel_io.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define REMEMBERED 60 /* seconds */
#define FORGOTTEN 90  /* a reply may take a while to arrive */

struct missing {
    uint64_t parent;
    uint32_t until; /* by when the kernel has forgotten it, in seconds */
    uint32_t length;
};

static struct missing_ring *ring;

void missing_keep_in(struct missing_ring *memory)
{
    ring = memory;
}

static uint32_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return time.tv_sec;
}

static void put(uint64_t at, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ring->bytes[(at + i) % sizeof ring->bytes] = ((const char *)from)[i];
}

static void get(uint64_t at, void *to, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((char *)to)[i] = ring->bytes[(at + i) % sizeof ring->bytes];
}

/* Return for how many seconds the kernel may remember that a name is missing. */
uint32_t missing_remember(uint64_t parent, const char *name)
{
    size_t length = strlen(name);
    struct missing missing = {parent, now() + FORGOTTEN, length}, oldest;

    if (!ring && !(ring = calloc(1, sizeof *ring)))
        return 0;
    while (ring->first < ring->last) {
        get(ring->first, &oldest, sizeof oldest);
        if (oldest.until > now())
            break;
        ring->first += sizeof oldest + oldest.length;
    }
    if (length > NAME_MAX || ring->last - ring->first + sizeof missing + length > sizeof ring->bytes)
        return 0;
    put(ring->last, &missing, sizeof missing);
    put(ring->last + sizeof missing, name, length);
    __atomic_store_n(&ring->last, ring->last + sizeof missing + length, __ATOMIC_RELEASE);
    return REMEMBERED;
}

void missing_each(void (*visit)(uint64_t parent, const char *name, void *), void *argument)
{
    struct missing missing;
    for (uint64_t at = ring ? ring->first : 0; ring && at < ring->last;) {
        char name[NAME_MAX + 1] = "";
        get(at, &missing, sizeof missing);
        get(at + sizeof missing, name, missing.length);
        if (missing.until > now())
            visit(missing.parent, name, argument);
        at += sizeof missing + missing.length;
    }
}
