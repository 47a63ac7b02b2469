"""Makes Python on Linux behave as on Windows where the two differ; Python imports it when it starts."""

import fcntl
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import warnings

import missing

NEEDED = {"WNOHANG", "getuid", "posix_spawn", "sched_getaffinity", "sendfile", "uname"}  # by libraries
flags, sync, open_file = fcntl.fcntl, os.fsync, os.open


def check_closed(path):
    """Raise PermissionError if this process has the file, or one in the folder, open or mapped."""
    if isinstance(path, int) or not os.path.lexists(path):
        return
    whole = os.path.realpath(path)
    found = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        found += [line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line]
    if any(one == whole or one.startswith(whole + os.sep) for one in found):
        raise PermissionError(13, "The process cannot access the file: it is being used", str(path))


def of_closed(function, exclusive=False):
    """A function of os that refuses files that are open; `exclusive`: and a target that exists."""

    def call(path, *others, **options):
        for one in (path, *others):
            check_closed(one)
        if exclusive and os.path.lexists(others[0]):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(path))
        return function(path, *others, **options)

    return call


def opened(path, how, *others, **options):
    if os.path.isdir(path) and how & os.O_TMPFILE != os.O_TMPFILE:  # which makes a temporary file in it
        raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, how, *others, **options)


def synced(handle):
    if flags(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY or stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(9, "Bad file descriptor")
    sync(handle)


def of_sockets(function):
    def call(*lists):
        if not all(isinstance(one, socket.socket) for some in lists[:3] for one in some):
            raise OSError(10038, "An operation was attempted on something that is not a socket")
        return function(*lists)

    return call


def refused(*arguments, **options):
    raise OSError(22, "A required privilege is not held by the client")


os.open, os.fsync, os.symlink = opened, synced, refused
os.rename = of_closed(os.rename, exclusive=True)
for name in ("replace", "remove", "unlink", "rmdir"):
    setattr(os, name, of_closed(getattr(os, name)))
shutil._use_fd_functions = False  # of rmtree, which would open folders
select.select = of_sockets(select.select)
subprocess.Popen.kill = lambda process, number=signal.SIGKILL: process.send_signal(number)
for module, names in missing.NAMES.items():
    for name in set(names.split()) - NEEDED:
        delattr(sys.modules[module], name)
sys.modules |= dict.fromkeys(missing.MODULES)
warnings.filterwarnings("ignore", message="only soft file lock")
warnings.filterwarnings("error", category=EncodingWarning, module="(lm|moe|mla|exercises|experiments)([.]|$)")
