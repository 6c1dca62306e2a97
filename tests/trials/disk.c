/* A disk that fails: preloaded into a process, it stands between the program and the files under one folder.
 *
 * Calls that change these files are counted. From call `first` on, `count` of them fail as `fault` says. What a sync has
 * made durable is remembered, so that the test can take back what was not synced. One thread at a time. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NONE, EIO_ERROR, FULL, SHORT, KILLED, DEAD, DONE_BUT_EIO, SYNC_LOSES, SYNC_LIES };
enum { MAX_FDS = 4096, MAX_FILES = 4096, MAX_NAMES = 64 };

typedef struct { ino_t ino; char *data; size_t size; int exists; } Durable;
typedef struct { char name[256]; ino_t ino; } Name;

static char root[1024];
static size_t root_len;
static long calls, first = -1, count;
static int fault, dead;
static long room; /* on a full disk: what files that were removed gave back */
static char last_call[32];
static char tracked[MAX_FDS];
static Durable files[MAX_FILES];
static int num_files;
static Name names[MAX_NAMES];
static int num_names;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int is_under(const char *path) {
    return root_len && path && !strncmp(path, root, root_len) && (path[root_len] == '/' || !path[root_len]);
}
static int is_tracked(int fd) { return root_len && fd >= 0 && fd < MAX_FDS && tracked[fd]; }

/* What happens to this call, which takes that many bytes of the disk: NONE, or the fault to play. */
static int next_fault(const char *name, long takes) {
    if (dead) return EIO_ERROR;
    calls++;
    if (first < 0 || calls < first || (count && calls >= first + count)) return NONE;
    if (fault == FULL && takes <= room) { room -= takes > 0 ? takes : 0; return NONE; }
    snprintf(last_call, sizeof last_call, "%s", name);
    if (fault == DEAD) { dead = 1; return EIO_ERROR; }
    return fault;
}

static ssize_t read_all(int fd, char **data) {
    struct stat st;
    if (fstat(fd, &st)) return -1;
    *data = malloc(st.st_size + 1);
    size_t done = 0;
    while (done < (size_t)st.st_size) {
        ssize_t n = pread(fd, *data + done, st.st_size - done, done);
        if (n <= 0) break;
        done += n;
    }
    return done;
}
static Durable *find(ino_t ino) {
    for (int i = 0; i < num_files; i++) if (files[i].ino == ino) return &files[i];
    if (num_files == MAX_FILES) abort();
    files[num_files] = (Durable){ino, NULL, 0, 0};
    return &files[num_files++];
}
static void remember(int fd) {
    struct stat st;
    if (fstat(fd, &st)) return;
    if (S_ISDIR(st.st_mode)) {
        DIR *dir = opendir(root);
        struct dirent *entry;
        num_names = 0;
        while (dir && (entry = readdir(dir)) && num_names < MAX_NAMES) {
            if (entry->d_name[0] == '.') continue;
            snprintf(names[num_names].name, sizeof names[0].name, "%s", entry->d_name);
            names[num_names++].ino = entry->d_ino;
        }
        if (dir) closedir(dir);
        return;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int in = open(path, O_RDONLY);
    if (in < 0) return;
    Durable *file = find(st.st_ino);
    free(file->data);
    file->size = read_all(in, &file->data);
    file->exists = 1;
    close(in);
}
/* A sync that failed: the pages are as they were on the disk, and count as clean. */
static void lose(int fd) {
    struct stat st;
    if (fstat(fd, &st) || S_ISDIR(st.st_mode)) return;
    Durable *file = find(st.st_ino);
    REAL(pwrite64);
    if (file->exists) {
        size_t end = file->size < (size_t)st.st_size ? file->size : (size_t)st.st_size;
        real(fd, file->data, end, 0);
    }
    char zeros[4096] = {0};
    for (off_t at = file->exists ? file->size : 0; at < st.st_size; at += sizeof zeros) {
        size_t n = st.st_size - at < (off_t)sizeof zeros ? st.st_size - at : sizeof zeros;
        real(fd, zeros, n, at);
    }
}

/* For the test, by ctypes. */
void disk_start(const char *folder) {
    snprintf(root, sizeof root, "%s", folder);
    root_len = strlen(root);
    calls = 0; first = -1; dead = 0; num_names = 0;
    for (int i = 0; i < num_files; i++) free(files[i].data);
    num_files = 0;
    memset(tracked, 0, sizeof tracked);
}
void disk_stop(void) { root_len = 0; first = -1; dead = 0; }
void disk_arm(long from, long how_many, int how) { first = from < 0 ? -1 : calls + from; count = how_many; fault = how; room = 0; }
void disk_die(int is_dead) { dead = is_dead; }
int disk_is_dead(void) { return dead; }
long disk_calls(void) { return calls; }
const char *disk_last_call(void) { return last_call; }
long disk_durable(unsigned long ino, char *buffer, long room) {
    for (int i = 0; i < num_files; i++)
        if (files[i].ino == ino && files[i].exists) {
            if ((long)files[i].size <= room) memcpy(buffer, files[i].data, files[i].size);
            return files[i].size;
        }
    return -1;
}
void disk_set_durable(unsigned long ino, const char *data, long size) {
    Durable *file = find(ino);
    free(file->data);
    file->data = malloc(size + 1);
    memcpy(file->data, data, size);
    file->size = size; file->exists = 1;
}
long disk_name(int i, char *name) {
    if (i >= num_names) return -1;
    strcpy(name, names[i].name);
    return names[i].ino;
}
void disk_forget_names(void) { num_names = 0; }
void disk_add_name(const char *name, unsigned long ino) {
    if (num_names == MAX_NAMES) abort();
    snprintf(names[num_names].name, sizeof names[0].name, "%s", name);
    names[num_names++].ino = ino;
}

#define FAIL(error) do { errno = (error); return -1; } while (0)
#define ERROR_OF(f) ((f) == FULL ? ENOSPC : EIO)

static int opened(int fd) { if (fd >= 0 && fd < MAX_FDS) tracked[fd] = 1; return fd; }

#define OPEN(name) \
int name(const char *path, int flags, ...) { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list args; va_start(args, flags); mode = va_arg(args, mode_t); va_end(args); } \
    if (!is_under(path)) return real(path, flags, mode); \
    if (flags & O_CREAT && access(path, F_OK)) { \
        int how = next_fault("open", 1); \
        if (how == KILLED) kill(getpid(), SIGKILL); \
        if (how == EIO_ERROR || how == FULL || how == DONE_BUT_EIO) FAIL(ERROR_OF(how)); \
    } \
    return opened(real(path, flags, mode)); \
}
OPEN(open)
OPEN(open64)

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < MAX_FDS) tracked[fd] = 0;
    return real(fd);
}

#define PWRITE(name) \
ssize_t name(int fd, const void *data, size_t size, off_t at) { \
    REAL(name); \
    if (!is_tracked(fd)) return real(fd, data, size, at); \
    struct stat st; \
    int how = next_fault("pwrite", fstat(fd, &st) ? 1 : at + (off_t)size - st.st_size); \
    if (how == NONE || how == SYNC_LOSES || how == SYNC_LIES) return real(fd, data, size, at); \
    if (how == EIO_ERROR || how == FULL) FAIL(ERROR_OF(how)); \
    ssize_t done = real(fd, data, how == DONE_BUT_EIO ? size : size / 2, at); \
    if (how == KILLED) kill(getpid(), SIGKILL); \
    if (how == DONE_BUT_EIO) FAIL(EIO); \
    return done; \
}
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (!is_tracked(fd)) return real(fd, data, size);
    struct stat st;
    off_t at = lseek(fd, 0, SEEK_CUR);
    int how = next_fault("write", fstat(fd, &st) ? 1 : at + (off_t)size - st.st_size);
    if (how == NONE || how == SYNC_LOSES || how == SYNC_LIES) return real(fd, data, size);
    if (how == EIO_ERROR || how == FULL) FAIL(ERROR_OF(how));
    ssize_t done = real(fd, data, how == DONE_BUT_EIO ? size : size / 2);
    if (how == KILLED) kill(getpid(), SIGKILL);
    if (how == DONE_BUT_EIO) FAIL(EIO);
    return done;
}

/* A sync only moves data from one memory to another here: what it makes durable is remembered, nothing waits for disks. */
#define SYNC(name) \
int name(int fd) { \
    REAL(name); \
    if (!is_tracked(fd)) return real(fd); \
    int how = next_fault(#name, 0); \
    if (how == KILLED) kill(getpid(), SIGKILL); \
    if (how == SYNC_LIES) return 0; \
    if (how == SYNC_LOSES) lose(fd); \
    if (how == SYNC_LOSES || how == EIO_ERROR) FAIL(EIO); \
    remember(fd); \
    if (how == DONE_BUT_EIO) FAIL(EIO); \
    return 0; \
}
SYNC(fsync)
SYNC(fdatasync)

/* Calls that either happen or do not. */
#define WHOLE(name, spends, condition, call) \
    REAL(name); \
    if (!(condition)) return real call; \
    int how = next_fault(#name, spends); \
    if (how == EIO_ERROR || how == FULL) FAIL(ERROR_OF(how)); \
    int result = real call; \
    if (how == KILLED) kill(getpid(), SIGKILL); \
    if (how == DONE_BUT_EIO) FAIL(EIO); \
    return result;

int ftruncate(int fd, off_t size) { WHOLE(ftruncate, 0, is_tracked(fd), (fd, size)) }
int ftruncate64(int fd, off64_t size) { WHOLE(ftruncate64, 0, is_tracked(fd), (fd, size)) }
int unlink(const char *path) {
    struct stat st;
    if (is_under(path) && !stat(path, &st) && st.st_nlink == 1) room += st.st_size;
    WHOLE(unlink, 0, is_under(path), (path))
}
int rename(const char *from, const char *to) { WHOLE(rename, 0, is_under(from), (from, to)) }
int link(const char *from, const char *to) { WHOLE(link, 1, is_under(to), (from, to)) }

#define ALLOCATE(name, type) \
int name(int fd, type at, type size) { \
    REAL(name); \
    if (!is_tracked(fd)) return real(fd, at, size); \
    int how = next_fault("posix_fallocate", at + size); \
    if (how == KILLED) kill(getpid(), SIGKILL); \
    if (how == EIO_ERROR || how == FULL || how == DONE_BUT_EIO) return ERROR_OF(how); \
    return real(fd, at, size); \
}
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
