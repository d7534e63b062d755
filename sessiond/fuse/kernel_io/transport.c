/* Between /dev/fuse and libfuse: a thread reads requests, answers those it can, and hands the others to
 * Python through a queue. libfuse is given an eventfd in place of the device, which is readable while
 * there is something in the queue. */
#define FUSE_USE_VERSION 314
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernel_io.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define HEADERS 4096 /* before the data of a write, at most */
#define PENDING_CHAINS 128
#define FORGET_LIMIT 256
#define FORGET_DELAY 2 /* milliseconds */
#define PATIENCE 50000 /* nanoseconds */
#define TRIES_LIMIT 3 /* for contents: of two files at most, which may be moved meanwhile */

struct state state = {.lock = PTHREAD_MUTEX_INITIALIZER, .device = -1};

/* A request on its way to Python. */
struct message {
    struct message *next;
    int tries; /* of a request that waits for contents */
    size_t size;
    char data[] __attribute__((aligned(8)));
};

/* What has to be known of a request when Python's reply comes. */
struct pending {
    struct pending *next;
    uint64_t unique, nodeid;
    uint32_t opcode, flags;
    struct fuse_init_in init;
    bool names_only;
    struct message *retry; /* a request that may be tried again */
    bool contents;         /* and is, since it waits for contents; see ask_for_contents */
};

static struct forgotten { /* a BATCH_FORGET in the making, for Python */
    struct fuse_in_header head;
    struct fuse_batch_forget_in batch;
    struct fuse_forget_one items[FORGET_LIMIT + 1];
} forgotten;

static struct message *queue, **queue_end = &queue;
static struct pending *pending[PENDING_CHAINS];
static char *own_buffer; /* of Python's thread */
static int wake = -1;
static bool ended;
static uint32_t resent; /* the opcode of the request that Python was given last, if sent before */
static bool replaying; /* libfuse has yet to reply to a predecessor's first request */
static bool patient; /* there are processors to spare */
static bool lingering; /* Python is to look out for the next request */
static int tries; /* of the request that is being tried again */

/* The table of opcodes: how a request is answered here, and whether Python's reply is amended. */
struct operation {
    bool (*answer)(struct request *);
    bool amended;
};

static bool answer_forget(struct request *request);
static bool answer_batch_forget(struct request *request);
static bool answer_tmpfile(struct request *request);

static const struct operation operations[] = {
    [FUSE_LOOKUP] = {answer_lookup, true},
    [FUSE_FORGET] = {answer_forget, false},
    [FUSE_GETATTR] = {answer_getattr, true},
    [FUSE_SETATTR] = {NULL, true},
    [FUSE_READLINK] = {answer_readlink, false},
    [FUSE_SYMLINK] = {NULL, true},
    [FUSE_MKNOD] = {NULL, true},
    [FUSE_MKDIR] = {NULL, true},
    [FUSE_LINK] = {NULL, true},
    [FUSE_OPEN] = {answer_open, true},
    [FUSE_READ] = {answer_read, false},
    [FUSE_WRITE] = {answer_write, false},
    [FUSE_FSYNC] = {answer_fsync, false},
    [FUSE_RELEASE] = {answer_release, false},
    [FUSE_GETXATTR] = {answer_getxattr, false},
    [FUSE_LISTXATTR] = {answer_listxattr, false},
    [FUSE_INIT] = {NULL, true},
    [FUSE_OPENDIR] = {answer_opendir, true},
    [FUSE_RELEASEDIR] = {answer_releasedir, false},
    [FUSE_CREATE] = {NULL, true},
    [FUSE_BATCH_FORGET] = {answer_batch_forget, false},
    [FUSE_FALLOCATE] = {answer_fallocate, false},
    [FUSE_READDIR] = {answer_readdir, true},
    [FUSE_READDIRPLUS] = {answer_readdir, true},
    [FUSE_LSEEK] = {answer_lseek, false},
    [FUSE_COPY_FILE_RANGE] = {answer_copy_file_range, false},
    [OPCODE_TMPFILE] = {answer_tmpfile, true},
    [OPCODE_COPY_FILE_RANGE_64] = {answer_copy_file_range, false},
};

static const struct operation *operation_of(uint32_t opcode)
{
    static const struct operation none;
    return opcode < sizeof operations / sizeof *operations ? &operations[opcode] : &none;
}

static void amend(const struct pending *request, struct iovec *parts, int count)
{
    switch (request->opcode) {
    case FUSE_INIT:
        amend_init(&request->init, parts, count);
        break;
    case FUSE_GETATTR:
    case FUSE_SETATTR:
        amend_attributes(parts, count);
        break;
    case FUSE_OPEN:
        amend_open(request->nodeid, request->flags, parts, count);
        break;
    case FUSE_CREATE:
        amend_create(request->flags, parts, count);
        break;
    case FUSE_OPENDIR:
        amend_opendir(request->nodeid, parts, count);
        break;
    case FUSE_READDIRPLUS:
        (request->names_only ? amend_names : amend_listing)(parts, count);
        break;
    default:
        amend_entry(parts, count);
    }
}

/* Replies */

static int send_parts(struct iovec *parts, int count)
{
    return writev(state.device, parts, count) < 0 ? errno : 0;
}

/* Return 0, or the errno of a reply that did not reach the kernel. */
static int answer(uint64_t unique, int error, const void *body, size_t size)
{
    struct fuse_out_header out = {.len = sizeof out + size, .error = -error, .unique = unique};
    struct iovec parts[] = {{&out, sizeof out}, {(void *)body, size}};
    return send_parts(parts, size ? 2 : 1);
}

int reply(const struct request *request, const void *body, size_t size)
{
    return answer(request->in->unique, 0, body, size);
}

int reply_error(const struct request *request, int code)
{
    return answer(request->in->unique, code, NULL, 0);
}

/* The way to Python */

static struct message *message_new(const void *data, size_t size)
{
    struct message *message = malloc(sizeof *message + size);
    if (!message)
        return NULL;
    message->next = NULL;
    message->tries = 0;
    message->size = size;
    if (data)
        memcpy(message->data, data, size);
    return message;
}

static void wake_python(void)
{
    uint64_t one = 1;
    if (write(wake, &one, sizeof one) < 0)
        abort(); /* it counts to 2^64 */
}

static void send_to_python(struct message *message)
{
    *queue_end = message;
    queue_end = &message->next;
    wake_python();
}

static struct pending *expect_reply(const struct fuse_in_header *in)
{
    const void *body = in + 1;
    struct pending *entry = calloc(1, sizeof *entry);
    if (!entry)
        return NULL;
    entry->unique = in->unique;
    entry->nodeid = in->nodeid;
    entry->opcode = in->opcode;
    if (in->opcode == FUSE_OPEN || in->opcode == FUSE_CREATE)
        entry->flags = *(const uint32_t *)body; /* the first field of both */
    if (in->opcode == FUSE_INIT) {
        size_t size = in->len - sizeof *in;
        memcpy(&entry->init, body, size < sizeof entry->init ? size : sizeof entry->init);
    }
    if (in->opcode == FUSE_READDIRPLUS)
        entry->names_only = ((const struct fuse_read_in *)body)->fh & NAMES_ONLY;
    if (in->opcode == FUSE_LOOKUP || in->opcode == FUSE_OPENDIR)
        entry->retry = message_new(in, in->len);
    struct pending **chain = &pending[(in->unique >> 1) % PENDING_CHAINS];
    entry->next = *chain;
    *chain = entry;
    return entry;
}

static struct pending *take_pending(uint64_t unique)
{
    struct pending **link = &pending[(unique >> 1) % PENDING_CHAINS];
    while (*link && (*link)->unique != unique)
        link = &(*link)->next;
    struct pending *found = *link;
    if (found)
        *link = found->next;
    return found;
}

/* Nobody waits for what is to be forgotten: it is collected until there is nothing else to do. Until
 * Python has forgotten a node, and says so, its number is not given to another here. */
static void send_forgotten(void)
{
    if (!forgotten.batch.count)
        return;
    forgotten.head.opcode = FUSE_BATCH_FORGET;
    forgotten.head.len = offsetof(struct forgotten, items[forgotten.batch.count]);
    struct message *message = message_new(&forgotten, forgotten.head.len);
    if (message) {
        forgotten.batch.count = 0;
        send_to_python(message);
    }
}

static void forward(struct fuse_in_header *in)
{
    struct message *message = message_new(in, in->len);
    if (!message || (operation_of(in->opcode)->amended && !expect_reply(in))) {
        free(message);
        answer(in->unique, ENOMEM, NULL, 0);
        return;
    }
    send_to_python(message);
}

/* Have Python open the contents of a node, by a read or a write of nothing, and then try `request` again:
 * for operations that pyfuse3 does not know. So copy-up, and waiting while changes are held, are the
 * same for these as for any write. */
bool ask_for_contents(const struct request *request, uint64_t number, bool writing)
{
    size_t size = sizeof(struct fuse_in_header) +
                  (writing ? sizeof(struct fuse_write_in) : sizeof(struct fuse_read_in));
    struct message *retry = message_new(request->in, request->in->len);
    struct message *message = message_new(NULL, size);
    if (!retry || !message || tries > TRIES_LIMIT)
        goto failed;
    retry->tries = tries + 1;
    memset(message->data, 0, size);
    struct fuse_in_header *in = (struct fuse_in_header *)message->data;
    *in = *request->in;
    in->len = size;
    in->opcode = writing ? FUSE_WRITE : FUSE_READ;
    in->nodeid = number;
    *(uint64_t *)(in + 1) = number; /* fh, the first field of both */
    struct pending *entry = expect_reply(in);
    if (!entry)
        goto failed;
    entry->retry = retry;
    entry->contents = true;
    send_to_python(message);
    return true;

failed:
    free(retry);
    free(message);
    reply_error(request, EIO);
    return true;
}

static void try_again(const struct message *retry, int error)
{
    struct request request = {(struct fuse_in_header *)retry->data,
                              (char *)retry->data + sizeof *request.in};
    tries = retry->tries;
    state.unique = request.in->unique & ~RESENT;
    if (error)
        answer(request.in->unique, error, NULL, 0);
    else if (!operation_of(request.in->opcode)->answer(&request))
        forward(request.in);
    tries = 0;
}

/* Requests that are about the table, or translated */

void transport_forget(uint64_t number, uint64_t lookups)
{
    struct node *node = node_find(number);
    journal_lookups(number, -(int64_t)lookups);
    if (node && !node->python) {
        node_forget(node, lookups);
        return;
    }
    if (forgotten.batch.count == FORGET_LIMIT)
        send_forgotten();
    if (forgotten.batch.count == FORGET_LIMIT)
        return; /* no memory: Python keeps the node */
    forgotten.items[forgotten.batch.count].nodeid = number;
    forgotten.items[forgotten.batch.count++].nlookup = lookups;
}

static bool answer_forget(struct request *request)
{
    const struct fuse_forget_in *in = request->body;
    transport_forget(request->in->nodeid, in->nlookup);
    return true;
}

static bool answer_batch_forget(struct request *request)
{
    const struct fuse_batch_forget_in *in = request->body;
    const struct fuse_forget_one *items = (const struct fuse_forget_one *)(in + 1);
    for (uint32_t i = 0; i < in->count; i++)
        transport_forget(items[i].nodeid, items[i].nlookup);
    return true;
}

/* TMPFILE is a CREATE in all but name: pyfuse3 is given one of the name "/", which no file has. */
static bool answer_tmpfile(struct request *request)
{
    request->in->opcode = FUSE_CREATE;
    return false;
}

/* The thread */

static size_t buffer_size(void)
{
    return largest_write() + HEADERS;
}

static bool answer_here(struct fuse_in_header *in)
{
    struct request request = {in, in + 1};
    const struct operation *operation = operation_of(in->opcode);
    state.unique = in->unique & ~RESENT;
    if (in->unique & RESENT && journal_settle(state.unique)) {
        answer(in->unique, 0, NULL, 0); /* a RELEASE, which was carried out */
        return true;
    }
    if (in->opcode == FUSE_INIT)
        journal_init(in);
    return operation->answer && operation->answer(&request);
}

static void flush_forgotten(void)
{
    pthread_mutex_lock(&state.lock);
    send_forgotten();
    pthread_mutex_unlock(&state.lock);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* Wait for a request. A program that got an answer is likely to ask again at once, and to be woken
 * costs more than to look a few times. */
static void await_request(bool answered)
{
    struct pollfd device = {.fd = state.device, .events = POLLIN};
    if (answered && patient)
        for (uint64_t end = now() + PATIENCE; now() < end;)
            if (poll(&device, 1, 0))
                return;
    if (!forgotten.batch.count || poll(&device, 1, FORGET_DELAY))
        poll(&device, 1, -1);
    else
        flush_forgotten();
}

/* Make room for the largest request. It is in memory for good: the kernel fails a request, and does not
 * send it again, if it has to wait for a page of a process that is being killed. */
static char *new_buffer(void)
{
    char *buffer = mmap(NULL, buffer_size(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffer == MAP_FAILED)
        return NULL;
    mlock(buffer, buffer_size()); /* against swapping, if that is allowed */
    return buffer;
}

/* Take a request. The lock is held, so that what the kernel does not send again, which is FORGET, is in
 * the journal right after. */
static ssize_t read_device(char *buffer)
{
    return read(state.device, buffer, buffer_size());
}

static void *serve(void *argument)
{
    char *buffer = argument;
    bool answered = false;
    for (;;) {
        pthread_mutex_lock(&state.lock);
        ssize_t size = read_device(buffer);
        int error = size < 0 ? errno : 0;
        if (size >= (ssize_t)sizeof(struct fuse_in_header)) {
            struct fuse_in_header *in = (struct fuse_in_header *)buffer;
            answered = answer_here(in);
            if (!answered)
                forward(in);
            journal_tidy();
        }
        pthread_mutex_unlock(&state.lock);
        if (error == EAGAIN) {
            await_request(answered);
            answered = false; /* if it is not for this thread, there is one that looks out */
        } else if (size >= 0 ? size < (ssize_t)sizeof(struct fuse_in_header)
                             : error != EINTR && error != ENOENT) {
            break; /* ENODEV: unmounted */
        }
    }
    munmap(buffer, buffer_size());
    pthread_mutex_lock(&state.lock);
    ended = true;
    wake_python();
    pthread_mutex_unlock(&state.lock);
    return NULL;
}

static int begin_serving(void)
{
    pthread_t thread;
    sigset_t all, before;
    char *buffer = new_buffer();
    own_buffer = new_buffer();
    if (!buffer || !own_buffer)
        return -1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's thread */
    int failed = pthread_create(&thread, NULL, serve, buffer);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return -1;
    pthread_detach(thread);
    return 0;
}

/* Go on where a predecessor has died: the kernel is to send again what was not replied to. Return 0
 * or an errno. */
static int take_up(void)
{
    struct fuse_out_header notification = {.len = sizeof notification, .error = NOTIFY_RESEND};
    if (write(state.device, &notification, sizeof notification) < 0)
        return errno;
    return begin_serving() ? EAGAIN : 0;
}

/* What libfuse calls in place of read(2) and writev(2) */

/* Take a request from the queue. Return its size, or 0. */
static ssize_t take(void *buffer, size_t room)
{
    struct message *message = queue;
    ssize_t size = 0;
    if (!message)
        return 0;
    queue = message->next;
    if (!queue)
        queue_end = &queue;
    if (message->size <= room) {
        memcpy(buffer, message->data, message->size);
        size = message->size;
    }
    free(message);
    return size;
}

/* After a reply of Python's, look out for the next request for a moment, without the thread's help. */
static ssize_t linger(void *buffer, size_t room)
{
    for (uint64_t end = now() + PATIENCE; now() < end;) {
        pthread_mutex_lock(&state.lock);
        ssize_t size = read_device(own_buffer);
        if (size >= (ssize_t)sizeof(struct fuse_in_header)) {
            struct fuse_in_header *in = (struct fuse_in_header *)own_buffer;
            if (answer_here(in)) {
                end = now() + PATIENCE;
            } else if (!operation_of(in->opcode)->amended || expect_reply(in)) {
                end = 0;
                size = (size_t)size <= room ? size : 0;
                memcpy(buffer, own_buffer, size);
            } else {
                answer(in->unique, ENOMEM, NULL, 0);
            }
        } else {
            size = queue ? take(buffer, room) : 0;
            end = size ? 0 : end;
        }
        pthread_mutex_unlock(&state.lock);
        if (!end)
            return size;
    }
    return 0;
}

static void note_resent(const void *buffer, ssize_t size)
{
    const struct fuse_in_header *in = buffer;
    resent = size && in->unique & RESENT ? in->opcode : 0;
}

static ssize_t on_read(int fd, void *buffer, size_t room, void *userdata)
{
    uint64_t one;
    (void)userdata;

    if (read(fd, &one, sizeof one) < 0) {
        errno = EINTR; /* nothing there: pyfuse3 waits again */
        return -1;
    }
    pthread_mutex_lock(&state.lock);
    ssize_t size = take(buffer, room);
    note_resent(buffer, size);
    bool linger_now = !size && lingering;
    if (!size && ended)
        wake_python(); /* the next task, too */
    lingering = false;
    pthread_mutex_unlock(&state.lock);
    if (linger_now && !ended) {
        PyThreadState *thread = PyGILState_Check() ? PyEval_SaveThread() : NULL;
        size = linger(buffer, room);
        if (!size)
            flush_forgotten();
        else
            note_resent(buffer, size);
        if (thread)
            PyEval_RestoreThread(thread);
    }
    errno = ended ? ENODEV : EINTR;
    return size ? size : -1;
}

static ssize_t on_writev(int fd, struct iovec *parts, int count, void *userdata)
{
    struct fuse_out_header *out = parts[0].iov_base;
    ssize_t size = 0;
    int error = 0;
    (void)fd;
    (void)userdata;

    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    if (!out->unique) { /* a notification, which may have to wait for requests to be answered */
        error = send_parts(parts, count);
        errno = error;
        return error ? -1 : size;
    }
    pthread_mutex_lock(&state.lock);
    struct pending *request = take_pending(out->unique);
    state.unique = out->unique & ~RESENT;
    if (replaying) {
        amend(request, parts + 1, count - 1);
        replaying = false;
        error = take_up();
    } else if (request && request->contents) {
        try_again(request->retry, -out->error);
    } else if (request && request->retry && out->error == -TRY_AGAIN) {
        try_again(request->retry, 0);
    } else {
        if (request && !out->error) {
            amend(request, parts + 1, count - 1);
            out->len = sizeof *out;
            for (int i = 1; i < count; i++)
                out->len += parts[i].iov_len;
        }
        error = send_parts(parts, count);
    }
    if (patient && !lingering) {
        lingering = true;
        wake_python();
    }
    journal_tidy();
    pthread_mutex_unlock(&state.lock);
    if (request)
        free(request->retry);
    free(request);
    errno = error;
    return error ? -1 : size;
}

/* Take the place of the device in a session that libfuse has just mounted. Return 0 or -1. */
static int start(struct fuse_session *session, int device)
{
    static const struct fuse_custom_io io = {.read = on_read, .writev = on_writev};
    cpu_set_t processors;

    wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    if (wake < 0 || fuse_session_custom_io(session, &io, dup(wake)))
        return -1;
    state.device = device;
    patient = !sched_getaffinity(0, sizeof processors, &processors) && CPU_COUNT(&processors) > 1;
    if (fcntl(device, F_SETFL, fcntl(device, F_GETFL) | O_NONBLOCK))
        return -1;
    struct node *root = node_get(ROOT_NUMBER);
    if (!root)
        return -1;
    root->lookups = 1;
    if (!state.inherited)
        return begin_serving();
    forward(state.inherited);
    replaying = true;
    return 0;
}

bool transport_is_active(void)
{
    return wake >= 0;
}

uint32_t transport_resent(void)
{
    return resent;
}

/* pyfuse3 calls this one in place of libfuse's, since this module was loaded before it. */
__attribute__((visibility("default"))) int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
    static int (*libfuse)(struct fuse_session *, const char *);
    if (!libfuse)
        *(void **)&libfuse = dlsym(RTLD_NEXT, "fuse_session_mount");
    if (!libfuse || libfuse(session, mountpoint))
        return -1;
    return state.path == PLAIN ? 0 : start(session, fuse_session_fd(session));
}
