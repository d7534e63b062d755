/* The client of the benchmark: does one kind of work in the current directory, and prints how many
 * nanoseconds it took, and how many entries or bytes it dealt with, so that its caller can see that
 * all the work was done.
 *
 *     client MODE [ARGUMENT...]
 *
 * What is no part of the work, such as reading the list of names from standard input, is not timed.
 * Any failure ends the client with status 1 and a message.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 1 << 20 };

static char chunk[CHUNK];

static uint64_t began;

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void begin(void)
{
    began = now();
}

static int open_or_die(const char *name, int flags)
{
    int fd = open(name, flags | O_CLOEXEC, 0644);
    if (fd < 0)
        err(1, "open %s", name);
    return fd;
}

static void close_or_die(int fd, const char *name)
{
    if (close(fd) < 0)
        err(1, "close %s", name);
}

static uint64_t read_to_end(int fd, const char *name)
{
    uint64_t total = 0;
    ssize_t got;
    while ((got = read(fd, chunk, sizeof chunk)) > 0)
        total += (uint64_t)got;
    if (got < 0)
        err(1, "read %s", name);
    return total;
}

static void write_all(int fd, const char *name, const void *data, size_t size)
{
    if (write(fd, data, size) != (ssize_t)size)
        err(1, "write %s", name);
}

static uint64_t number(const char *text)
{
    char *end;
    uint64_t value = strtoull(text, &end, 10);
    if (*text == '\0' || *end != '\0')
        errx(1, "%s is no number", text);
    return value;
}

/* Trees */

/* Calls lstat(2) on everything below the directory fd, and with contents reads the files, too. Closes
 * fd, and returns how many entries there are. */
static uint64_t descend(int fd, const char *name, int contents)
{
    DIR *directory = fdopendir(fd);
    if (!directory)
        err(1, "opendir %s", name);
    uint64_t count = 0;
    struct dirent *entry;
    while (errno = 0, (entry = readdir(directory)) != NULL) {
        const char *child = entry->d_name;
        if (strcmp(child, ".") == 0 || strcmp(child, "..") == 0)
            continue;
        struct stat status;
        if (fstatat(fd, child, &status, AT_SYMLINK_NOFOLLOW) < 0)
            err(1, "lstat %s", child);
        count++;
        if (S_ISDIR(status.st_mode)) {
            int below = openat(fd, child, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (below < 0)
                err(1, "open %s", child);
            count += descend(below, child, contents);
        } else if (contents && S_ISREG(status.st_mode)) {
            int file = openat(fd, child, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
            if (file < 0)
                err(1, "open %s", child);
            read_to_end(file, child);
            close_or_die(file, child);
        }
    }
    if (errno != 0)
        err(1, "readdir %s", name);
    closedir(directory);
    return count;
}

static uint64_t walk(char **arguments)
{
    (void)arguments;
    begin();
    return descend(open_or_die(".", O_RDONLY | O_DIRECTORY), ".", 0);
}

static uint64_t load(char **arguments)
{
    (void)arguments;
    begin();
    return descend(open_or_die(".", O_RDONLY | O_DIRECTORY), ".", 1);
}

static uint64_t list(char **arguments)
{
    (void)arguments;
    begin();
    DIR *directory = opendir(".");
    if (!directory)
        err(1, "opendir");
    uint64_t count = 0;
    while (errno = 0, readdir(directory) != NULL)
        count++;
    if (errno != 0)
        err(1, "readdir");
    closedir(directory);
    return count;
}

/* Small files, by their names from standard input */

static uint64_t for_each_name(void (*work)(const char *name))
{
    char **names = NULL;
    size_t count = 0, room = 0;
    char *line = NULL;
    size_t size = 0;
    ssize_t length;
    while ((length = getline(&line, &size, stdin)) > 0) {
        if (line[length - 1] == '\n')
            line[length - 1] = '\0';
        if (count == room) {
            room = room ? 2 * room : 1024;
            names = reallocarray(names, room, sizeof *names);
            if (!names)
                err(1, "names");
        }
        names[count] = strdup(line);
        if (!names[count++])
            err(1, "names");
    }
    begin();
    for (size_t i = 0; i < count; i++)
        work(names[i]);
    return count;
}

static void read_one(const char *name)
{
    int fd = open_or_die(name, O_RDONLY);
    read_to_end(fd, name);
    close_or_die(fd, name);
}

static void miss_one(const char *name)
{
    struct stat status;
    if (lstat(name, &status) == 0)
        errx(1, "%s exists", name);
    if (errno != ENOENT)
        err(1, "lstat %s", name);
}

static void create_one(const char *name)
{
    int fd = open_or_die(name, O_WRONLY | O_CREAT | O_EXCL);
    write_all(fd, name, chunk, 100);
    close_or_die(fd, name);
}

static void modify_one(const char *name)
{
    int fd = open_or_die(name, O_WRONLY);
    write_all(fd, name, "!", 1);
    close_or_die(fd, name);
}

static void unlink_one(const char *name)
{
    if (unlink(name) < 0)
        err(1, "unlink %s", name);
}

static void rename_one(const char *name)
{
    char target[4096];
    snprintf(target, sizeof target, "%s.renamed", name);
    if (rename(name, target) < 0)
        err(1, "rename %s", name);
}

/* One large file */

static uint64_t size_of(int fd, const char *name)
{
    struct stat status;
    if (fstat(fd, &status) < 0)
        err(1, "fstat %s", name);
    return (uint64_t)status.st_size;
}

/* Numbers that look random and are the same in each run: Marsaglia's xorshift64. */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* FILE: read it from its beginning to its end. */
static uint64_t read_sequentially(char **arguments)
{
    begin();
    int fd = open_or_die(arguments[0], O_RDONLY);
    uint64_t total = read_to_end(fd, arguments[0]);
    close_or_die(fd, arguments[0]);
    return total;
}

/* FILE SIZE: write a new file of so many MiB. */
static uint64_t write_sequentially(char **arguments)
{
    uint64_t size = number(arguments[1]) * CHUNK;
    begin();
    int fd = open_or_die(arguments[0], O_WRONLY | O_CREAT | O_EXCL);
    for (uint64_t written = 0; written < size; written += CHUNK)
        write_all(fd, arguments[0], chunk, CHUNK);
    close_or_die(fd, arguments[0]);
    return size;
}

/* FILE COUNT: write so many pages at random places of a file. */
static uint64_t write_randomly(char **arguments)
{
    uint64_t count = number(arguments[1]), random = 1;
    begin();
    int fd = open_or_die(arguments[0], O_WRONLY);
    uint64_t pages = size_of(fd, arguments[0]) / PAGE;
    for (uint64_t i = 0; i < count; i++) {
        off_t offset = (off_t)(next_random(&random) % pages * PAGE);
        if (pwrite(fd, chunk, PAGE, offset) != PAGE)
            err(1, "pwrite %s", arguments[0]);
    }
    close_or_die(fd, arguments[0]);
    return count;
}

/* Touches each page of a file that is mapped shared; with change, writes to it. */
static uint64_t touch_pages(const char *name, int change)
{
    begin();
    int fd = open_or_die(name, change ? O_RDWR : O_RDONLY);
    uint64_t size = size_of(fd, name);
    volatile char *pages =
        mmap(NULL, size, change ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (pages == MAP_FAILED)
        err(1, "mmap %s", name);
    for (uint64_t offset = 0; offset < size; offset += PAGE) {
        if (change)
            pages[offset] = 1;
        else
            (void)pages[offset];
    }
    munmap((void *)pages, size);
    close_or_die(fd, name);
    return size;
}

/* FILE: read all its pages through a shared mapping. */
static uint64_t map_and_read(char **arguments)
{
    return touch_pages(arguments[0], 0);
}

/* FILE: write to all its pages through a shared mapping. */
static uint64_t map_and_write(char **arguments)
{
    return touch_pages(arguments[0], 1);
}

static const struct mode {
    const char *name;
    int arguments;
    uint64_t (*work)(char **arguments);
    void (*work_on)(const char *name); /* instead of work: for each name from standard input */
} modes[] = {
    {"walk", .work = walk},
    {"load", .work = load},
    {"list", .work = list},
    {"read", .work_on = read_one},
    {"miss", .work_on = miss_one},
    {"create", .work_on = create_one},
    {"modify", .work_on = modify_one},
    {"unlink", .work_on = unlink_one},
    {"rename", .work_on = rename_one},
    {"read-sequentially", .arguments = 1, .work = read_sequentially},
    {"write-sequentially", .arguments = 2, .work = write_sequentially},
    {"write-randomly", .arguments = 2, .work = write_randomly},
    {"map-and-read", .arguments = 1, .work = map_and_read},
    {"map-and-write", .arguments = 1, .work = map_and_write},
};

int main(int count, char **arguments)
{
    for (size_t i = 0; count > 1 && i < sizeof modes / sizeof *modes; i++) {
        const struct mode *mode = &modes[i];
        if (strcmp(arguments[1], mode->name) != 0 || count - 2 != mode->arguments)
            continue;
        uint64_t done = mode->work_on ? for_each_name(mode->work_on) : mode->work(arguments + 2);
        uint64_t took = now() - began;
        printf("%" PRIu64 " %" PRIu64 "\n", took, done);
        return fclose(stdout) == 0 ? 0 : 1;
    }
    errx(2, "no such mode, or not so many arguments");
}
