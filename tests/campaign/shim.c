/* Loaded with LD_PRELOAD: counts the calls of a process that change a file system, whoever makes them (Python, SQLite,
   safetensors), and lets one end the process, interrupt it, or fail.

   campaign_arm(kind, nth, signal, error, lasting): at the nth call of a kind from now on, raise `signal` before it, or
   let it fail with `error`; all later ones fail too if `lasting`. A kind of -1 only counts. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FLUSH, RENAME, UNLINK, WRITE, KINDS };

static atomic_long counts[KINDS];
static int armed = -1, with_signal, with_error, lasting;
static long at;

void campaign_arm(int kind, long nth, int signal, int error, int lasts) {
    for (int i = 0; i < KINDS; i++) counts[i] = 0;
    at = nth, with_signal = signal, with_error = error, lasting = lasts, armed = kind;
}

long campaign_count(int kind) { return counts[kind]; }

/* True if this call is to fail; errno is set. */
static int fails(int kind) {
    long count = ++counts[kind];
    if (kind != armed || count < at || (count > at && !lasting)) return 0;
    if (with_signal) {
        if (count == at) raise(with_signal);
        return 0;
    }
    errno = with_error;
    return 1;
}

/* Standard streams and pipes are no files of a result. */
static int is_file(int handle) {
    struct stat about;
    return handle > 2 && fstat(handle, &about) == 0 && S_ISREG(about.st_mode);
}

#define WRAP(result, name, condition, kind, types, names)              \
    result name types {                                                \
        static result (*real) types;                                   \
        if (!real) real = (result (*) types)dlsym(RTLD_NEXT, #name);   \
        return (condition) && fails(kind) ? (result)-1 : real names;   \
    }

WRAP(int, fsync, 1, FLUSH, (int handle), (handle))
WRAP(int, fdatasync, 1, FLUSH, (int handle), (handle))
WRAP(int, rename, 1, RENAME, (const char *from, const char *to), (from, to))
WRAP(int, renameat, 1, RENAME, (int a, const char *from, int b, const char *to), (a, from, b, to))
WRAP(int, renameat2, 1, RENAME, (int a, const char *from, int b, const char *to, unsigned how), (a, from, b, to, how))
WRAP(int, unlink, 1, UNLINK, (const char *path), (path))
WRAP(int, unlinkat, 1, UNLINK, (int folder, const char *path, int how), (folder, path, how))
WRAP(int, rmdir, 1, UNLINK, (const char *path), (path))
WRAP(ssize_t, write, is_file(handle), WRITE, (int handle, const void *from, size_t size), (handle, from, size))
WRAP(ssize_t, pwrite, is_file(handle), WRITE, (int handle, const void *from, size_t size, off_t place),
     (handle, from, size, place))
WRAP(ssize_t, pwrite64, is_file(handle), WRITE, (int handle, const void *from, size_t size, off64_t place),
     (handle, from, size, place))
WRAP(ssize_t, writev, is_file(handle), WRITE, (int handle, const struct iovec *parts, int count),
     (handle, parts, count))
WRAP(ssize_t, sendfile, is_file(to), WRITE, (int to, int from, off_t *place, size_t size), (to, from, place, size))
WRAP(ssize_t, sendfile64, is_file(to), WRITE, (int to, int from, off64_t *place, size_t size), (to, from, place, size))
WRAP(int, ftruncate, is_file(handle), WRITE, (int handle, off_t size), (handle, size))
WRAP(int, ftruncate64, is_file(handle), WRITE, (int handle, off64_t size), (handle, size))
