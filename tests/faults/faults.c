/* One fault at one system call: a library for LD_PRELOAD, between a process and libc.
 *
 * It counts the calls that change what lies below one folder (and, on demand, those that read it) and does one thing
 * at the n-th: kill or stop the process, return an errno, or let half of a write land. Every counted call is logged,
 * so that a case can be named and replayed. Nothing else about the process changes: Python, Rust and C++ code in it
 * all reach the disk through these functions.
 *
 *   FAULTS_ROOT   the folder; without it nothing is counted
 *   FAULTS_LOG    a file: `n TAB op TAB path` before a call (`from -> to` for link and rename), `= TAB n TAB errno`
 *                 after it; the path of a write and its length come as `path:length`
 *   FAULTS_OPS    the operations that are counted, `,write,fsync,`; default: every one that changes something
 *   FAULTS_CALL   n, from 1; 0 or absent: only count
 *   FAULTS_LAST   the last call that is hit; default n; 0: every one from n on
 *   FAULTS_DO     kill_before, kill_after, stop_before; stop_kill (stop before, and once it goes on, kill after);
 *                 kill_mid (half of a write lands, then the end); short (half lands, and libc says so); torn (half
 *                 lands, and from then on the disk is full); or an errno's name
 *   FAULTS_CLOCK  seconds added to the wall clock
 *
 * The environment is read when the library is loaded and again by faults_arm(), for a process that was forked.
 * faults_counted() says how many calls there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PATH_BYTES 4096
#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

static char root[PATH_BYTES], ops[512], action[32];
static long first_hit, last_hit, clock_shift;
static int log_fd = -1;
static atomic_long counted;

static const char CHANGING[] = ",open,write,fsync,rename,link,unlink,mkdir,truncate,copy,";

static const struct {
    const char *name;
    int number;
} ERRNOS[] = {{"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EINTR", EINTR}, {"EROFS", EROFS},
              {"EACCES", EACCES}, {"EDQUOT", EDQUOT}, {"EMFILE", EMFILE}};

static void set_text(char *target, size_t size, const char *name, const char *otherwise) {
    const char *value = getenv(name);
    snprintf(target, size, "%s", value ? value : otherwise);
}

static long number(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

__attribute__((constructor)) void faults_arm(void) {
    char log_path[PATH_BYTES];
    set_text(root, sizeof root, "FAULTS_ROOT", "");
    set_text(ops, sizeof ops, "FAULTS_OPS", CHANGING);
    set_text(action, sizeof action, "FAULTS_DO", "");
    set_text(log_path, sizeof log_path, "FAULTS_LOG", "");
    first_hit = number("FAULTS_CALL", 0);
    last_hit = number("FAULTS_LAST", first_hit);
    clock_shift = number("FAULTS_CLOCK", 0);
    atomic_store(&counted, 0);
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = *log_path ? (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
}

long faults_counted(void) { return atomic_load(&counted); }

static void log_line(const char *line) {
    if (log_fd >= 0) syscall(SYS_write, log_fd, line, strlen(line));
}

/* The absolute path of `path` relative to `dir`, and whether it lies below the root. */
static int place(int dir, const char *path, char *full) {
    if (!*root || !path) return 0;
    if (*path == '/') {
        snprintf(full, PATH_BYTES, "%s", path);
    } else if (dir == AT_FDCWD) {
        char here[PATH_BYTES];
        if (!getcwd(here, sizeof here)) return 0;
        if (snprintf(full, PATH_BYTES, "%s/%s", here, path) >= PATH_BYTES) return 0;
    } else {
        char link[64], folder[PATH_BYTES];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, folder, sizeof folder - 1);
        if (length < 0) return 0;
        folder[length] = 0;
        if (snprintf(full, PATH_BYTES, "%s/%s", folder, path) >= PATH_BYTES) return 0;
    }
    size_t length = strlen(root);
    return strncmp(full, root, length) == 0 && (full[length] == 0 || full[length] == '/');
}

static int place_fd(int fd, char *full) {
    char link[64];
    if (!*root) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, full, PATH_BYTES - 1);
    if (length < 0) return 0;
    full[length] = 0;
    length = strlen(root);
    return strncmp(full, root, length) == 0 && (full[length] == 0 || full[length] == '/');
}

/* The number of this call, or 0 where its operation is not counted. Logs it. */
static long count(const char *op, const char *what) {
    char wanted[40], line[3 * PATH_BYTES];
    int saved = errno;
    snprintf(wanted, sizeof wanted, ",%s,", op);
    if (!strstr(ops, wanted)) return 0;
    long n = atomic_fetch_add(&counted, 1) + 1;
    snprintf(line, sizeof line, "%ld\t%s\t%s\n", n, op, what);
    log_line(line);
    errno = saved;
    return n;
}

static int is_hit(long n) { return n && first_hit && n >= first_hit && (!last_hit || n <= last_hit); }

static int does(const char *what) { return !strcmp(action, what); }

static void end_here(int sig) {
    syscall(SYS_kill, getpid(), sig);
    if (sig == SIGKILL) for (;;) pause();
}

/* What happens before call n: 0 go on, else the errno to return. */
static int before(long n) {
    if (!is_hit(n)) return 0;
    if (does("kill_before")) end_here(SIGKILL);
    if (does("stop_before") || does("stop_kill")) end_here(SIGSTOP);
    if (does("torn")) return n > first_hit ? ENOSPC : 0;
    for (size_t i = 0; i < sizeof ERRNOS / sizeof *ERRNOS; i++)
        if (does(ERRNOS[i].name)) return ERRNOS[i].number;
    return 0;
}

static void after(long n, int failed) {
    int saved = errno;
    char line[64];
    if (!n) return;
    snprintf(line, sizeof line, "=\t%ld\t%d\n", n, failed ? saved : 0);
    log_line(line);
    if (is_hit(n) && (does("kill_after") || does("kill_mid") || does("stop_kill"))) end_here(SIGKILL);
    errno = saved;
}

static long refused(long n, int number) {
    errno = number;
    after(n, 1);
    errno = number;
    return -1;
}

#define GUARDED(n, call)                                                  \
    do {                                                                  \
        int problem_ = before(n);                                         \
        if (problem_) return refused(n, problem_);                        \
        long result_ = (call);                                            \
        after(n, result_ < 0);                                            \
        return result_;                                                   \
    } while (0)

/* open and its kin */

static long count_open(int dir, const char *path, int flags) {
    char full[PATH_BYTES];
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (!place(dir, path, full)) return 0;
    return count(changes ? "open" : "open_read", full);
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        mode_t mode = mode_of(flags, rest);                                                     \
        va_end(rest);                                                                           \
        long n = count_open(AT_FDCWD, path, flags);                                             \
        GUARDED(n, NEXT(int (*)(const char *, int, ...), #name)(path, flags, mode));            \
    }
#define OPENAT(name)                                                                            \
    int name(int dir, const char *path, int flags, ...) {                                       \
        va_list rest;                                                                           \
        va_start(rest, flags);                                                                  \
        mode_t mode = mode_of(flags, rest);                                                     \
        va_end(rest);                                                                           \
        long n = count_open(dir, path, flags);                                                  \
        GUARDED(n, NEXT(int (*)(int, const char *, int, ...), #name)(dir, path, flags, mode));  \
    }
#define CREAT(name)                                                                             \
    int name(const char *path, mode_t mode) {                                                   \
        long n = count_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC);                      \
        GUARDED(n, NEXT(int (*)(const char *, mode_t), #name)(path, mode));                     \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CREAT(creat)
CREAT(creat64)

/* Writes and reads. A short write is what a full disk or a signal leaves: some bytes, and their number. */

static long count_bytes(const char *op, int fd, size_t length) {
    char full[PATH_BYTES], what[PATH_BYTES + 32];
    if (!place_fd(fd, full)) return 0;
    snprintf(what, sizeof what, "%s:%zu", full, length);
    return count(op, what);
}

static size_t landing(long n, size_t length) {
    int half = is_hit(n) && (does("short") || does("kill_mid") || (does("torn") && n == first_hit));
    return half && length > 1 ? length / 2 : length;
}

ssize_t write(int fd, const void *data, size_t length) {
    long n = count_bytes("write", fd, length);
    GUARDED(n, NEXT(ssize_t(*)(int, const void *, size_t), "write")(fd, data, landing(n, length)));
}
#define PWRITE(name)                                                                                          \
    ssize_t name(int fd, const void *data, size_t length, off_t offset) {                                     \
        long n = count_bytes("write", fd, length);                                                            \
        GUARDED(n, NEXT(ssize_t(*)(int, const void *, size_t, off_t), #name)(fd, data, landing(n, length), offset)); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

static size_t total(const struct iovec *parts, int num) {
    size_t length = 0;
    for (int i = 0; i < num; i++) length += parts[i].iov_len;
    return length;
}
ssize_t writev(int fd, const struct iovec *parts, int num) {
    long n = count_bytes("write", fd, total(parts, num));
    if (num > 1 && landing(n, 4) < 4) num = num / 2;
    GUARDED(n, NEXT(ssize_t(*)(int, const struct iovec *, int), "writev")(fd, parts, num));
}
#define PWRITEV(name)                                                                                         \
    ssize_t name(int fd, const struct iovec *parts, int num, off_t offset) {                                  \
        long n = count_bytes("write", fd, total(parts, num));                                                 \
        if (num > 1 && landing(n, 4) < 4) num = num / 2;                                                      \
        GUARDED(n, NEXT(ssize_t(*)(int, const struct iovec *, int, off_t), #name)(fd, parts, num, offset));   \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

ssize_t read(int fd, void *data, size_t length) {
    long n = *root && strstr(ops, ",read,") ? count_bytes("read", fd, length) : 0;
    GUARDED(n, NEXT(ssize_t(*)(int, void *, size_t), "read")(fd, data, landing(n, length)));
}
#define PREAD(name)                                                                                           \
    ssize_t name(int fd, void *data, size_t length, off_t offset) {                                           \
        long n = *root && strstr(ops, ",read,") ? count_bytes("read", fd, length) : 0;                        \
        GUARDED(n, NEXT(ssize_t(*)(int, void *, size_t, off_t), #name)(fd, data, landing(n, length), offset)); \
    }
PREAD(pread)
PREAD(pread64)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length, unsigned flags) {
    long n = count_bytes("copy", out, length);
    GUARDED(n, NEXT(ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned), "copy_file_range")(
                   in, in_at, out, out_at, landing(n, length), flags));
}

/* Durability */

static long count_fd(const char *op, int fd) {
    char full[PATH_BYTES];
    return place_fd(fd, full) ? count(op, full) : 0;
}
int fsync(int fd) {
    long n = count_fd("fsync", fd);
    GUARDED(n, NEXT(int (*)(int), "fsync")(fd));
}
int fdatasync(int fd) {
    long n = count_fd("fsync", fd);
    GUARDED(n, NEXT(int (*)(int), "fdatasync")(fd));
}
int ftruncate(int fd, off_t length) {
    long n = count_fd("truncate", fd);
    GUARDED(n, NEXT(int (*)(int, off_t), "ftruncate")(fd, length));
}
int ftruncate64(int fd, off64_t length) {
    long n = count_fd("truncate", fd);
    GUARDED(n, NEXT(int (*)(int, off64_t), "ftruncate64")(fd, length));
}

/* Names */

static long count_pair(const char *op, int from_dir, const char *from, int to_dir, const char *to) {
    char source[PATH_BYTES] = "", target[PATH_BYTES] = "", what[2 * PATH_BYTES + 8];
    int below = place(from_dir, from, source) | place(to_dir, to, target);
    if (!below) return 0;
    snprintf(what, sizeof what, "%s -> %s", source, target);
    return count(op, what);
}
int rename(const char *from, const char *to) {
    long n = count_pair("rename", AT_FDCWD, from, AT_FDCWD, to);
    GUARDED(n, NEXT(int (*)(const char *, const char *), "rename")(from, to));
}
int renameat(int a, const char *from, int b, const char *to) {
    long n = count_pair("rename", a, from, b, to);
    GUARDED(n, NEXT(int (*)(int, const char *, int, const char *), "renameat")(a, from, b, to));
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    long n = count_pair("rename", a, from, b, to);
    GUARDED(n, NEXT(int (*)(int, const char *, int, const char *, unsigned), "renameat2")(a, from, b, to, flags));
}
int link(const char *from, const char *to) {
    long n = count_pair("link", AT_FDCWD, from, AT_FDCWD, to);
    GUARDED(n, NEXT(int (*)(const char *, const char *), "link")(from, to));
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    long n = count_pair("link", a, from, b, to);
    GUARDED(n, NEXT(int (*)(int, const char *, int, const char *, int), "linkat")(a, from, b, to, flags));
}

static long count_name(const char *op, int dir, const char *path) {
    char full[PATH_BYTES];
    return place(dir, path, full) ? count(op, full) : 0;
}
int unlink(const char *path) {
    long n = count_name("unlink", AT_FDCWD, path);
    GUARDED(n, NEXT(int (*)(const char *), "unlink")(path));
}
int unlinkat(int dir, const char *path, int flags) {
    long n = count_name("unlink", dir, path);
    GUARDED(n, NEXT(int (*)(int, const char *, int), "unlinkat")(dir, path, flags));
}

/* A folder that is there stays "there" on a disk that takes nothing more: it is no change, and not counted. */
static long count_mkdir(int dir, const char *path) {
    char full[PATH_BYTES];
    struct stat there;
    if (!place(dir, path, full) || fstatat(AT_FDCWD, full, &there, 0) == 0) return 0;
    return count("mkdir", full);
}
int mkdir(const char *path, mode_t mode) {
    long n = count_mkdir(AT_FDCWD, path);
    GUARDED(n, NEXT(int (*)(const char *, mode_t), "mkdir")(path, mode));
}
int mkdirat(int dir, const char *path, mode_t mode) {
    long n = count_mkdir(dir, path);
    GUARDED(n, NEXT(int (*)(int, const char *, mode_t), "mkdirat")(dir, path, mode));
}

/* The wall clock. Monotonic clocks are left alone, as no administrator can set them. */

int clock_gettime(clockid_t which, struct timespec *now) {
    int result = NEXT(int (*)(clockid_t, struct timespec *), "clock_gettime")(which, now);
    if (!result && clock_shift && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += clock_shift;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = NEXT(int (*)(struct timeval *, void *), "gettimeofday")(now, zone);
    if (!result) now->tv_sec += clock_shift;
    return result;
}
time_t time(time_t *out) {
    time_t now = NEXT(time_t(*)(time_t *), "time")(NULL) + clock_shift;
    if (out) *out = now;
    return now;
}
