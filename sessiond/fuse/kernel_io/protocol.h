/* What <linux/fuse.h> of Debian 12 (protocol 7.38) does not know yet; values as in the kernel's. */
#ifndef SESSIOND_PROTOCOL_H
#define SESSIOND_PROTOCOL_H

#include <errno.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define OPCODE_TMPFILE 51           /* 6.3 */
#define OPCODE_COPY_FILE_RANGE_64 53 /* 6.18 */

/* Error by which Python asks to have a request tried here once more; the kernel never sees it. No
 * file system means it, but libfuse lets it pass (3.17 refuses numbers that are none of errno(3)'s). */
#define TRY_AGAIN EDOTDOT

/* In the handle of a READDIRPLUS that Python is asked for in place of a READDIR. */
#define NAMES_ONLY (1ull << 62)

/* In the number of a request that was sent before, to a process that has died. */
#define RESENT (1ull << 63)         /* 6.9 */
#define NOTIFY_RESEND 7

#define OPEN_PASSTHROUGH (1u << 7)  /* 6.9 */

/* In flags2 of INIT. */
#define INIT2_PASSTHROUGH (1u << 5) /* 6.9 */
#define INIT2_HAS_RESEND (1u << 7)  /* 6.9 */

struct backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define DEV_IOC_BACKING_OPEN _IOW(229, 1, struct backing_map)
#define DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

struct init_out { /* fuse_init_out with max_stack_depth */
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth, unused[6];
};

struct open_out { /* fuse_open_out with backing_id */
    uint64_t fh;
    uint32_t open_flags;
    int32_t backing_id;
};

struct copy_file_range_out {
    uint64_t bytes_copied;
};

#endif
