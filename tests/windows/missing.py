"""What Python lacks on Windows."""

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
NAMES = {
    "os": "chown fchmod fchown fork forkpty getegid geteuid getgid getgroups getpgid getpriority getsid "
    "getuid killpg lchown lockf mkfifo mknod nice posix_spawn pread pwrite sched_getaffinity "
    "sched_setaffinity sendfile setgid setpgid setpgrp setsid setuid statvfs sync sysconf uname wait "
    "wait3 wait4 O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG",
    "signal": "alarm getitimer pause pthread_kill pthread_sigmask setitimer sigpending sigwait "
    "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGXFSZ",
}
