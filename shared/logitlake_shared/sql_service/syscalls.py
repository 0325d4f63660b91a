"""Numbers of the system calls that a worker gives up, on the two machines that we know: x86-64 and 64-bit ARM.

A question needs to read, to compute and to write to its pipe. What is listed here it never needs, so the kernel is told
to refuse it (`sandbox`). A list of what is refused, and not of what is allowed: which calls Python, DuckDB, Arrow and
the C library make differs between their releases and kernels, and a filter that breaks with each of them is switched
off by the first person in a hurry. Landlock and the limits stop the same things a second time.

Each line: name, number on x86-64, number on 64-bit ARM; `-` where there is none.
"""

__all__ = ["DENIED", "NUMBERS"]

_ARCHITECTURES = ("x86_64", "aarch64")
_DENIED = """
# processes and signals
fork 57 -
vfork 58 -
execve 59 221
execveat 322 281
kill 62 129
tkill 200 130
rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
pidfd_open 434 434
pidfd_send_signal 424 424
pidfd_getfd 438 438
ptrace 101 117
process_vm_readv 310 270
process_vm_writev 311 271
process_madvise 440 440
kcmp 312 272
setsid 112 157
setpgid 109 154
# files that change
truncate 76 45
ftruncate 77 46
fallocate 285 47
rename 82 -
renameat 264 38
renameat2 316 276
mkdir 83 -
mkdirat 258 34
rmdir 84 -
creat 85 -
link 86 -
linkat 265 37
unlink 87 -
unlinkat 263 35
symlink 88 -
symlinkat 266 36
chmod 90 -
fchmod 91 52
fchmodat 268 53
fchmodat2 452 452
chown 92 -
fchown 93 55
lchown 94 -
fchownat 260 54
utime 132 -
utimes 235 -
utimensat 280 88
futimesat 261 -
mknod 133 -
mknodat 259 33
setxattr 188 5
lsetxattr 189 6
fsetxattr 190 7
setxattrat 463 463
removexattr 197 14
lremovexattr 198 15
fremovexattr 199 16
removexattrat 466 466
# memory with a name
memfd_create 319 279
memfd_secret 447 447
mq_open 240 180
mq_unlink 241 181
shmget 29 194
shmat 30 196
semget 64 190
msgget 68 186
# sockets
socket 41 198
socketpair 53 199
connect 42 203
bind 49 200
listen 50 201
accept 43 202
accept4 288 242
# who this process is
setuid 105 146
setgid 106 144
setreuid 113 145
setregid 114 143
setgroups 116 159
setresuid 117 147
setresgid 119 149
setfsuid 122 151
setfsgid 123 152
capset 126 91
setrlimit 160 164
personality 135 92
# the system
mount 165 40
umount2 166 39
pivot_root 155 41
chroot 161 51
unshare 272 97
setns 308 268
open_tree 428 428
open_tree_attr 467 467
move_mount 429 429
fsopen 430 430
fsconfig 431 431
fsmount 432 432
fspick 433 433
mount_setattr 442 442
swapon 167 224
swapoff 168 225
reboot 169 142
sethostname 170 161
setdomainname 171 162
syslog 103 116
acct 163 89
quotactl 179 60
settimeofday 164 170
adjtimex 159 171
clock_settime 227 112
clock_adjtime 305 266
iopl 172 -
ioperm 173 -
init_module 175 105
finit_module 313 273
delete_module 176 106
kexec_load 246 104
kexec_file_load 320 294
bpf 321 280
perf_event_open 298 241
userfaultfd 323 282
io_uring_setup 425 425
io_uring_enter 426 426
io_uring_register 427 427
io_setup 206 0
add_key 248 217
request_key 249 218
keyctl 250 219
migrate_pages 256 238
fanotify_init 300 262
name_to_handle_at 303 264
open_by_handle_at 304 265
lookup_dcookie 212 18
vhangup 153 58
"""
# Allowed or not by their arguments.
_JUDGED = """
clone 56 220
clone3 435 435
fcntl 72 25
ioctl 16 29
open 2 -
openat 257 56
openat2 437 437
tgkill 234 131
prlimit64 302 261
"""


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [line.split() for line in table.strip().splitlines() if not line.startswith("#")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


DENIED = {machine: _numbers(_DENIED, column) for column, machine in enumerate(_ARCHITECTURES, 1)}
"""refused whatever their arguments: by machine, by name"""
NUMBERS = {machine: _numbers(_JUDGED, column) for column, machine in enumerate(_ARCHITECTURES, 1)}
"""judged by their arguments: by machine, by name"""
