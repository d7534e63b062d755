/* What a successor of this process has to know of the mount, written down as it happens: which nodes
 * the kernel holds, under which names, what is open, and facts that Python adds.
 *
 * The journal is a file in memory that another process holds, too. A record counts from the moment its
 * size is written, which is last. A record that belongs to a reply is written before the reply is sent; if
 * this process dies between the two, the kernel sends the request again, and the successor takes such
 * records back. Now and then all is written anew, without what has become void, into the other half
 * of the file.
 */
#include "kernel_io.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#define MAGIC 0x326a646e73736573ull /* "sessndj2" */
#define HEAD 4096
#define HALF (1ull << 30) /* of address space; memory is taken as it is written */
#define SIZE (HEAD + 2 * HALF + sizeof(struct missing_ring))
#define TIDY_FROM (256 << 10)
#define TIDY_FACTOR 4
#define CHAINS 4096 /* of the table that is made when the journal is read; a power of two */

enum kind {
    PLACED = 1, /* number has a name; `struct name` */
    REMOVED,    /* it has that name no more */
    LOOKUPS,    /* the kernel's references change by an int64_t */
    OPENED,     /* a uint32_t, flags of open(2) */
    CLOSED,     /* the same flags */
    CONTENTS,   /* `struct backing`; what is read and written by the kernel */
    LISTED,     /* a listing was opened; a uint64_t, its handle */
    UNLISTED,   /* and closed */
    TURNED,     /* and is Python's from now on */
    FACT,       /* a uint32_t, which, and its bytes; none: no longer so */
    INIT,       /* the kernel's first request */
    DOUBT,      /* `unique` may not have been replied to */
    SETTLED,    /* that is known now */
};

struct record {
    uint32_t size; /* of all, a multiple of 8 */
    uint16_t kind;
    uint16_t length; /* of the data */
    uint64_t unique; /* of the request in whose reply this is told to the kernel, or 0 */
    uint64_t number; /* of the node */
    char data[];
};

struct name {
    uint64_t parent;
    uint32_t type;
    char bytes[];
} __attribute__((packed));

struct backing {
    uint64_t device, inode;
    int32_t id;
    uint32_t mapped;
};

struct header {
    uint64_t magic;
    uint64_t half; /* which is in use: 0 or 1 */
    uint64_t unusable;
    char key[JOURNAL_KEY];
};

static struct header *header;
static char *base;   /* of the half that is written to */
static uint64_t end; /* offset in it */
static uint64_t tidy_at = TIDY_FROM;

static char *half(uint64_t index)
{
    return (char *)header + HEAD + index * HALF;
}

static void clear(uint64_t index)
{
    madvise(half(index), HALF, MADV_REMOVE);
}

/* Writing */

static void append(enum kind kind, uint64_t unique, uint64_t number, const void *first, size_t first_size,
                   const void *second, size_t second_size)
{
    if (!header || header->unusable)
        return;
    size_t size = (sizeof(struct record) + first_size + second_size + 7) & ~7ull;
    if (end + size + sizeof(struct record) > HALF) {
        header->unusable = 1;
        return;
    }
    struct record *record = (struct record *)(base + end);
    record->kind = kind;
    record->length = first_size + second_size;
    record->unique = unique;
    record->number = number;
    memcpy(record->data, first, first_size);
    if (second_size)
        memcpy(record->data + first_size, second, second_size);
    __atomic_store_n(&record->size, size, __ATOMIC_RELEASE);
    end += size;
}

static void append_name(enum kind kind, uint64_t number, uint32_t type, uint64_t parent,
                        const char *name, size_t length)
{
    struct name head = {.parent = parent, .type = type};
    append(kind, 0, number, &head, sizeof head, name, length);
}

void journal_init(const struct fuse_in_header *in)
{
    append(INIT, 0, 0, in, in->len, NULL, 0);
}

void journal_placed(uint64_t number, mode_t type, uint64_t parent, const char *name, size_t length)
{
    append_name(PLACED, number, type, parent, name, length);
}

void journal_removed(uint64_t number, uint64_t parent, const char *name, size_t length)
{
    append_name(REMOVED, number, 0, parent, name, length);
}

void journal_lookups(uint64_t number, int64_t change)
{
    append(LOOKUPS, change > 0 ? state.unique : 0, number, &change, sizeof change, NULL, 0);
}

void journal_opened(uint64_t number, uint32_t flags)
{
    append(OPENED, state.unique, number, &flags, sizeof flags, NULL, 0);
}

void journal_closed(uint64_t number, uint32_t flags)
{
    append(CLOSED, state.unique, number, &flags, sizeof flags, NULL, 0);
}

void journal_contents(uint64_t number, const struct contents *contents)
{
    struct backing backing = {0};
    if (contents)
        backing = (struct backing){
            .device = contents->device,
            .inode = contents->inode,
            .id = contents->backing,
            .mapped = contents->mapped,
        };
    append(CONTENTS, 0, number, &backing, sizeof backing, NULL, 0);
}

void journal_listed(uint64_t handle, uint64_t number)
{
    append(LISTED, state.unique, number, &handle, sizeof handle, NULL, 0);
}

void journal_unlisted(uint64_t handle)
{
    append(UNLISTED, 0, 0, &handle, sizeof handle, NULL, 0);
}

void journal_turned(uint64_t handle)
{
    append(TURNED, 0, 0, &handle, sizeof handle, NULL, 0);
}

bool journal_fact(uint64_t number, uint32_t which, const char *data, size_t length)
{
    if (length + sizeof which > UINT16_MAX)
        return false;
    append(FACT, 0, number, &which, sizeof which, data, length);
    return true;
}

/* Reading. What the records amount to: */

struct picture {
    struct life *chains[CHAINS];
    struct listed *listings;
    struct record *init;
    struct doubt *doubts;
};

struct listed {
    struct listed *next;
    uint64_t handle, number;
    bool python;
};

static struct doubt { /* a record to be taken back, should its request be sent again */
    struct doubt *next;
    uint64_t unique, number;
    enum kind kind;
    int64_t value;
} *doubts;

static struct life *life_of(struct picture *picture, uint64_t number)
{
    struct life **chain = &picture->chains[(number * 0x9e3779b97f4a7c15ull >> 20) % CHAINS];
    struct life *life = *chain;
    while (life && life->number != number)
        life = life->next;
    if (!life && (life = calloc(1, sizeof *life))) {
        life->number = number;
        life->next = *chain;
        *chain = life;
    }
    return life;
}

static struct life_name **find_name(struct life *life, const struct name *name, size_t length)
{
    struct life_name **link = &life->names;
    while (*link && ((*link)->parent != name->parent || (*link)->length != length ||
                     memcmp((*link)->bytes, name->bytes, length)))
        link = &(*link)->next;
    return link;
}

static bool add_name(struct life *life, const struct name *name, size_t length)
{
    struct life_name **link = find_name(life, name, length);
    life->type = name->type;
    if (*link)
        return true;
    struct life_name *added = calloc(1, sizeof *added + length + 1);
    if (!added)
        return false;
    added->parent = name->parent;
    added->length = length;
    memcpy(added->bytes, name->bytes, length);
    *link = added;
    return true;
}

static void remove_name(struct life *life, const struct name *name, size_t length)
{
    struct life_name **link = find_name(life, name, length), *found = *link;
    if (found) {
        *link = found->next;
        free(found);
    }
}

static bool set_fact(struct life *life, uint32_t which, const char *data, size_t length)
{
    struct life_fact **link = &life->facts, *found;
    while (*link && (*link)->which != which)
        link = &(*link)->next;
    if ((found = *link)) {
        *link = found->next;
        free(found);
    }
    if (!length)
        return true;
    struct life_fact *added = malloc(sizeof *added + length);
    if (!added)
        return false;
    *added = (struct life_fact){.next = life->facts, .which = which, .length = length};
    memcpy(added->data, data, length);
    life->facts = added;
    return true;
}

static struct listed **find_listed(struct picture *picture, uint64_t handle)
{
    struct listed **link = &picture->listings;
    while (*link && (*link)->handle != handle)
        link = &(*link)->next;
    return link;
}

static bool take_in_listing(struct picture *picture, const struct record *record, uint64_t handle)
{
    struct listed **link = find_listed(picture, handle), *found = *link;
    if (record->kind == LISTED && !found) {
        if (!(found = calloc(1, sizeof *found)))
            return false;
        *found = (struct listed){picture->listings, handle, record->number, false};
        picture->listings = found;
    } else if (record->kind == UNLISTED && found) {
        *link = found->next;
        free(found);
    } else if (record->kind == TURNED && found) {
        found->python = true;
    }
    return true;
}

static bool add_doubt(struct picture *picture, const struct record *record, int64_t value)
{
    struct doubt *doubt = malloc(sizeof *doubt);
    if (!doubt)
        return false;
    *doubt = (struct doubt){picture->doubts, record->unique, record->number, record->kind, value};
    picture->doubts = doubt;
    return true;
}

static void drop_doubts(struct picture *picture, uint64_t unique)
{
    for (struct doubt **link = &picture->doubts, *doubt; (doubt = *link);) {
        if (doubt->unique == unique) {
            *link = doubt->next;
            free(doubt);
        } else {
            link = &doubt->next;
        }
    }
}

/* Add one record to the picture. False: no memory. */
static bool take_in(struct picture *picture, struct record *record, bool doubted)
{
    const struct name *name = (const struct name *)record->data;
    const struct backing *backing = (const struct backing *)record->data;
    size_t name_length = record->length - sizeof *name;
    int64_t value = 0;
    struct life *life = NULL;

    if (record->kind == INIT) {
        picture->init = record;
        return true;
    }
    if (record->kind == SETTLED)
        drop_doubts(picture, record->unique);
    if (record->kind == LOOKUPS || (record->kind >= LISTED && record->kind <= TURNED))
        memcpy(&value, record->data, sizeof value);
    else if (record->kind == OPENED || record->kind == CLOSED)
        value = *(const uint32_t *)record->data;
    if (doubted && !add_doubt(picture, record, value))
        return false;
    if (record->kind >= LISTED && record->kind <= TURNED)
        return take_in_listing(picture, record, value);
    if (record->kind < LISTED || record->kind == FACT)
        if (!(life = life_of(picture, record->number)))
            return false;
    switch (record->kind) {
    case PLACED:
        return add_name(life, name, name_length);
    case REMOVED:
        life->type = name->type ? name->type : life->type;
        remove_name(life, name, name_length);
        break;
    case LOOKUPS:
        life->lookups += value;
        break;
    case OPENED:
        life->opens++;
        life->writers += is_write(value);
        break;
    case CLOSED:
        life->opens -= life->opens > 0;
        life->writers -= is_write(value) && life->writers > 0;
        life->mapped |= is_write(value) && life->backing;
        break;
    case CONTENTS:
        life->backing = backing->id;
        life->device = backing->device;
        life->inode = backing->inode;
        life->mapped = backing->mapped;
        break;
    case FACT:
        return set_fact(life, *(const uint32_t *)record->data,
                        record->data + sizeof(uint32_t), record->length - sizeof(uint32_t));
    }
    return true;
}

#define DOUBTS_LIMIT 16 /* deaths in a row; what earlier ones doubted is settled by then */

static bool is_doubted(const uint64_t uniques[DOUBTS_LIMIT + 1], uint64_t unique)
{
    for (size_t i = 0; unique && i <= DOUBTS_LIMIT; i++)
        if (uniques[i] == unique)
            return true;
    return false;
}

/* Find out which replies may not have been sent: the last, and the latest that predecessors doubted.
 * Most of those were sent, and are never settled. */
static void find_doubts(uint64_t uniques[DOUBTS_LIMIT + 1])
{
    uint64_t last = 0;
    size_t doubted = 0;
    const struct record *record;
    for (char *at = half(header->half); (record = (const struct record *)at)->size; at += record->size) {
        if (record->kind == DOUBT) {
            uniques[doubted++ % DOUBTS_LIMIT] = record->unique;
        } else if (record->kind == SETTLED) {
            for (size_t i = 0; i < DOUBTS_LIMIT; i++)
                if (uniques[i] == record->unique)
                    uniques[i] = 0;
        } else if (record->unique) {
            last = record->unique;
        }
    }
    uniques[DOUBTS_LIMIT] = last;
}

static void free_life(struct life *life)
{
    while (life->names) {
        struct life_name *next = life->names->next;
        free(life->names);
        life->names = next;
    }
    while (life->facts) {
        struct life_fact *next = life->facts->next;
        free(life->facts);
        life->facts = next;
    }
    free(life);
}

static void free_picture(struct picture *picture)
{
    for (size_t i = 0; i < CHAINS; i++)
        while (picture->chains[i]) {
            struct life *next = picture->chains[i]->next;
            free_life(picture->chains[i]);
            picture->chains[i] = next;
        }
    while (picture->listings) {
        struct listed *next = picture->listings->next;
        free(picture->listings);
        picture->listings = next;
    }
    free(picture);
}

/* Mark a node, and the directories in which its names are, as needed. */
static void need(struct picture *picture, struct life *life)
{
    while (life && !life->needed) {
        life->needed = true;
        struct life_name *name = life->names;
        for (; name && name->next; name = name->next)
            need(picture, life_of(picture, name->parent));
        life = name ? life_of(picture, name->parent) : NULL;
    }
}

/* Read the half in use. NULL: no memory, or nothing there. */
static struct picture *read_journal(bool with_doubts)
{
    uint64_t uniques[DOUBTS_LIMIT + 1] = {0};
    struct picture *picture = calloc(1, sizeof *picture);
    struct record *record;
    if (!picture)
        return NULL;
    if (with_doubts)
        find_doubts(uniques);
    end = 0;
    while ((record = (struct record *)(half(header->half) + end))->size) {
        bool doubted = record->kind != DOUBT && record->kind != SETTLED &&
                       is_doubted(uniques, record->unique);
        if (!take_in(picture, record, doubted)) {
            free_picture(picture);
            return NULL;
        }
        end += record->size;
    }
    for (size_t i = 0; i < CHAINS; i++)
        for (struct life *life = picture->chains[i]; life; life = life->next)
            if (life->lookups > 0 || life->opens || life->backing || life->mapped ||
                life->number <= ROOT_NUMBER) /* 0: facts of the mount as a whole */
                need(picture, life);
    for (struct listed *listed = picture->listings; listed; listed = listed->next)
        need(picture, life_of(picture, listed->number));
    return picture;
}

static void write_life(const struct life *life)
{
    uint64_t number = life->number;
    for (const struct life_name *name = life->names; name; name = name->next)
        journal_placed(number, life->type, name->parent, name->bytes, name->length);
    if (!life->names) /* for its type */
        append_name(REMOVED, number, life->type, 0, NULL, 0);
    if (life->lookups > 0)
        append(LOOKUPS, 0, number, &life->lookups, sizeof life->lookups, NULL, 0);
    for (uint32_t i = 0; i < life->opens; i++) {
        uint32_t flags = i < life->writers ? O_RDWR : O_RDONLY;
        append(OPENED, 0, number, &flags, sizeof flags, NULL, 0);
    }
    if (life->backing || life->mapped) {
        struct backing backing = {life->device, life->inode, life->backing, life->mapped};
        append(CONTENTS, 0, number, &backing, sizeof backing, NULL, 0);
    }
    for (const struct life_fact *fact = life->facts; fact; fact = fact->next)
        journal_fact(number, fact->which, fact->data, fact->length);
}

/* Write what counts into the other half, and use that. Not while a reply is being made. */
void journal_tidy(void)
{
    if (!header || header->unusable || end < tidy_at)
        return;
    struct picture *picture = read_journal(false);
    if (!picture)
        return;
    uint64_t before = header->half;
    clear(!before); /* a predecessor may have died here */
    base = half(!before);
    end = 0;
    if (picture->init)
        append(INIT, 0, 0, picture->init->data, picture->init->length, NULL, 0);
    for (size_t i = 0; i < CHAINS; i++)
        for (const struct life *life = picture->chains[i]; life; life = life->next)
            if (life->needed)
                write_life(life);
    for (const struct listed *listed = picture->listings; listed; listed = listed->next) {
        append(LISTED, 0, listed->number, &listed->handle, sizeof listed->handle, NULL, 0);
        if (listed->python)
            journal_turned(listed->handle);
    }
    __atomic_store_n(&header->half, !before, __ATOMIC_RELEASE);
    clear(before);
    free_picture(picture);
    tidy_at = end * TIDY_FACTOR > TIDY_FROM ? end * TIDY_FACTOR : TIDY_FROM;
}

/* Write to `fd` from now on, a file in memory, which may have what a predecessor wrote. */
bool journal_open(int fd)
{
    if (ftruncate(fd, SIZE))
        return false;
    void *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return false;
    header = memory;
    base = half(header->half);
    missing_keep_in((struct missing_ring *)half(2));
    if (!header->magic && getrandom(header->key, sizeof header->key, 0) == sizeof header->key)
        header->magic = MAGIC;
    return header->magic == MAGIC;
}

/* A secret that a successor has, too. */
const char *journal_key(void)
{
    static char own[JOURNAL_KEY];
    static bool made;
    if (header)
        return header->key;
    made = made || getrandom(own, sizeof own, 0) == sizeof own;
    return own;
}

/* Taking over */

static bool inherit_node(const struct life *life)
{
    struct node *node = node_get(life->number);
    if (!node)
        return false;
    node->lookups = life->lookups > 0 ? life->lookups : 0;
    node->type = life->type;
    node->python = false;
    node->inherited = true;
    return !(life->opens || life->backing || life->mapped) || contents_inherit(node, life);
}

/* Let each node know where it is; who has several names, or none, Python asks `inherited` for. */
static bool inherit_name(const struct life *life)
{
    struct node *parent, *node = node_find(life->number);
    const struct life_name *name = life->names;
    return !name || ((parent = node_get(name->parent)) && node_place(node, parent, name->bytes));
}

static struct picture *inheritance;

/* Take over what a predecessor has left. False: there is nothing, or it cannot be read. */
bool journal_inherit(void)
{
    struct picture *picture = header->unusable ? NULL : read_journal(true);
    if (!picture || !picture->init)
        return false;
    state.generation++; /* so that Python is asked about all that is inherited */
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < CHAINS; i++)
            for (struct life *life = picture->chains[i]; life; life = life->next)
                if (life->needed && life->number > ROOT_NUMBER &&
                    !(pass ? inherit_name : inherit_node)(life))
                    return false;
    for (struct listed *listed = picture->listings; listed; listed = listed->next)
        if (!listing_inherit(listed->handle, listed->number, listed->python))
            return false;
    inheritance = picture;
    doubts = picture->doubts;
    if (doubts) /* the latest, of which nobody has written so yet */
        append(DOUBT, doubts->unique, 0, NULL, 0, NULL, 0);
    state.inherited = (struct fuse_in_header *)picture->init->data;
    return true;
}

/* Show each node of which Python has to know more than its one name. */
void journal_inherited(void (*visit)(const struct life *, void *), void *argument)
{
    for (size_t i = 0; inheritance && i < CHAINS; i++)
        for (const struct life *life = inheritance->chains[i]; life; life = life->next)
            if (life->needed &&
                (life->facts || !life->names || life->names->next || life->number & VERSION_MASK))
                visit(life, argument);
    if (inheritance)
        free_picture(inheritance);
    inheritance = NULL;
}

static void take_back(const struct doubt *doubt)
{
    struct node *node;
    if (doubt->kind == LOOKUPS)
        transport_forget(doubt->number, doubt->value);
    else if (doubt->kind == OPENED && (node = node_find(doubt->number)))
        contents_closed(node, doubt->value);
    else if (doubt->kind == LISTED)
        listing_close(doubt->value);
}

/* A request was sent again: what its reply was to tell the kernel has not been told. Return whether it
 * was to tell of a close. */
bool journal_settle(uint64_t unique)
{
    bool found = false, closed = false;
    state.unique = 0;
    for (struct doubt **link = &doubts, *doubt; (doubt = *link);) {
        if (doubt->unique != unique) {
            link = &doubt->next;
            continue;
        }
        *link = doubt->next;
        found = true;
        take_back(doubt);
        closed |= doubt->kind == CLOSED;
        free(doubt);
    }
    if (found)
        append(SETTLED, unique, 0, NULL, 0, NULL, 0);
    state.unique = unique;
    return closed;
}
