"""Files are whole or not there: what a failed write leaves is what was there before."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flowbp.given import digest_files
from flowbp.runtime.files import as_json, remove, remove_left, replacing, write_file
from flowbp.runtime.tensors import read_tensors, write_tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another(tmp_path):
    for content in ("first", b"second"):
        write_file(tmp_path / "a.txt", content)
    assert (tmp_path / "a.txt").read_bytes() == b"second" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk"), SafetensorError("disk"), RuntimeError("disk")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_fails_leaves_what_was_there(error, kind, tmp_path):
    path = tmp_path / "kept"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError), replacing(path) as scratch:
        if kind == "file":
            scratch.write_text("half of the n")
        else:
            scratch.mkdir()
            (scratch / "half").touch()
        raise error
    assert names(tmp_path) == ["kept"]
    assert path.read_text() == "old" if kind == "file" else names(path) == ["old"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("first", "second"):
        with replacing(tmp_path / "folder") as scratch:
            scratch.mkdir()
            (scratch / name).write_text(name)
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["second"]


def test_scraps_of_a_killed_write_do_not_stop_the_next(tmp_path):
    (tmp_path / ".folder.a1b2c3d4.partial" / "folder").mkdir(parents=True)
    others = [".folder.partial", ".folder2.a1b2c3d4.partial", ".other.a1b2c3d4.partial", "folder.a1b2c3d4.partial"]
    for name in others:
        (tmp_path / name / "half").mkdir(parents=True)
    with replacing(tmp_path / "folder") as scratch:
        scratch.mkdir()
    assert names(tmp_path) == sorted([*others, "folder"]) and names(tmp_path / "folder") == []
    (tmp_path / ".folder.e5f6a7b8.partial").mkdir()  # perhaps of a write that has yet to lock it
    remove_left(tmp_path)
    assert names(tmp_path) == [".folder.e5f6a7b8.partial", ".folder.partial", "folder", "folder.a1b2c3d4.partial"]


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path):
    """Neither under names that could be guessed, nor as what a kill seems to have left."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept").write_text("kept")
    for name in (".a.partial", ".a.old.partial", ".a.gone.partial", ".a.a1b2c3d4.partial"):
        (tmp_path / name).symlink_to(tmp_path / "theirs", target_is_directory=True)
    (tmp_path / "a").symlink_to(tmp_path / "theirs" / "kept")
    write_file(tmp_path / "a", "ours")
    assert (tmp_path / "theirs" / "kept").read_text() == "kept" and names(tmp_path / "theirs") == ["kept"]
    assert (tmp_path / "a").read_text() == "ours" and not (tmp_path / "a").is_symlink()


def test_nobody_else_can_reach_what_is_being_written(tmp_path):
    """Its folder has another name each time, is open to the user alone, and is no leftover while it is in use."""
    seen = set()
    for _ in range(3):
        with replacing(tmp_path / "a") as scratch:
            scratch.touch()
            remove_left(tmp_path)
            assert scratch.exists() and scratch.parent.stat().st_mode & 0o777 == 0o700
            seen.add(scratch.parent.name)
    (tmp_path / "plain").touch()
    assert len(seen) == 3 and (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_writers_of_a_cache_do_not_meet(tmp_path):
    with replacing(tmp_path / "a", cache=True) as one, replacing(tmp_path / "a", cache=True) as two:
        one.write_text("same")
        two.write_text("same")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "same"


def test_bytes_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: seen.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append("moved") or replace(old, new))
    write_file(tmp_path / "a", "content")
    written, *rest = seen
    assert written.endswith(".partial/a") and rest == ["moved", str(tmp_path)]


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_file(tmp_path / "a.json", as_json({"a": float("nan"), "b": [1.5, float("inf")]}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, None]}


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == ["folder"]


def test_a_digest_is_of_contents_in_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    one, other = ([tmp_path / name for name in order] for order in ("ab", "ba"))
    assert digest_files(one) != digest_files(other) == digest_files(other)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_this_users_others_whichever_library_writes_them(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "weights.safetensors") as scratch:
            save_file({"w": torch.zeros(1)}, scratch)
        with replacing(tmp_path / "folder") as scratch:
            scratch.mkdir()
            save_file({"w": torch.zeros(1)}, scratch / "weights.safetensors")
        assert os.umask(mask) == mask, "left as it was"
    finally:
        os.umask(before)
    for name in ("weights.safetensors", "folder/weights.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("old", "new"), [(b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]"), (b'"a"', b'"b"'), (b"me", b"no")])
def test_what_a_file_says_of_its_tensors_is_covered_by_their_digest(old, new, tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.ones(2, 3)}, {"of": "me"})
    assert read_tensors(file)[1] == {"of": "me"}
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(OSError, match="is damaged"):
        read_tensors(file)
