from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qvl.runtime.caption.inputs import Item, find_inputs
from qvl.runtime.errors import InputError
from qvl.runtime.vision.kind import IMAGE_SUFFIXES

ALL = ["photos/a.png", "photos/b.JPG", "photos/sub/c.avif", "photos/sub/e.mp4", "photos/z.heic"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.JPG",
        "a.png",
        "notes.txt",
        ".hidden.png",
        "sub/c.avif",
        "sub/.git/d.png",
        "sub/e.mp4",
        "z.heic",
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


IN_ORDER = ["photos/a.png", "photos/b.JPG", "photos/sub/c.avif", "photos/sub/e.mp4", "photos/z.heic"]


def paths(*arguments: str, stdin: list[str] | None = None) -> list[str]:
    return [item.path for item in find_inputs(arguments, stdin).items]


def test_a_folder_gives_its_pictures_in_order_without_hidden_ones(photos: Path) -> None:
    assert paths("photos") == IN_ORDER


def test_each_path_comes_once_however_often_it_is_named(photos: Path) -> None:
    assert paths("./photos/a.png", "photos", "photos//a.png")[0] == "photos/a.png"
    assert len(paths("./photos/a.png", "photos", "photos//a.png")) == 5


def test_a_named_file_is_taken_whatever_it_is_and_wherever_it_is(photos: Path) -> None:
    assert paths("photos/notes.txt", "photos/.hidden.png", "gone.jpg") == [
        "photos/notes.txt",
        "photos/.hidden.png",
        "gone.jpg",
    ]


def test_globs(photos: Path) -> None:
    assert paths("photos/*.png") == ["photos/a.png"]
    assert paths("photos/**/*.*") == paths("photos")[:2] + paths("photos/sub") + ["photos/z.heic"]
    assert paths("pho*") == paths("photos")
    (photos / "x[1].png").write_bytes(b"x")
    assert paths("photos/x[1].png") == ["photos/x[1].png"]  # a file of that name is no glob
    found = find_inputs(["photos/*.gif", "photos"])
    assert found.notes == ["photos/*.gif: matches no picture"]


def test_lists(photos: Path) -> None:
    Path("list.txt").write_text("photos/a.png\n\nphotos/sub\r\n", encoding="utf-8")
    assert paths("@list.txt") == ["photos/a.png", "photos/sub/c.avif", "photos/sub/e.mp4"]
    (photos / "list").write_bytes(b"a.png\0sub/c.avif\0")
    assert paths("@photos/list") == ["photos/a.png", "photos/sub/c.avif"]  # beside the list
    with pytest.raises(InputError, match=r"gone\.txt: the list cannot be read"):
        paths("@gone.txt")


def test_a_picture_is_no_list(photos: Path) -> None:
    with pytest.raises(InputError, match=r"a\.png: by its name not a list"):
        paths("@photos/a.png")


def test_stdin(photos: Path) -> None:
    assert paths("-", stdin=["photos/a.png\n", "odd name.jpg\n"]) == ["photos/a.png", "odd name.jpg"]


def test_a_circle_of_links_ends(photos: Path) -> None:
    (photos / "sub" / "up").symlink_to(photos, target_is_directory=True)
    assert paths("photos") == IN_ORDER


def test_what_may_not_be_looked_at_stops_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder without the right to enter it; its record will say so."""
    is_dir = Path.is_dir

    def forbidden(path: Path) -> bool:
        if path.name == "a.png":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", forbidden)
    assert paths("photos", "photos/a.png") == IN_ORDER
    assert paths("photos/a.png") == ["photos/a.png"]


def test_nothing_to_do_is_an_error(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match="photos/empty: no pictures in this folder"):
        paths("photos/empty")
    with pytest.raises(InputError, match="no pictures given"):
        paths("-", stdin=[])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Item("photos/sub/c.avif", "photos"), "sub/c.avif"),
        (Item("a.png", "."), "a.png"),
        (Item("/x/y.png", "/x"), "y.png"),
        (Item("../up.png", ".."), "up.png"),
    ],
)
def test_mirrored_output_stays_below_its_folder(item: Item, expected: str) -> None:
    assert str(item.below_root) == expected


def test_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    (tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    assert paths(str(tmp_path))[0].encode("utf-8", "surrogateescape").endswith(b"caf\xe9.png")


def test_every_format_that_pillow_opens_is_known() -> None:
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    no_pictures = {".bufr", ".grib", ".h5", ".hdf", ".fit", ".fits"}  # scientific containers, mere stubs
    need_programs = {".eps", ".ps", ".wmf", ".emf", ".mpeg", ".mpg"}
    obscure = {".flc", ".fli", ".ftc", ".ftu", ".gbr", ".iim", ".pcd", ".pxr"}
    assert known - no_pictures - need_programs - obscure <= IMAGE_SUFFIXES


def test_lines_of_lists_that_begin_with_a_hash_are_comments(photos: Path) -> None:
    Path("#a.png").touch()
    lines = ["# photos of may\n", "photos/a.png\n", "  \n", "#a.png\n", "#gone.png\n"]
    Path("list.txt").write_text("".join(lines))
    for found in (find_inputs(["@list.txt"]), find_inputs(["-"], lines)):
        assert [item.path for item in found.items] == ["photos/a.png"]
        assert found.notes == ["#a.png: taken for a comment; ./#a.png names the file"]
    assert paths("-", stdin=["./#a.png\n"]) == paths("-", stdin=["#a.png\0"]) == paths("#a.png") == ["#a.png"]
    with pytest.raises(InputError):
        paths("-", stdin=["# nothing\n"])
