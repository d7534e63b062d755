/* Objects of the image: what only the bottom layer has a say in, answered without Python; and names
 * that no layer has.
 *
 * One rule keeps the overlay's semantics out of here: a name is answered if none of the layers above
 * the bottom one has anything of that name, not even a whiteout. All else is Python's, and so is an
 * object once Python has a node for it.
 */
#include "kernel_io.h"

#include <dirent.h>
#include <errno.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define XATTR_LIMIT 65536
#define LISTING_BUFFER 32768
#define DIRECTORIES_LIMIT 1024 /* kept open */

/* Handles of listings that are made here have this bit. */
#define OURS (1ull << 63)
#define LISTING_CHAINS 64

struct listing {
    struct listing *next; /* in its hash chain */
    uint64_t handle;
    uint64_t number; /* of the directory */
    uint64_t numbering;
    int fd; /* -1: a predecessor had it open, and Python has to open it again */
    bool python; /* opened there, or rewound after the directory had become Python's */
    uint64_t position;
};
static struct listing *listings[LISTING_CHAINS];
static uint64_t last_listing;

struct raw_dirent { /* linux_dirent64, getdents64(2) */
    uint64_t ino;
    int64_t off;
    unsigned short length;
    unsigned char type;
    char name[];
};

static struct order directories;

static bool is_dots(const char *name)
{
    return !strcmp(name, ".") || !strcmp(name, "..");
}

void image_withdraw(struct node *node)
{
    struct directory *directory = node->directory;
    if (!directory)
        return;
    use_end(&directory->use);
    for (int i = 0; i < directory->count; i++)
        close(directory->fds[i]);
    free(directory);
    node->directory = NULL;
}

bool image_serve(struct node *node, const int *fds, int count, bool bottom, uint64_t numbering)
{
    struct stat stat;
    struct directory *directory = calloc(1, sizeof *directory);
    if (!directory)
        return false;
    for (; directory->count < count; directory->count++) {
        int fd = fcntl(fds[directory->count], F_DUPFD_CLOEXEC, 0);
        if (fd < 0)
            break;
        directory->fds[directory->count] = fd;
    }
    if (directory->count < count || fstat(directory->fds[count - 1], &stat)) {
        while (directory->count)
            close(directory->fds[--directory->count]);
        free(directory);
        return false;
    }
    directory->bottom = bottom;
    directory->device = stat.st_dev;
    directory->numbering = numbering;
    image_withdraw(node);
    node->directory = directory;
    use_now(&directories, &directory->use, node);
    if (directories.count > DIRECTORIES_LIMIT)
        image_withdraw(directories.oldest->node);
    return true;
}

static bool is_current(const struct node *node)
{
    return !node->python && node->generation == state.generation;
}

/* Return the directory of a node, opened if it is the image's. NULL: Python's business. */
static struct directory *directory_of(struct node *node)
{
    if (node->directory) {
        use_now(&directories, &node->directory->use, node);
        return node->directory;
    }
    if (!is_current(node) || !S_ISDIR(node->type))
        return NULL;
    struct directory *above = directory_of(node->parent);
    if (!above)
        return NULL;
    struct open_how how = {
        .flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
    };
    int fd = syscall(SYS_openat2, above->fds[above->count - 1], node->name, &how, sizeof how);
    if (fd < 0)
        return NULL;
    uint64_t device = above->device;
    bool served = image_serve(node, &fd, 1, true, above->numbering);
    close(fd);
    if (served && node->directory->device != device) /* a subvolume: other inode numbers */
        image_withdraw(node);
    return node->directory;
}

/* Return the bottom layer's part of the directory that an object of the image is in, or -1. */
static int parent_of(struct node *node)
{
    if (!node || !is_current(node))
        return -1;
    struct directory *directory = directory_of(node->parent);
    return directory ? directory->fds[directory->count - 1] : -1;
}

static void fill_attributes(struct fuse_attr *attr, const struct stat *stat, uint64_t number)
{
    attr->ino = number & ~VERSION_MASK;
    attr->size = stat->st_size;
    attr->blocks = stat->st_blocks;
    attr->atime = stat->st_atim.tv_sec;
    attr->mtime = stat->st_mtim.tv_sec;
    attr->ctime = stat->st_ctim.tv_sec;
    attr->atimensec = stat->st_atim.tv_nsec;
    attr->mtimensec = stat->st_mtim.tv_nsec;
    attr->ctimensec = stat->st_ctim.tv_nsec;
    attr->mode = stat->st_mode;
    attr->nlink = stat->st_nlink;
    attr->uid = stat->st_uid;
    attr->gid = stat->st_gid;
    attr->rdev = stat->st_rdev;
    attr->blksize = stat->st_blksize;
}

/* Say whether an object of the bottom layer is just what it looks like: no whiteout, no hard link
 * (whose copy may be in the upper under another name), not of another file system. */
static bool is_plain(const struct directory *directory, const struct stat *stat)
{
    return (S_ISDIR(stat->st_mode) || stat->st_nlink == 1) &&
           !(S_ISCHR(stat->st_mode) && stat->st_rdev == 0) && stat->st_dev == directory->device &&
           stat->st_ino < 1ull << INODE_BITS;
}

/* Give the kernel a reference to the object `name` of the image. NULL: Python's business. */
static struct node *refer(struct node *parent, const char *name, const struct stat *stat)
{
    uint64_t number = parent->directory->numbering | stat->st_ino;
    struct node *node = node_find(number);
    if (!node) {
        node = node_get(number);
        if (!node || !node_place(node, parent, name))
            return NULL;
        node->type = stat->st_mode & S_IFMT;
        journal_placed(number, node->type, parent->number, name, strlen(name));
    } else if (node->python || node->parent != parent || strcmp(node->name, name) ||
               node->type != (stat->st_mode & S_IFMT)) {
        return NULL;
    }
    node->generation = state.generation;
    node->inherited = false;
    node->lookups++;
    journal_lookups(number, 1);
    return node;
}

static void fill_entry(struct fuse_entry_out *entry, const struct stat *stat, uint64_t number)
{
    entry->nodeid = number;
    entry->entry_valid = entry->attr_valid = FOREVER;
    fill_attributes(&entry->attr, stat, number);
}

/* Say whether only the bottom layer has a say in `name`, and what it has: 0, or an errno. */
static bool find(const struct directory *directory, const char *name, struct stat *stat, int *found)
{
    for (int i = 0; i < directory->count; i++) {
        *found = fstatat(directory->fds[i], name, stat, AT_SYMLINK_NOFOLLOW) ? errno : 0;
        if (*found && *found != ENOENT)
            return false;
        if (!*found && (i < directory->count - 1 || !directory->bottom))
            return false;
    }
    return *found || is_plain(directory, stat);
}

bool answer_lookup(struct request *request)
{
    struct fuse_entry_out entry = {0};
    struct stat stat;
    const char *name = request->body;
    struct node *node, *parent = node_find(request->in->nodeid);
    struct directory *directory = parent ? directory_of(parent) : NULL;
    int found = 0;

    if (!directory || !find(directory, name, &stat, &found))
        return false;
    if (found) {
        entry.entry_valid = missing_remember(parent->number, name);
        reply(request, &entry, sizeof entry);
        return true;
    }
    node = refer(parent, name, &stat);
    if (!node)
        return false;
    fill_entry(&entry, &stat, node->number);
    if (reply(request, &entry, sizeof entry))
        transport_forget(node->number, 1); /* the caller was interrupted */
    return true;
}

bool answer_getattr(struct request *request)
{
    struct fuse_attr_out out = {.attr_valid = FOREVER};
    struct stat stat;
    struct node *node = node_find(request->in->nodeid);
    int parent = parent_of(node);

    if (parent < 0 || fstatat(parent, node->name, &stat, AT_SYMLINK_NOFOLLOW))
        return false;
    fill_attributes(&out.attr, &stat, node->number);
    reply(request, &out, sizeof out);
    return true;
}

bool answer_readlink(struct request *request)
{
    char target[4096];
    struct node *node = node_find(request->in->nodeid);
    int parent = parent_of(node);
    ssize_t length = parent < 0 ? -1 : readlinkat(parent, node->name, target, sizeof target);

    if (length < 0)
        return false;
    reply(request, target, length);
    return true;
}

int image_open(struct node *node)
{
    int parent = parent_of(node);
    if (parent < 0 || !S_ISREG(node->type))
        return -1;
    return openat(parent, node->name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

/* Extended attributes are reached through /proc, whose last step is no symlink. */
static bool xattr_path(char *path, size_t size, struct node *node)
{
    int parent = parent_of(node);
    return parent >= 0 && snprintf(path, size, "/proc/self/fd/%d/%s", parent, node->name) < (int)size;
}

static void reply_sized(const struct request *request, uint32_t wanted, const char *value, size_t size)
{
    struct fuse_getxattr_out out = {.size = size};
    if (!wanted)
        reply(request, &out, sizeof out);
    else if (size > wanted)
        reply_error(request, ERANGE);
    else
        reply(request, value, size);
}

bool answer_getxattr(struct request *request)
{
    static char value[XATTR_LIMIT];
    char path[64 + NAME_MAX];
    const struct fuse_getxattr_in *in = request->body;
    const char *name = (const char *)(in + 1);
    struct node *node = node_find(request->in->nodeid);
    ssize_t size;

    if (strstr(name, "overlay."))
        return false;
    /* Contents of the image may be those of a file that has its attributes in the upper. */
    if (node && node->python && node->contents && node->contents->writable &&
        !node->contents->stale && !node->contents->kept)
        size = fgetxattr(node->contents->fd, name, value, sizeof value);
    else if (xattr_path(path, sizeof path, node))
        size = lgetxattr(path, name, value, sizeof value);
    else
        return false;
    if (size >= 0)
        reply_sized(request, in->size, value, size);
    else if (errno == ENODATA || errno == EOPNOTSUPP)
        reply_error(request, ENODATA);
    else
        return false;
    return true;
}

bool answer_listxattr(struct request *request)
{
    static char names[XATTR_LIMIT];
    char path[64 + NAME_MAX];
    const struct fuse_getxattr_in *in = request->body;

    if (!xattr_path(path, sizeof path, node_find(request->in->nodeid)))
        return false;
    ssize_t size = llistxattr(path, names, sizeof names);
    if (size < 0 && errno == EOPNOTSUPP)
        size = 0;
    if (size < 0)
        return false;
    for (char *name = names; name < names + size; name += strlen(name) + 1)
        if (strstr(name, "overlay.") || !strncmp(name, "trusted.", 8))
            return false; /* not for everyone to see */
    reply_sized(request, in->size, names, size);
    return true;
}

static int open_listing(int directory)
{
    return openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static bool is_empty(int directory)
{
    char entries[512] __attribute__((aligned(8)));
    int fd = open_listing(directory);
    ssize_t got = fd < 0 ? -1 : syscall(SYS_getdents64, fd, entries, sizeof entries);
    bool empty = got >= 0;
    for (char *at = entries; at < entries + got && empty; at += ((struct raw_dirent *)at)->length)
        empty = is_dots(((struct raw_dirent *)at)->name);
    if (fd >= 0)
        close(fd);
    return empty;
}

/* Return the directory of a node if only the bottom layer has anything in it. */
static struct directory *plain_directory(struct node *node)
{
    struct directory *directory = node ? directory_of(node) : NULL;
    for (int i = 0; directory && i < directory->count - 1; i++)
        if (!is_empty(directory->fds[i]))
            return NULL;
    return directory && directory->bottom ? directory : NULL;
}

static struct listing **listing_link(uint64_t handle)
{
    struct listing **link = &listings[handle % LISTING_CHAINS];
    while (*link && (*link)->handle != handle)
        link = &(*link)->next;
    return link;
}

static struct listing *listing_of(uint64_t handle)
{
    return *listing_link(handle);
}

static struct listing *listing_new(uint64_t handle, uint64_t number, int fd)
{
    struct listing *listing = calloc(1, sizeof *listing);
    if (!listing)
        return NULL;
    struct listing **chain = &listings[handle % LISTING_CHAINS];
    *listing = (struct listing){.next = *chain, .handle = handle, .number = number, .fd = fd};
    return *chain = listing;
}

/* Take a listing over from a predecessor. */
bool listing_inherit(uint64_t handle, uint64_t number, bool python)
{
    struct listing *listing = listing_new(handle, number, -1);
    if (!listing)
        return false;
    listing->python = python || !(handle & OURS);
    if ((handle & ~OURS) > last_listing)
        last_listing = handle & ~OURS;
    return true;
}

/* Go on with an inherited listing; `fd` is taken over. */
bool listing_reopen(uint64_t handle, int fd, uint64_t numbering)
{
    struct listing *listing = listing_of(handle);
    if (!listing || listing->fd >= 0)
        return false;
    listing->fd = fd;
    listing->numbering = numbering;
    return true;
}

/* Show the listings that have to be opened again. */
void listing_each_inherited(void (*visit)(uint64_t handle, uint64_t number, void *), void *argument)
{
    for (size_t i = 0; i < LISTING_CHAINS; i++)
        for (const struct listing *listing = listings[i]; listing; listing = listing->next)
            if (listing->fd < 0 && !listing->python)
                visit(listing->handle, listing->number, argument);
}

/* The largest handle so far, but for the bit. */
uint64_t listing_last(void)
{
    return last_listing;
}

void listing_close(uint64_t handle)
{
    struct listing **link = listing_link(handle), *listing = *link;
    journal_unlisted(handle);
    if (!listing)
        return;
    *link = listing->next;
    if (listing->fd >= 0)
        close(listing->fd);
    free(listing);
}

bool answer_opendir(struct request *request)
{
    struct node *node = node_find(request->in->nodeid);
    struct directory *directory = plain_directory(node);
    struct listing *listing;
    int fd = directory ? open_listing(directory->fds[directory->count - 1]) : -1;

    if (fd < 0 || !(listing = listing_new(OURS | ++last_listing, node->number, fd))) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    listing->numbering = directory->numbering;
    journal_listed(listing->handle, node->number);
    struct open_out out = {
        .fh = listing->handle,
        .open_flags = FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
    };
    reply(request, &out, sizeof out);
    return true;
}

bool answer_releasedir(struct request *request)
{
    const struct fuse_release_in *in = request->body;
    struct listing *listing = listing_of(in->fh);
    bool python = listing ? listing->python : !(in->fh & OURS);

    listing_close(in->fh);
    if (!python)
        reply(request, NULL, 0);
    return !python;
}

uint64_t image_listed(uint64_t handle)
{
    struct listing *listing = listing_of(handle);
    return listing ? listing->number : 0;
}

/* Add one entry to a listing, for READDIRPLUS with attributes if it is plain; return its size, 0 if
 * it does not fit. */
static size_t list_one(struct node *parent, const struct listing *listing,
                       const struct raw_dirent *raw, char *buffer, size_t room, bool plus)
{
    size_t length = strlen(raw->name), head = plus ? sizeof(struct fuse_entry_out) : 0;
    size_t size = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + length);
    struct directory *directory = parent->directory;
    struct fuse_entry_out *entry = (struct fuse_entry_out *)buffer;
    struct fuse_dirent *dirent = (struct fuse_dirent *)(buffer + head);
    struct node *node;
    struct stat stat;
    int found = 0;

    if (size > room)
        return 0;
    memset(buffer, 0, size);
    *dirent = (struct fuse_dirent){
        .ino = raw->ino | listing->numbering,
        .off = raw->off,
        .namelen = length,
        .type = raw->type,
    };
    memcpy(dirent->name, raw->name, length);
    if (plus && directory && !is_dots(raw->name) && find(directory, raw->name, &stat, &found) &&
        !found && (node = refer(parent, raw->name, &stat)))
        fill_entry(entry, &stat, node->number);
    return size;
}

static bool is_whiteout(int fd, const struct raw_dirent *raw)
{
    struct stat stat;
    return raw->type == DT_CHR && !fstatat(fd, raw->name, &stat, AT_SYMLINK_NOFOLLOW) &&
           S_ISCHR(stat.st_mode) && stat.st_rdev == 0;
}

/* Fill `buffer` from where the listing stands; return the number of bytes, or -1. */
static ssize_t list(struct node *node, struct listing *listing, char *buffer, size_t size, bool plus)
{
    static char raw_entries[LISTING_BUFFER] __attribute__((aligned(8)));
    size_t used = 0;

    for (;;) {
        ssize_t got = syscall(SYS_getdents64, listing->fd, raw_entries, sizeof raw_entries);
        if (got <= 0)
            return used ? (ssize_t)used : got;
        for (char *at = raw_entries; at < raw_entries + got;) {
            const struct raw_dirent *raw = (const struct raw_dirent *)at;
            if (!is_whiteout(listing->fd, raw)) {
                size_t added = list_one(node, listing, raw, buffer + used, size - used, plus);
                if (!added) {
                    lseek(listing->fd, listing->position, SEEK_SET);
                    return used;
                }
                used += added;
            }
            listing->position = raw->off;
            at += raw->length;
        }
    }
}

bool answer_readdir(struct request *request)
{
    static char buffer[1 << 20] __attribute__((aligned(8)));
    bool plus = request->in->opcode == FUSE_READDIRPLUS;
    struct fuse_read_in *in = request->body;
    struct listing *listing = listing_of(in->fh);
    struct node *node = node_find(request->in->nodeid);

    if (listing && node && listing->handle & OURS && in->offset == 0) {
        /* Opened, or rewound, which shows what is there now. */
        if (!listing->python && !plain_directory(node)) {
            listing->python = true;
            journal_turned(listing->handle);
        }
    }
    if (!listing || !node || listing->python || listing->fd < 0) {
        if (!plus) /* pyfuse3 does not know READDIR */
            in->fh |= NAMES_ONLY;
        request->in->opcode = FUSE_READDIRPLUS;
        return false;
    }
    if (in->offset != listing->position && lseek(listing->fd, in->offset, SEEK_SET) < 0) {
        reply_error(request, errno);
        return true;
    }
    listing->position = in->offset;
    directory_of(node); /* for `list`, if it can be had */
    ssize_t size =
        list(node, listing, buffer, in->size < sizeof buffer ? in->size : sizeof buffer, plus);
    if (size < 0)
        reply_error(request, errno);
    else
        reply(request, buffer, size);
    return true;
}
