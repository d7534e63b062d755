/* What the parts of the extension share. See docs/design/data-path.md for the whole picture.
 *
 *   transport.c  the thread that reads /dev/fuse, the queue to Python, the table of opcodes
 *   replies.c    what is amended in Python's replies on their way to the kernel
 *   files.c      contents of open files: passthrough, or read and written here
 *   image.c      objects that only the bottom layer has a say in, answered without Python
 *   nodes.c      the table of nodes that the kernel holds
 *   missing.c    names that the kernel remembers to be missing
 *   journal.c    what a successor of this process has to know
 *   module.c     the Python module
 *
 * One mutex guards all state; it is held while a request is taken and answered, never while waiting
 * for one.
 */
#ifndef SESSIOND_KERNEL_IO_H
#define SESSIOND_KERNEL_IO_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "protocol.h"

#include <pthread.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define ROOT_NUMBER 1
#define FOREVER 1000000000u /* seconds */
#define DIRECTORY_LAYERS 8 /* directories with more parts are left to Python */

/* Numbers of nodes, as in overlay/nodes.py: version << 56 | file system << 48 | inode. */
#define INODE_BITS 48
#define VERSION_MASK (0x7full << 56)

enum data_path {
    PLAIN,  /* pyfuse3 alone: nothing here takes part */
    CACHED, /* the kernel opens files by itself, and caches what it is sent */
    PASSTHROUGH,
};

/* A place in an order of use. */
struct use {
    struct node *node;
    struct order *order;
    struct use *newer, *older;
};
struct order {
    struct use *newest, *oldest;
    size_t count;
};

/* The contents of a file, kept open for a while after the last close, too. */
struct contents {
    int fd;
    bool for_writing;   /* how `fd` is open */
    bool writable;      /* the file is in the upper, so it may be written */
    bool stale;         /* the node has moved to another file: Python knows which */
    bool kept;          /* has to stay until the last close, of which Python is told */
    int32_t backing;    /* 0: the kernel does not read and write by itself */
    bool refused;       /* it was asked to, and cannot do so with this file */
    bool mapped;        /* may be mapped for writing, which outlives the last close */
    uint32_t opens;
    uint32_t writers;   /* of these, for writing */
    uint32_t closes;    /* so far */
    uint64_t device, inode;
    struct use use;     /* among those with no opens */
};

/* The real directories that a directory of the merged view consists of, topmost first. */
struct directory {
    int fds[DIRECTORY_LAYERS];
    int count;
    bool bottom;        /* the last belongs to the bottom layer */
    uint64_t device;    /* of the last */
    uint64_t numbering; /* the file system bits of its inodes' numbers */
    struct use use;
};

struct node {
    struct node *next; /* in its hash chain */
    uint64_t number;
    uint64_t lookups;  /* references that the kernel holds */
    bool python;       /* Python has a node of this number and answers for it */
    bool inherited;    /* from a predecessor, for which it may have been Python's */
    uint32_t generation; /* of the layer stack it was found in; only for those not Python's */
    mode_t type;
    struct node *parent; /* with `name`, where it was found; only for those not Python's */
    char *name;
    uint32_t children; /* nodes that have this one as parent */
    struct directory *directory; /* NULL: not known here */
    struct contents *contents;   /* NULL: not known here */
};

struct state {
    pthread_mutex_t lock;
    int device;
    struct fuse_in_header *inherited; /* the kernel's first request to a predecessor, or NULL */
    enum data_path path;
    bool passthrough; /* the kernel has agreed to it */
    bool held;        /* changes wait: the session is frozen */
    uint32_t generation;
    uint64_t unique; /* of the request that is being replied to, without RESENT */
};
extern struct state state;

static inline bool is_write(uint32_t flags)
{
    return (flags & O_ACCMODE) != O_RDONLY;
}

/* nodes.c */
struct node *node_find(uint64_t number);
struct node *node_get(uint64_t number); /* made, as Python's, if it is not there; NULL: no memory */
bool node_place(struct node *node, struct node *parent, const char *name);
void node_forget(struct node *node, uint64_t lookups); /* may free it */
void node_give_to_python(struct node *node);
void node_each(void (*visit)(struct node *, void *), void *argument);
void use_now(struct order *order, struct use *use, struct node *node);
void use_end(struct use *use);

/* transport.c */
struct request {
    struct fuse_in_header *in;
    void *body;
};
int reply(const struct request *request, const void *body, size_t size);
int reply_error(const struct request *request, int code);
bool ask_for_contents(const struct request *request, uint64_t number, bool writing);
void transport_forget(uint64_t number, uint64_t lookups); /* as the kernel has */
bool transport_is_active(void); /* whether it has taken the place of the device */
uint32_t transport_resent(void); /* the opcode of Python's latest request, if sent before, or 0 */

/* Each of the following answers a request and returns true, or leaves it to Python. */

struct life;

/* files.c */
bool answer_open(struct request *request);
bool answer_release(struct request *request);
bool answer_read(struct request *request);
bool answer_write(struct request *request);
bool answer_fsync(struct request *request);
bool answer_lseek(struct request *request);
bool answer_fallocate(struct request *request);
bool answer_copy_file_range(struct request *request);
bool contents_set(struct node *node, int fd, bool writable);
void contents_retire(struct node *node);
void contents_keep(struct node *node, bool kept);
bool contents_finish(struct node *node, uint32_t closes);
bool contents_mapped(struct contents *contents); /* clears `mapped` if it is not so */
void contents_close(struct node *node);
void contents_opened(struct node *node, uint32_t flags, struct open_out *out);
void contents_closed(struct node *node, uint32_t flags);
bool contents_inherit(struct node *node, const struct life *life);

/* image.c */
bool answer_lookup(struct request *request);
bool answer_getattr(struct request *request);
bool answer_readlink(struct request *request);
bool answer_getxattr(struct request *request);
bool answer_listxattr(struct request *request);
bool answer_opendir(struct request *request);
bool answer_readdir(struct request *request); /* READDIRPLUS, too */
bool answer_releasedir(struct request *request);
int image_open(struct node *node);
bool image_serve(struct node *node, const int *fds, int count, bool bottom, uint64_t numbering);
void image_withdraw(struct node *node);
uint64_t image_listed(uint64_t handle); /* the number of the directory that a handle is of */
bool listing_inherit(uint64_t handle, uint64_t number, bool python);
void listing_close(uint64_t handle);
bool listing_reopen(uint64_t handle, int fd, uint64_t numbering);
void listing_each_inherited(void (*visit)(uint64_t handle, uint64_t number, void *), void *argument);
uint64_t listing_last(void);

/* missing.c */
struct missing_ring {
    uint64_t first, last; /* offsets that only grow; modulo the size */
    char bytes[1 << 20];
};
void missing_keep_in(struct missing_ring *memory);
uint32_t missing_remember(uint64_t parent, const char *name);
void missing_each(void (*visit)(uint64_t parent, const char *name, void *), void *argument);

/* journal.c */
struct life_name {
    struct life_name *next;
    uint64_t parent;
    size_t length;
    char bytes[]; /* and a zero */
};
struct life_fact {
    struct life_fact *next;
    uint32_t which;
    size_t length;
    char data[];
};
struct life { /* all that the journal has of one node */
    struct life *next;
    uint64_t number;
    int64_t lookups;
    uint32_t type, opens, writers;
    int32_t backing;
    bool mapped, needed;
    uint64_t device, inode;
    struct life_name *names;
    struct life_fact *facts;
};
#define JOURNAL_KEY 16 /* bytes */
bool journal_open(int fd);
const char *journal_key(void);
void journal_init(const struct fuse_in_header *in);
void journal_placed(uint64_t number, mode_t type, uint64_t parent, const char *name, size_t length);
void journal_removed(uint64_t number, uint64_t parent, const char *name, size_t length);
void journal_lookups(uint64_t number, int64_t change);
void journal_opened(uint64_t number, uint32_t flags);
void journal_closed(uint64_t number, uint32_t flags);
void journal_contents(uint64_t number, const struct contents *contents); /* NULL: none any more */
void journal_listed(uint64_t handle, uint64_t number);
void journal_unlisted(uint64_t handle);
void journal_turned(uint64_t handle);
bool journal_fact(uint64_t number, uint32_t which, const char *data, size_t length);
void journal_tidy(void);
bool journal_inherit(void);
void journal_inherited(void (*visit)(const struct life *, void *), void *argument);
bool journal_settle(uint64_t unique);

/* replies.c: each amends what follows the header. */
uint32_t largest_write(void); /* in bytes */
void amend_init(const struct fuse_init_in *in, struct iovec *parts, int count);
void amend_entry(struct iovec *parts, int count);
void amend_attributes(struct iovec *parts, int count);
void amend_listing(struct iovec *parts, int count);
void amend_names(struct iovec *parts, int count); /* makes READDIRPLUS's reply READDIR's */
void amend_open(uint64_t number, uint32_t flags, struct iovec *parts, int count);
void amend_create(uint32_t flags, struct iovec *parts, int count);
void amend_opendir(uint64_t number, struct iovec *parts, int count);

#endif
