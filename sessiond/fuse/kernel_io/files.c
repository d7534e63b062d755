/* The contents of files: by passthrough, where the kernel reads and writes by itself, or read and
 * written here. Python decides which file holds the contents of a node, and opens it. */
#include "kernel_io.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Files kept open after the last close. Of those that were written it is to be found out at each
 * snapshot whether they are mapped. */
#define IDLE_LIMIT 4096
#define WRITTEN_LIMIT 256
#define READ_LIMIT (1 << 20)

static struct order idle, written;

void contents_close(struct node *node)
{
    struct contents *contents = node->contents;
    if (!contents)
        return;
    if (contents->backing)
        ioctl(state.device, DEV_IOC_BACKING_CLOSE, &contents->backing);
    if (contents->backing || contents->mapped)
        journal_contents(node->number, NULL);
    use_end(&contents->use);
    if (contents->fd >= 0)
        close(contents->fd);
    free(contents);
    node->contents = NULL;
}

static bool open_again(struct contents *contents, int flags)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", contents->fd);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        return false;
    close(contents->fd);
    contents->fd = fd;
    contents->for_writing = flags == O_RDWR;
    return true;
}

/* A mapping has a reference to the file beneath, and none to the one that was opened. A read lease is
 * refused while someone has the file open for writing (fcntl(2)). */
bool contents_mapped(struct contents *contents)
{
    if (!contents->mapped || contents->fd < 0 ||
        (contents->for_writing && !open_again(contents, O_RDONLY)))
        return contents->mapped;
    contents->mapped = fcntl(contents->fd, F_SETLEASE, F_RDLCK) && errno == EAGAIN;
    fcntl(contents->fd, F_SETLEASE, F_UNLCK);
    return contents->mapped;
}

/* Close some of those that nobody has open. */
static void trim(struct order *order, size_t limit)
{
    for (size_t seen = 0; order->count > limit && seen < limit; seen++) {
        struct use *oldest = order->oldest;
        if (contents_mapped(oldest->node->contents))
            use_now(order, oldest, oldest->node);
        else
            contents_close(oldest->node);
    }
}

static void rest(struct node *node)
{
    use_now(node->contents->mapped ? &written : &idle, &node->contents->use, node);
}

/* Take over `fd` as the contents of `node`. False, and `fd` is closed, if the kernel has another
 * file of this node open: it accepts one backing file for an inode at a time. */
bool contents_set(struct node *node, int fd, bool writable)
{
    struct stat stat;
    struct contents *contents = node->contents;

    if (fstat(fd, &stat) || !S_ISREG(stat.st_mode))
        goto failed;
    if (contents && contents->backing && contents->opens) {
        if (contents->device != stat.st_dev || contents->inode != stat.st_ino)
            goto failed;
        if (contents->fd >= 0) {
            close(fd);
        } else {
            contents->fd = fd;
            contents->for_writing = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
        }
        contents->writable = writable;
        contents->stale = false;
        return true;
    }
    struct contents *fresh = calloc(1, sizeof *fresh);
    if (!fresh)
        goto failed;
    *fresh = (struct contents){
        .fd = fd,
        .for_writing = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR,
        .writable = writable,
        .device = stat.st_dev,
        .inode = stat.st_ino,
    };
    if (contents) {
        fresh->mapped = contents->mapped && contents->inode == fresh->inode;
        fresh->kept = contents->kept && contents->inode == fresh->inode;
        fresh->closes = contents->closes;
        fresh->opens = contents->opens;
        fresh->writers = contents->writers;
        fresh->refused = contents->opens; /* read and written here until the last close */
        contents_close(node);
    }
    node->contents = fresh;
    if (!fresh->opens && !fresh->kept)
        rest(node);
    trim(&idle, IDLE_LIMIT);
    trim(&written, WRITTEN_LIMIT);
    return true;

failed:
    close(fd);
    return false;
}

/* The node's contents are in another file from now on. Who has it open by passthrough keeps it. */
void contents_retire(struct node *node)
{
    if (node->contents && !node->contents->opens && !node->contents->kept &&
        !contents_mapped(node->contents))
        contents_close(node);
    else if (node->contents && !node->contents->kept)
        node->contents->stale = true;
}

/* Have the contents stay what they are, until they are finished. */
void contents_keep(struct node *node, bool kept)
{
    if (!node->contents)
        return;
    use_end(&node->contents->use);
    node->contents->kept = kept;
    if (!kept && !node->contents->opens)
        rest(node);
}

/* Close contents that were kept, unless someone may write to them, or has done so since they had been
 * closed that often. */
bool contents_finish(struct node *node, uint32_t closes)
{
    struct contents *contents = node->contents;
    if (contents && (contents->opens || contents->closes != closes || contents_mapped(contents)))
        return false;
    contents_close(node);
    node_forget(node, 0);
    return true;
}

/* Return what the node's descriptors read, and would write. NULL: Python has to say. */
static struct contents *contents_of(struct node *node)
{
    if (node && !node->contents) {
        int fd = image_open(node);
        if (fd >= 0)
            contents_set(node, fd, false);
    }
    if (!node || !node->contents || node->contents->fd < 0 ||
        (node->contents->stale && !node->contents->backing))
        return NULL;
    if (!node->contents->opens && !node->contents->kept)
        rest(node);
    return node->contents;
}

/* Return contents that may be changed here and now. */
static struct contents *changeable(struct node *node)
{
    struct contents *contents = state.held ? NULL : contents_of(node);
    if (!contents || !contents->writable)
        return NULL;
    return contents->for_writing || open_again(contents, O_RDWR) ? contents : NULL;
}

static void count(struct node *node, uint32_t flags)
{
    use_end(&node->contents->use);
    node->contents->opens++;
    node->contents->writers += is_write(flags);
    journal_opened(node->number, flags);
}

/* Count an open, and say how the kernel is to treat it. */
void contents_opened(struct node *node, uint32_t flags, struct open_out *out)
{
    struct contents *contents = node->contents;

    count(node, flags);
    if (state.passthrough && !contents->backing && !contents->refused) {
        /* The kernel opens it again as it is needed. Held open for writing here, it would look as if
         * it were mapped so (contents_mapped). */
        if (contents->for_writing)
            open_again(contents, O_RDONLY);
        struct backing_map map = {.fd = contents->fd};
        int id = ioctl(state.device, DEV_IOC_BACKING_OPEN, &map);
        contents->backing = id > 0 ? id : 0;
        contents->refused = !contents->backing;
        journal_contents(node->number, contents);
    }
    if (contents->backing) {
        out->open_flags = OPEN_PASSTHROUGH | FOPEN_NOFLUSH;
        out->backing_id = contents->backing;
    } else {
        out->open_flags |= FOPEN_NOFLUSH;
    }
}

bool answer_open(struct request *request)
{
    const struct fuse_open_in *in = request->body;
    struct open_out out = {.open_flags = FOPEN_KEEP_CACHE};
    struct node *node = node_find(request->in->nodeid);
    struct contents *contents;
    struct stat stat;

    if (state.path == CACHED) { /* once: from then on the kernel opens and closes by itself */
        reply_error(request, ENOSYS);
        return true;
    }
    if (in->flags & O_TRUNC || !(contents = contents_of(node)) || contents->stale)
        return false;
    if (is_write(in->flags) &&
        (state.held || !contents->writable || fstat(contents->fd, &stat) ||
         stat.st_mode & (S_ISUID | S_ISGID)))
        return false;
    contents_opened(node, in->flags, &out);
    reply(request, &out, sizeof out);
    return true;
}

/* What was written through a mapping has changed times that the kernel has cached. */
static void notify_attributes(uint64_t number)
{
    struct {
        struct fuse_out_header head;
        struct fuse_notify_inval_inode_out body;
    } out = {
        .head = {.len = sizeof out, .error = FUSE_NOTIFY_INVAL_INODE},
        .body = {.ino = number, .off = -1},
    };
    if (write(state.device, &out, sizeof out) < 0)
        return; /* it is not cached any more */
}

/* Undo `count`. */
static void uncount(struct node *node, uint32_t flags)
{
    struct contents *contents = node->contents;
    journal_closed(node->number, flags);
    contents->opens--;
    contents->closes++;
    if (is_write(flags)) {
        contents->writers -= contents->writers > 0;
        contents->mapped |= contents->backing != 0;
        notify_attributes(node->number);
    }
}

void contents_closed(struct node *node, uint32_t flags)
{
    struct contents *contents = node->contents;
    if (!contents || !contents->opens)
        return;
    uncount(node, flags);
    if (contents->opens)
        return;
    rest(node);
    if (contents->stale)
        contents_close(node);
    node_forget(node, 0);
}

/* Take over what is open from a predecessor. Which file it is Python has to say. */
bool contents_inherit(struct node *node, const struct life *life)
{
    struct contents *contents = calloc(1, sizeof *contents);
    if (!contents)
        return false;
    *contents = (struct contents){
        .fd = -1,
        .stale = true,
        .backing = life->backing,
        .refused = !life->backing,
        .mapped = life->mapped,
        .opens = life->opens,
        .writers = life->writers,
        .device = life->device,
        .inode = life->inode,
    };
    node->contents = contents;
    if (!contents->opens && (!contents->mapped || !life->names)) /* removed: no layer has it */
        contents_close(node);
    else if (!contents->opens)
        rest(node);
    return true;
}

bool answer_release(struct request *request)
{
    struct fuse_release_in *in = request->body;
    struct node *node = node_find(request->in->nodeid);
    struct contents *contents = node ? node->contents : NULL;

    if (contents && contents->kept && contents->opens == 1) {
        state.unique = 0; /* not taken back: Python replies later */
        uncount(node, in->flags);
        in->fh = request->in->nodeid;
        return false;
    }
    if (node)
        contents_closed(node, in->flags);
    reply(request, NULL, 0);
    return true;
}

bool answer_read(struct request *request)
{
    static char buffer[READ_LIMIT];
    struct fuse_read_in *in = request->body;
    struct contents *contents = contents_of(node_find(request->in->nodeid));

    if (!contents) {
        in->fh = request->in->nodeid; /* all that pyfuse3 will tell of the node */
        return false;
    }
    ssize_t size = pread(contents->fd, buffer, in->size < READ_LIMIT ? in->size : READ_LIMIT,
                         in->offset);
    if (size < 0)
        reply_error(request, errno);
    else
        reply(request, buffer, size);
    return true;
}

/* As a write by someone without CAP_FSETID does (file_remove_privs). */
static void drop_privileges(const struct contents *contents)
{
    struct stat stat;
    if (fstat(contents->fd, &stat) || !(stat.st_mode & (S_ISUID | S_ISGID)))
        return;
    mode_t dropped = S_ISUID | (stat.st_mode & S_IXGRP ? S_ISGID : 0);
    fchmod(contents->fd, stat.st_mode & 07777 & ~dropped);
}

bool answer_write(struct request *request)
{
    struct fuse_write_in *in = request->body;
    struct contents *contents = changeable(node_find(request->in->nodeid));
    struct fuse_write_out out = {0};

    if (!contents && in->write_flags & FUSE_WRITE_KILL_SUIDGID)
        return ask_for_contents(request, request->in->nodeid, true); /* pyfuse3 hides the flag */
    if (!contents) {
        in->fh = request->in->nodeid;
        return false;
    }
    if (in->write_flags & FUSE_WRITE_KILL_SUIDGID)
        drop_privileges(contents);
    while (out.size < in->size) {
        ssize_t written = pwrite(contents->fd, (const char *)(in + 1) + out.size,
                                 in->size - out.size, in->offset + out.size);
        if (written < 0 && !out.size) {
            reply_error(request, errno);
            return true;
        }
        if (written <= 0)
            break;
        out.size += written;
    }
    reply(request, &out, sizeof out);
    return true;
}

bool answer_fsync(struct request *request)
{
    struct fuse_fsync_in *in = request->body;
    in->fh = request->in->nodeid;
    return false; /* it may take long: Python has threads for that */
}

bool answer_lseek(struct request *request)
{
    const struct fuse_lseek_in *in = request->body;
    struct contents *contents = contents_of(node_find(request->in->nodeid));

    if (!contents)
        return ask_for_contents(request, request->in->nodeid, false);
    off_t offset = lseek(contents->fd, in->offset, in->whence);
    struct fuse_lseek_out out = {.offset = offset};
    if (offset < 0)
        reply_error(request, errno);
    else
        reply(request, &out, sizeof out);
    return true;
}

bool answer_fallocate(struct request *request)
{
    const struct fuse_fallocate_in *in = request->body;
    struct contents *contents = changeable(node_find(request->in->nodeid));

    if (!contents)
        return ask_for_contents(request, request->in->nodeid, true);
    drop_privileges(contents);
    reply_error(request, fallocate(contents->fd, in->mode, in->offset, in->length) ? errno : 0);
    return true;
}

bool answer_copy_file_range(struct request *request)
{
    const struct fuse_copy_file_range_in *in = request->body;
    struct contents *source = contents_of(node_find(request->in->nodeid));
    struct contents *target = changeable(node_find(in->nodeid_out));
    off_t from = in->off_in, to = in->off_out;

    if (!source)
        return ask_for_contents(request, request->in->nodeid, false);
    if (!target)
        return ask_for_contents(request, in->nodeid_out, true);
    drop_privileges(target);
    ssize_t copied = copy_file_range(source->fd, &from, target->fd, &to, in->len, 0);
    if (copied < 0) {
        reply_error(request, errno == EXDEV ? EOPNOTSUPP : errno); /* the kernel copies by itself */
    } else if (request->in->opcode == OPCODE_COPY_FILE_RANGE_64) {
        struct copy_file_range_out out = {.bytes_copied = copied};
        reply(request, &out, sizeof out);
    } else {
        struct fuse_write_out out = {.size = copied};
        reply(request, &out, sizeof out);
    }
    return true;
}
