"""The package where there is no POSIX: it imports, locks and measures memory by what every system has."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import grood_cert
from grood_cert.system import memory
from tests.faults.forks import Child, forget, report

ROOT = Path(grood_cert.__file__).parent
ABSENT = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")  # from Windows
POSIX = {
    "os": {
        *("fork", "forkpty", "kill", "killpg", "geteuid", "getuid", "getgid", "getpgid", "setsid", "nice", "mkfifo"),
        *("posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "sync", "uname", "chown"),
        *("statvfs", "wait", "waitpid", "wait4", "O_DIRECTORY", "O_NOFOLLOW", "O_TMPFILE", "getloadavg", "sysconf"),
    },
    "signal": {"SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "alarm", "setitimer", "pause", "pthread_kill"},
    "time": {"tzset", "clock_gettime", "pthread_getcpuclockid"},
    "socket": {"AF_UNIX"},
}


def without_posix() -> None:
    """In a child."""
    warnings.simplefilter("ignore")
    forget("grood_cert", "filelock")
    sys.modules.update(fcntl=None, resource=None)
    package = importlib.import_module("grood_cert")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "grood_cert.")]
    for name in names:
        if name != "grood_cert.__main__":
            importlib.import_module(name)
    assert importlib.import_module("grood_cert.system.memory").peak_memory() > 2**20
    report(str(len(names)))


def test_every_module_imports_without_fcntl_and_resource():
    ended = Child(without_posix).wait()
    assert ended.code == 0, ended.said
    assert int(ended.heard[0]) > 100


def uses(tree: ast.AST) -> set[str]:
    """Modules, and attributes of modules, that a piece of code names and Windows lacks."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] in ABSENT)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found.update([node.module] if node.module in ABSENT else names & POSIX.get(str(node.module), set()))
        elif isinstance(node, ast.Attribute) and node.attr in POSIX.get(ast.unparse(node.value), ()):
            found.add(ast.unparse(node))
    return found


def test_the_search_finds_what_windows_lacks():
    code = "import fcntl, os\nfrom signal import SIGKILL, SIGINT\nfrom pwd import getpwnam\nos.fork()\nos.replace(a, b)"
    assert uses(ast.parse(code)) == {"fcntl", "SIGKILL", "pwd", "os.fork"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_windows_lacks_is_used(path):
    assert not uses(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("platform", "module", "stand_in", "expected"),
    [
        (
            "win32",
            "psutil",
            {"Process": lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7000))},
            7000,
        ),
        ("darwin", "resource", {"RUSAGE_SELF": 0, "getrusage": lambda who: SimpleNamespace(ru_maxrss=5000)}, 5000),
        ("freebsd14", "resource", {"RUSAGE_SELF": 0, "getrusage": lambda who: SimpleNamespace(ru_maxrss=5)}, 5 * 1024),
    ],
)
def test_peak_memory_elsewhere(monkeypatch, platform, module, stand_in, expected):
    """The unit of `ru_maxrss` is the byte on macOS and the kilobyte elsewhere."""
    monkeypatch.setattr(memory, "_STATUS", Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**stand_in))
    assert memory.peak_memory() == expected
