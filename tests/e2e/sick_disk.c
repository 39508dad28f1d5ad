/* A disk that returns EIO, for the process that this is preloaded into.
 *
 * SICK_DISK names a file of rules. While it is there, each of its lines "CALL WORDS" (CALL: read, write or
 * fsync) makes these calls fail with EIO for every descriptor whose path has WORDS in it. Nothing else changes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_sick(const char *call, int fd)
{
    const char *name = getenv("SICK_DISK");
    char rules[4096], link[64], path[4096], *line, *rest = rules;
    int saved = errno, found = 0;
    ssize_t size = -1;
    int file = fd > 2 && name ? (int)syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC) : -1;

    if (file >= 0) {
        size = syscall(SYS_read, file, rules, sizeof rules - 1);
        syscall(SYS_close, file);
    }
    if (size > 0) {
        rules[size] = 0;
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        size = readlink(link, path, sizeof path - 1);
        path[size > 0 ? size : 0] = 0;
        while (!found && (line = strsep(&rest, "\n"))) {
            char *words = strchr(line, ' ');
            found = words && (size_t)(words - line) == strlen(call) && !strncmp(line, call, strlen(call)) &&
                    strstr(path, words + 1);
        }
    }
    errno = found ? EIO : saved;
    return found;
}

#define SICK(call, type, name, parameters, arguments)                    \
    type name parameters                                                 \
    {                                                                    \
        static type(*real) parameters;                                   \
        if (is_sick(call, fd))                                           \
            return -1;                                                   \
        if (!real)                                                       \
            *(void **)&real = dlsym(RTLD_NEXT, #name);                   \
        return real arguments;                                           \
    }

SICK("read", ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
SICK("read", ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
SICK("read", ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
SICK("read", ssize_t, readv, (int fd, const struct iovec *parts, int count), (fd, parts, count))
SICK("read", ssize_t, preadv, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
SICK("read", ssize_t, preadv64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
SICK("read", ssize_t, preadv2, (int fd, const struct iovec *parts, int count, off_t at, int flags),
     (fd, parts, count, at, flags))
SICK("read", ssize_t, preadv64v2, (int fd, const struct iovec *parts, int count, off64_t at, int flags),
     (fd, parts, count, at, flags))
SICK("write", ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
SICK("write", ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
SICK("write", ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
SICK("write", ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
SICK("write", ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
SICK("write", ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
SICK("write", ssize_t, pwritev2, (int fd, const struct iovec *parts, int count, off_t at, int flags),
     (fd, parts, count, at, flags))
SICK("write", ssize_t, pwritev64v2, (int fd, const struct iovec *parts, int count, off64_t at, int flags),
     (fd, parts, count, at, flags))
SICK("fsync", int, fsync, (int fd), (fd))
SICK("fsync", int, fdatasync, (int fd), (fd))
