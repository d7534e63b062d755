/* Python's replies, amended on their way to the kernel. */
#include "kernel_io.h"

#include <string.h>

/* Return the part of a reply that starts `offset` bytes after the header, if `size` bytes are there
 * in one piece: libfuse sends each structure as a part, or several in one. */
static void *at(struct iovec *parts, int count, size_t offset, size_t size)
{
    for (int i = 0; i < count; i++) {
        if (offset + size <= parts[i].iov_len)
            return (char *)parts[i].iov_base + offset;
        if (offset < parts[i].iov_len)
            return NULL;
        offset -= parts[i].iov_len;
    }
    return NULL;
}

/* With passthrough hardly anything is written here, so buffers may be small. */
uint32_t largest_write(void)
{
    return state.path == PASSTHROUGH ? 1 << 17 : 1 << 20;
}

/* Ask for what the kernel offers and libfuse or pyfuse3 does not know. */
void amend_init(const struct fuse_init_in *in, struct iovec *parts, int count)
{
    struct init_out *out = at(parts, count, 0, sizeof *out);
    uint32_t wanted = FUSE_CACHE_SYMLINKS | FUSE_EXPLICIT_INVAL_DATA | FUSE_HANDLE_KILLPRIV_V2;

    if (!out)
        return;
    out->flags |= in->flags & wanted;
    if (out->max_write > largest_write())
        out->max_write = largest_write();
    out->flags |= in->flags & FUSE_READDIRPLUS_AUTO;
    if (in->flags & FUSE_EXPLICIT_INVAL_DATA)
        out->flags &= ~FUSE_AUTO_INVAL_DATA;
    if (state.path == CACHED) /* or O_TRUNC would be lost with the OPEN that is not sent */
        out->flags &= ~FUSE_ATOMIC_O_TRUNC;
    if (state.path == PASSTHROUGH && in->flags & FUSE_INIT_EXT && in->flags2 & INIT2_PASSTHROUGH) {
        out->flags |= FUSE_INIT_EXT;
        out->flags2 |= INIT2_PASSTHROUGH;
        out->max_stack_depth = 1; /* so that the mount can itself be a layer of the kernel's overlay */
        state.passthrough = true;
    }
    if (in->flags & FUSE_INIT_EXT && in->flags2 & INIT2_HAS_RESEND) {
        out->flags |= FUSE_INIT_EXT;
        out->flags2 |= INIT2_HAS_RESEND;
    }
}

/* A reply that gives the kernel a reference. */
static void given(struct fuse_entry_out *entry)
{
    entry->attr.ino &= ~VERSION_MASK;
    if (!entry->nodeid)
        return;
    struct node *node = node_get(entry->nodeid);
    if (node) {
        node->lookups++;
        journal_lookups(entry->nodeid, 1);
    }
}

void amend_entry(struct iovec *parts, int count)
{
    struct fuse_entry_out *entry = at(parts, count, 0, sizeof *entry);
    if (entry)
        given(entry);
}

void amend_attributes(struct iovec *parts, int count)
{
    struct fuse_attr_out *out = at(parts, count, 0, sizeof *out);
    if (out)
        out->attr.ino &= ~VERSION_MASK;
}

void amend_listing(struct iovec *parts, int count)
{
    if (count < 1)
        return;
    char *entry = parts[0].iov_base, *end = entry + parts[0].iov_len;
    while (entry + FUSE_NAME_OFFSET_DIRENTPLUS < end) {
        struct fuse_direntplus *plus = (struct fuse_direntplus *)entry;
        const struct fuse_dirent *dirent = &plus->dirent;
        plus->dirent.ino &= ~VERSION_MASK;
        if (!(dirent->namelen == 1 && dirent->name[0] == '.') &&
            !(dirent->namelen == 2 && !memcmp(dirent->name, "..", 2)))
            given(&plus->entry_out); /* of the dots the kernel keeps none */
        entry += FUSE_DIRENTPLUS_SIZE(plus);
    }
}

void amend_names(struct iovec *parts, int count)
{
    if (count < 1)
        return;
    char *from = parts[0].iov_base, *to = from, *end = from + parts[0].iov_len;
    while (from + FUSE_NAME_OFFSET_DIRENTPLUS < end) {
        struct fuse_direntplus *plus = (struct fuse_direntplus *)from;
        size_t size = FUSE_DIRENT_SIZE(&plus->dirent);
        from += FUSE_DIRENTPLUS_SIZE(plus);
        plus->dirent.ino &= ~VERSION_MASK;
        memmove(to, &plus->dirent, size);
        to += size;
    }
    parts[0].iov_len = to - (char *)parts[0].iov_base;
}

void amend_open(uint64_t number, uint32_t flags, struct iovec *parts, int count)
{
    struct open_out *out = at(parts, count, 0, sizeof *out);
    struct node *node = node_find(number);
    if (out && node && node->contents)
        contents_opened(node, flags, out);
}

void amend_create(uint32_t flags, struct iovec *parts, int count)
{
    struct fuse_entry_out *entry = at(parts, count, 0, sizeof *entry);
    struct open_out *out = at(parts, count, sizeof *entry, sizeof *out);
    if (!entry || !out)
        return;
    given(entry);
    struct node *node = node_find(entry->nodeid);
    if (state.path != CACHED && node && node->contents)
        contents_opened(node, flags, out);
}

void amend_opendir(uint64_t number, struct iovec *parts, int count)
{
    struct open_out *out = at(parts, count, 0, sizeof *out);
    if (!out)
        return;
    out->open_flags |= FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE;
    journal_listed(out->fh, number);
}
