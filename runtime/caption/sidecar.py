"""A text file beside each picture, or at the same place below another folder.

The ledger comes first: a record is durable before its text file is written, and both hold the same text.
So after a crash the last records are held against their files, and what is missing is written again.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qvl.runtime.atomic import refuse_input, write_error, write_whole
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.record import Record
from qvl.runtime.errors import InputError
from qvl.runtime.files import ignores_case, is_portable, is_there
from qvl.runtime.vision.kind import kind_of

LEDGER_NAME: Final = ".qvl-caption.jsonl"
_LONGEST: Final = 255  # bytes of a name on ext4, APFS, XFS; letters on NTFS


@dataclass(frozen=True)
class Sidecars:
    """Text files with captions, one for each picture.

    Attributes:
        suffix: takes the place of the picture's own.
        out_dir: files are mirrored below it; None is beside the picture.
    """

    suffix: str = ".txt"
    out_dir: Path | None = None
    _ignoring: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.suffix.startswith(".") or not is_portable(f"a{self.suffix}") or len(self.suffix) < 2:
            raise InputError(f"the suffix of sidecars is {self.suffix!r}, expected one such as .txt")
        if kind_of(Path(f"a{self.suffix}")):  # the text of a.png would take the place of a.png
            raise InputError(
                f"the suffix of sidecars is {self.suffix!r}, a picture's, expected one such as .txt"
            )

    def path(self, item: Item) -> Path:
        """The text file of a picture."""
        picture = Path(item.path) if self.out_dir is None else self.out_dir / item.below_root
        return picture.with_suffix(self.suffix)

    def clashes(self, items: Iterable[Item]) -> dict[str, str]:
        """Pictures whose text file is that of another one before them, with that one's path."""
        owners: dict[str, str] = {}
        found = ((item.path, owners.setdefault(self._key(item), item.path)) for item in items)
        return {path: owner for path, owner in found if path != owner}

    def _key(self, item: Item) -> str:
        """The text file's path, in one form where the file system takes several for one name."""
        path = self.path(item)
        folder = str(path.parent)
        if folder not in self._ignoring:
            self._ignoring[folder] = ignores_case(path.parent)
        return unicodedata.normalize("NFC", str(path)).casefold() if self._ignoring[folder] else str(path)

    def refuse_inputs(self, items: Iterable[Item], inputs: Iterable[Path]) -> None:
        """See that no text file takes the place of a file that the run reads.

        Raises:
            OutputError: one would.
        """
        by_name: dict[str, list[Path]] = {}
        for path in inputs:
            by_name.setdefault(path.name.casefold(), []).append(path)
        for item in items:
            target = self.path(item)
            refuse_input(target, by_name.get(target.name.casefold(), ()))

    def takes(self, item: Item) -> bool:
        """True if a picture's text file can be made in its folder, which may have to be made too."""
        folder = self.path(item).parent
        while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110 never raises
            folder = folder.parent
        return os.access(folder, os.W_OK | os.X_OK)

    def has(self, item: Item) -> bool:
        """True if a picture has a text: a file that is not blank, or that cannot be read."""
        try:
            return self.read(item) is not None
        except InputError:
            return is_there(self.path(item))

    def read(self, item: Item) -> str | None:
        """The text that is there, without a byte order mark; None if there is no file, or a blank one.

        Raises:
            InputError: it is no text in UTF-8, or cannot be read.
        """
        path = self.path(item)
        try:
            text = path.read_bytes().decode("utf-8-sig").rstrip("\r\n")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except UnicodeDecodeError as e:
            is_utf16 = e.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            what = "UTF-16" if is_utf16 else "no text in UTF-8"
            raise InputError(f"{path}: {what}, so it is left as it is", hint="save it in UTF-8") from e
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e
        return text if text.strip() else None

    def obstacle(self, item: Item, *, joins: bool) -> str | None:
        """The reason why a picture's text file cannot be made, or None.

        Args:
            joins: the text that is there is to be kept beside the new one.
        """
        path = self.path(item)
        if path == Path(item.path):
            return "its text file would take its place"
        if len(os.fsencode(path.name)) > _LONGEST:
            return f"its text file, {path}, has a name of more than {_LONGEST} bytes"
        if path.is_dir():
            return f"its text file, {path}, is a folder"
        if not self.takes(item):
            return f"its text file, {path}, may not be written there"
        if joins:
            try:
                self.read(item)
            except InputError as e:
                return f"{e.message}: {e.hint}" if e.hint else e.message
        return None

    def write(self, item: Item, record: Record) -> None:
        """Write a record's captions, one a line, at once and durably.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        if record.caption is None:
            return
        path = self.path(item)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text_of(record))
        except OSError as e:
            hint = "free some space or change the permissions, then run the same command again"
            raise write_error(path, e, hint=hint) from e

    def restore(self, items: Iterable[Item], records: Iterable[Record]) -> int:
        """Write the files of records that a crash has kept from being written; how many they were."""
        by_path = {item.path: item for item in items}
        n = 0
        for record in records:
            item = by_path.get(record.path)
            if item is None or record.caption is None:
                continue
            with contextlib.suppress(InputError):  # others made it since
                if self.read(item) == text_of(record).rstrip("\r\n"):
                    continue
                self.write(item, record)
                n += 1
        return n


def text_of(record: Record) -> str:
    """The captions of a record as a text file has them: one a line when there are several samples."""
    if len(record.captions) > 1:
        return "".join(f"{' '.join(caption.split())}\n" for caption in record.captions)
    return f"{record.caption}\n"


def ledger_path(items: Iterable[Item], out_dir: Path | None) -> Path:
    """Path of the ledger of a run without an output file: in the folder common to all pictures."""
    if out_dir is not None:
        return out_dir / LEDGER_NAME
    folders = {Path(item.root or ".").absolute() for item in items}
    return Path(os.path.commonpath(folders)) / LEDGER_NAME
