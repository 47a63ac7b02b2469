"""Find the students' files in a folder of submissions: under other names, in subfolders, and in zip archives.

Every file is matched to an exercise or named in a remark; no symbolic link is followed.
"""

import lzma
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lm.console import visible

from . import source
from .exercise import Exercise

NOTES = ".progress.json"
IGNORED = re.compile(r"\.|__MACOSX$|__pycache__$|venv$|node_modules$|.*\.(bak\d+|pyc|md|pdf|csv|json|toml)$")
DEPTH = 3  # levels of subfolders that are searched
MOST_FILES = 500  # in one submission
MOST_BYTES = 20 << 20  # unpacked from the archives of one submission


@dataclass
class Submission:
    """A student's files by exercise, the record of hints, and what the teacher should know."""

    files: dict[str, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # of an exercise without a single file
    notes: Path | None = None
    remarks: list[str] = field(default_factory=list)


def find(
    folder: Path, exercises: Sequence[Exercise], unpacked: Path
) -> tuple[dict[str, Submission], list[str]]:
    """The submissions in a folder by student, and the names of loose files that belong to nobody.

    A subfolder or a zip archive is a student; a folder that holds answers itself is one submission.

    Args:
        exercises: all exercises, so that a file for one is not taken for another.
        unpacked: an empty folder for the contents of archives.

    Raises:
        ValueError: the folder does not exist or holds no submission.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    entries = [path for path in sorted(folder.iterdir()) if not IGNORED.match(path.name)]
    loose = [path for path in entries if not is_folder(path) and path.suffix.lower() != ".zip"]
    inner = [path for path in entries if is_folder(path)]
    own = folder / "homework"
    answers = [
        path for path in [*loose, *(files_in(own) if is_folder(own) else [])] if match(path, exercises)
    ]
    if answers and not any(match(path, exercises) for one in inner if one != own for path in files_in(one)):
        return {shown(folder.resolve().name): submission(folder, exercises, unpacked)}, []
    found = {shown(path.name): submission(path, exercises, unpacked / f"of {path.name}") for path in inner}
    for path in entries:
        if path.suffix.lower() == ".zip" and not is_folder(path):
            name = shown(path.stem if path.stem not in found else path.name)
            where = unpacked / f"zip {path.name}"
            problem = unzip(path, where)
            found[name] = submission(where, exercises, unpacked / f"in {path.name}", size(where))
            found[name].remarks += [problem] if problem else []
    if not found:
        names = f"; {shortened(Path(path.name) for path in loose)} fit no exercise" if loose else ""
        raise ValueError(f"{folder}: no submissions found; expected one folder or zip per student{names}")
    return found, [shown(path.name) for path in loose]


def submission(folder: Path, exercises: Sequence[Exercise], unpacked: Path, used: int = 0) -> Submission:
    """A student's folder: the best file for each exercise, and remarks on all others.

    Args:
        used: bytes of MOST_BYTES that are already unpacked.
    """
    made = Submission()
    places, every = [folder], list(walk(folder, DEPTH))
    if len(every) > MOST_FILES:
        made.remarks.append(f"{len(every)} files; only {MOST_FILES} are looked at")
    for path in [path for path in files_in(folder) if path.suffix.lower() == ".zip"]:
        where = unpacked / f"{len(places)}"
        if problem := unzip(path, where, MOST_BYTES - used):
            made.remarks.append(problem)
        used += size(where)
        places.append(where)
    candidates: dict[str, list[tuple[int, Path, Path]]] = {}  # rank, file, its path within the submission
    unknown: list[Path] = []
    for late, place in enumerate(places):
        for path in files_in(place):
            about = match(path, exercises)
            if about is not None:
                inside = path.relative_to(place)
                candidates.setdefault(about.name, []).append((rank(inside, about) + 4 * late, path, inside))
            elif path.suffix.lower() != ".zip" or late:
                unknown.append(path)
        made.notes = made.notes or next(
            (
                path
                for path in (place / "homework" / NOTES, place / NOTES)
                if path.exists() or path.is_symlink()
            ),
            None,
        )
    for name, some in candidates.items():
        some.sort(key=lambda one: one[0])
        inner = [inside for _, _, inside in some]
        best = [inside for level, _, inside in some if level == some[0][0]]
        if len(best) > 1:
            made.problems[name] = f"{len(best)} files could be it: {shortened(best)}; keep one"
            continue
        made.files[name] = some[0][1]
        if len(some) > 1:
            made.remarks.append(f"{name}: {shown(inner[0])} is graded, not {shortened(inner[1:])}")
    hidden = [
        path for path in sorted(folder.glob(".[!.]*")) if path.name[1] != "_" and match(path, exercises)
    ]
    if hidden:
        made.remarks.append(f"not graded, hidden: {shortened(Path(path.name) for path in hidden)}")
    if unknown:
        names = [Path(path.name) for path in unknown]
        made.remarks.append(f"not graded, the names fit no exercise: {shortened(names)}")
    return made


def match(path: Path, exercises: Sequence[Exercise]) -> Exercise | None:
    """The exercise that a file is for, by its name: router.py, Router.py and "my router (1).py" are for router."""
    name = path.name.lower()
    if not name.endswith((".py", ".py.txt")) or is_folder(path):
        return None
    exact = [about for about in exercises if about.file == path.name]
    if exact:
        return exact[0]
    stem = re.sub(r"\.py(\.txt)?$", "", path.name, flags=re.IGNORECASE)
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", stem)]
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 5, len(words)) + 1)}
    fit = [about for about in exercises if about.name.replace("-", "") in runs]
    longest = max((len(about.name) for about in fit), default=0)
    fit = [about for about in fit if len(about.name) == longest]
    return fit[0] if len(fit) == 1 else None


def rank(path: Path, about: Exercise) -> int:
    """How good a candidate is, 0 the best: the exact name in homework/, in the folder, deeper, other names."""
    if path.name != about.file:
        return 3
    return {"homework": 0, "": 1}.get(str(path.parent).removeprefix("."), 2)


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def files_in(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The files of a submission that may be answers; of a clone of the project only those in homework/."""
    return sorted(walk(folder, depth), key=lambda path: path.suffix.lower() not in (".py", ".zip"))[
        :MOST_FILES
    ]


def walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = [path for path in sorted(folder.iterdir()) if not IGNORED.match(path.name)]
    except OSError:
        return
    if is_folder(folder / "homework") and is_folder(folder / "exercises"):
        entries = [folder / "homework"]
    yield from (path for path in entries if not is_folder(path))
    for path in entries:
        if depth and is_folder(path):
            yield from walk(path, depth - 1)


def shortened(paths: Iterable[Path]) -> str:
    """The names of some files, at most eight."""
    names = [shown(path) for path in paths]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def shown(name: str | Path) -> str:
    """A file name that can be printed and written: control characters and bytes that are not UTF-8 are escaped."""
    return visible(str(name).encode("utf-8", "backslashreplace").decode())


def size(folder: Path) -> int:
    """Bytes of the files in a folder of unpacked archives."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unzip(path: Path, where: Path, most: int = MOST_BYTES) -> str:
    """Unpack the files of an archive that can be answers -> the problem, or an empty text"""
    where.mkdir(parents=True, exist_ok=True)
    skipped = []
    try:
        source.check_regular(path)
        left = most
        with zipfile.ZipFile(path) as archive:
            entries = [
                info for info in archive.infolist() if (parts := parts_of(info)) and not ignored(parts)
            ]
            entries.sort(key=lambda info: not info.filename.lower().endswith((".py", ".zip", NOTES)))
            for info in entries[:MOST_FILES]:
                if info.flag_bits & 1:
                    return f"{shown(path.name)}: cannot be unpacked: it is encrypted"
                with archive.open(info) as file:
                    content = file.read(max(min(left, source.MOST_BYTES), 0) + 1)
                left -= len(content)
                if left <= 0:
                    return f"{shown(path.name)}: unpacks to more than {MOST_BYTES >> 20} MB"
                target = where.joinpath(*parts_of(info))
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
                except OSError:  # a name too long, or that of another entry's folder
                    skipped.append(info.filename[-80:])
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
        return f"{shown(path.name)}: cannot be unpacked: {shown(str(error)) or type(error).__name__}"
    except (zipfile.zlib.error, lzma.LZMAError) as error:  # type: ignore[attr-defined]
        return f"{shown(path.name)}: cannot be unpacked: {error}"
    if len(entries) > MOST_FILES:
        return f"{shown(path.name)}: holds {len(entries)} files; only {MOST_FILES} are looked at"
    return f"{shown(path.name)}: not unpacked: {', '.join(map(shown, skipped[:8]))}" if skipped else ""


def parts_of(info: zipfile.ZipInfo) -> list[str]:
    """An archive entry's path without anything that leads outside; [] for a folder or one too deep."""
    parts = [part for part in PurePosixPath(info.filename).parts if part not in ("/", "..", ".")]
    parts = [part.replace(":", "_") for part in parts]  # on Windows, C:x would leave the folder
    return [] if info.is_dir() or len(parts) > DEPTH + 2 else parts


def ignored(parts: Sequence[str]) -> bool:
    return any(IGNORED.match(part) for part in parts) and parts[-1] != NOTES
