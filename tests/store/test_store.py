from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgetrain.errors import DiskError, SessionCorrupt, SessionLocked
from edgetrain.store import StageLayout, Store, TensorSpec, disk
from edgetrain.store.manifest import combined_digest
from edgetrain.store.slot import StageFiles, canonical_json
from edgetrain.store.transaction import Extents
from tests.store.common import (
    CODEBOOK,
    GROUPS,
    ROOT,
    content,
    holds,
    new_store,
    reopened,
    run_child,
    section,
    sound,
    update,
)

LAYER, STEM = GROUPS["00"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def test_what_was_committed_is_read_again(store: Store) -> None:
    with store.lock(["00"]):
        update(store, "00", 1)
    again = reopened(store.path)
    assert holds(again, "00", 1)
    assert holds(again, "01", 0)
    assert content(again, CODEBOOK, "frozen") == section(CODEBOOK, "frozen", 0)
    assert again.manifest("00").state == {"number": 1}
    assert [again.manifest(group).sequence for group in GROUPS] == [2, 1]
    assert again.digest() == store.digest()
    verification = again.verify()
    assert not any(row.problems for row in verification.rows)
    assert verification.digest == again.digest()
    assert [row.stage for row in verification.rows] == [
        "block00.layer00",
        "block00.stem",
        "block01.layer00",
        "codebook",
    ]


def test_parts_of_a_section_are_read(store: Store) -> None:
    into = bytearray(100)
    before = store.bytes_read
    store.read(LAYER.name, "m", memoryview(into)[10:60], offset=200)
    assert into[10:60] == section(LAYER, "m", 0)[200:250]
    assert into[:10] == bytes(10)
    assert store.bytes_read - before == 50
    for offset in (-1, LAYER.section_bytes("m") - 10):
        with pytest.raises(ValueError, match="section"):
            store.read(LAYER.name, "m", memoryview(into), offset=offset)
    with pytest.raises(ValueError, match="frozen"):
        store.read(LAYER.name, "frozen", memoryview(into))


def test_nothing_is_current_before_the_commit_and_all_after(store: Store) -> None:
    digest = store.digest()
    with store.lock(["00"]):
        transaction = store.transaction("00")
        for role in ("weight", "m", "v"):
            transaction.write(LAYER.name, role, memoryview(section(LAYER, role, 1)))
        assert holds(store, "00", 0)
        transaction.discard()
        assert store.digest() == digest
        assert sound(store)
        update(store, "00", 2)
    assert holds(store, "00", 2)
    assert store.digest() != digest


def test_stages_that_were_not_written_keep_their_slot(store: Store) -> None:
    with store.lock(["00"]):
        update(store, "00", 1, stages=[STEM])
        assert {name: record.slot for name, record in store.manifest("00").stages.items()} == {
            LAYER.name: "a",
            STEM.name: "b",
        }
        store.transaction("00").commit({"only": "state"})
    assert store.manifest("00").state == {"only": "state"}
    assert content(store, LAYER, "weight") == section(LAYER, "weight", 0)
    assert content(store, STEM, "weight") == section(STEM, "weight", 1)
    assert sound(reopened(store.path))


def test_moments_are_streamed_in_chunks_many_times(store: Store) -> None:
    """Each step reads a chunk, adds 1 to its bytes and writes it back, all in one transaction."""
    chunk_bytes = 5000
    with store.lock(["01"]):
        transaction = store.transaction("01")
        (layer,) = GROUPS["01"]
        for role in ("weight", "m", "v"):
            for _ in range(3):
                for offset in range(0, layer.section_bytes(role), chunk_bytes):
                    chunk = bytearray(min(chunk_bytes, layer.section_bytes(role) - offset))
                    transaction.read(layer.name, role, memoryview(chunk), offset)
                    chunk = bytearray((byte + 1) % 256 for byte in chunk)
                    transaction.write(layer.name, role, memoryview(chunk), offset)
        transaction.commit({})
    for role in ("weight", "m", "v"):
        assert content(store, layer, role) == bytes((byte + 3) % 256 for byte in section(layer, role, 0))


def test_a_read_of_old_and_new_bytes_is_refused(store: Store) -> None:
    with store.lock(["00"]):
        transaction = store.transaction("00")
        transaction.write(LAYER.name, "m", memoryview(bytes(100)), offset=50)
        with pytest.raises(ValueError, match="wrote 50"):
            transaction.read(LAYER.name, "m", memoryview(bytearray(100)))


def test_a_stage_written_in_part_cannot_be_committed(store: Store) -> None:
    with store.lock(["00"]):
        transaction = store.transaction("00")
        transaction.write(LAYER.name, "weight", memoryview(section(LAYER, "weight", 1)))
        with pytest.raises(ValueError, match=f"{LAYER.name}, m: 0 of 12288"):
            transaction.commit({})
        transaction.write(LAYER.name, "m", memoryview(section(LAYER, "m", 1))[:-1])
        with pytest.raises(ValueError, match="m: 12287 of 12288"):
            transaction.commit({})
        transaction.discard()
        with pytest.raises(ValueError, match="JSON"):
            store.transaction("00").commit({"loss": float("nan")})
    assert holds(store, "00", 0)


def test_the_first_commit_needs_every_stage(tmp_path: Path) -> None:
    store = Store.create(tmp_path, GROUPS, [CODEBOOK])
    assert store.uncommitted == ("00", "01")
    with store.lock(GROUPS):
        with pytest.raises(ValueError, match="codebook"):
            store.transaction("00")
        with pytest.raises(ValueError, match="240 of 4096"):
            store.write_frozen("codebook", [memoryview(bytes(240))])
        store.write_frozen("codebook", [memoryview(section(CODEBOOK, "frozen", 0))])
        transaction = store.transaction("00")
        with pytest.raises(ValueError, match="wrote 0"):
            transaction.read(LAYER.name, "m", memoryview(bytearray(10)))
        with pytest.raises(ValueError, match="0 of"):
            transaction.commit({})
        transaction.discard()
        update(store, "00", 0)
        assert store.uncommitted == ("01",)
        with pytest.raises(ValueError, match="trained with it"):
            store.write_frozen("codebook", [memoryview(section(CODEBOOK, "frozen", 1))])
    with pytest.raises(SessionCorrupt, match="01"):
        store.digest()
    with pytest.raises(ValueError, match="committed state"):
        Store.create(tmp_path, GROUPS, [CODEBOOK])


def test_an_ended_transaction_takes_nothing(store: Store) -> None:
    with store.lock(["00"]):
        transaction = store.transaction("00")
        with pytest.raises(ValueError, match="open transaction"):
            store.transaction("00")
        transaction.commit({})
        transaction.discard()
        for use in (lambda: transaction.write(LAYER.name, "m", memoryview(b"x")), lambda: transaction.commit({})):
            with pytest.raises(ValueError, match="has ended"):
                use()
    with pytest.raises(ValueError, match="not held"):
        store.transaction("00")


def test_an_open_transaction_ends_with_the_lock(store: Store) -> None:
    with pytest.raises(RuntimeError), store.lock(["00"]):
        store.transaction("00").write(LAYER.name, "m", memoryview(bytes(10)))
        raise RuntimeError
    with store.lock(["00"]):
        update(store, "00", 1)
    assert holds(store, "00", 1)


def test_the_state_is_copied_when_the_commit_begins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (gate.wait(10), sync(fd))[1])
    state = {"step": 1}
    memory = section(STEM, "weight", 1)
    with store.lock(["00"]):
        transaction = store.transaction("00")
        for role in ("weight", "m", "v"):
            transaction.write(STEM.name, role, memoryview(section(STEM, role, 1) if role != "weight" else memory))
        pending = transaction.commit_async(state)
        state["step"] = 2
        memory[:] = bytes(len(memory))
        assert store.manifest("00").sequence == 1
        gate.set()
        assert content(store, STEM, "weight") == section(STEM, "weight", 1)  # waits for the commit
        pending.wait()
    assert store.manifest("00").state == {"step": 1}


def fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("call", ["fdatasync", "replace", "fsync"])
@pytest.mark.parametrize("told_by", ["wait", "transaction", "other", "flush", "lock"])
def test_the_error_of_a_commit_is_raised_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, told_by: str
) -> None:
    with pytest.raises(DiskError, match="Input/output error"), store.lock(GROUPS):
        transaction = store.transaction("00")
        for layout in GROUPS["00"]:
            for role in layout.roles:
                transaction.write(layout.name, role.name, memoryview(section(layout, role.name, 1)))
        monkeypatch.setattr(os, call, fail)
        pending = transaction.commit_async({"number": 1})
        pending.join()
        if told_by == "wait":
            pending.wait()
        elif told_by == "transaction":
            store.transaction("00")
        elif told_by == "other":
            store.transaction("01")
        elif told_by == "flush":
            store.flush()
    monkeypatch.undo()
    assert holds(store, "00", 0)
    with store.lock(GROUPS):
        store.flush()
        update(store, "00", 2)
    assert holds(reopened(store.path), "00", 2)


def test_a_rename_of_unknown_fate_is_settled_before_slots_are_touched(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest was renamed, the sync of the folder failed: what counts is then what the folder has."""
    renamed: list[bool] = []
    replace, fsync = os.replace, os.fsync

    def fsync_fails_after_rename(fd: int) -> None:
        if renamed:
            raise OSError(5, "Input/output error")
        fsync(fd)

    with store.lock(["00"]):
        monkeypatch.setattr(os, "replace", lambda *args: (replace(*args), renamed.append(True)))
        monkeypatch.setattr(os, "fsync", fsync_fails_after_rename)
        with pytest.raises(DiskError):
            update(store, "00", 1)
        with pytest.raises(DiskError):
            store.transaction("00")
        monkeypatch.undo()
        transaction = store.transaction("00")
        assert store.manifest("00").state == {"number": 1}
        transaction.write(LAYER.name, "weight", memoryview(section(LAYER, "weight", 2)))
        assert holds(reopened(store.path), "00", 1)


def test_a_second_process_is_locked_out_of_the_group(store: Store) -> None:
    with store.lock(["01"]):
        child = run_child("lock", str(store.path))
        with pytest.raises(SessionLocked, match="group 01"), reopened(store.path).lock(["01"]):
            pass
        with reopened(store.path).lock(["00"]):
            pass
    assert child.returncode == SessionLocked.exit_code
    assert f"group 01 is being trained by process {os.getpid()}:" in child.stdout
    assert run_child("lock", str(store.path)).returncode == 0


def test_a_lock_taken_twice_leaves_the_first_alone(store: Store) -> None:
    with store.lock(["00"]):
        transaction = store.transaction("00")
        with pytest.raises(SessionLocked, match=f"process {os.getpid()}:"), store.lock(["00"]):
            pass
        transaction.commit({"number": 0})
    assert store.manifest("00").sequence == 2


def test_a_lock_shows_what_others_committed(store: Store) -> None:
    other = reopened(store.path)
    with store.lock(["00"]):
        update(store, "00", 1)
    with other.lock(["00"]):
        assert holds(other, "00", 1)
        update(other, "00", 2)
    assert reopened(store.path).manifest("00").sequence == 3


def test_groups_of_two_copies_put_together_are_one_session(tmp_path: Path) -> None:
    one = new_store(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = reopened(tmp_path / "copy")
    for store, group in ((one, "00"), (copy, "01")):
        with store.lock([group]):
            update(store, group, 1)
            update(store, group, 2)
    shutil.copytree(copy.path / "groups" / "01", one.path / "groups" / "01", dirs_exist_ok=True)
    for file in (copy.path / "stages").glob("block01.*"):
        shutil.copy(file, one.path / "stages")
    whole = new_store(tmp_path / "whole")
    with whole.lock(GROUPS):
        for group in ("01", "00"):
            update(whole, group, 2)
    together = reopened(one.path)
    assert together.digest() == whole.digest()
    assert together.verify().digest == whole.digest()


def test_groups_of_sessions_with_other_frozen_stages_are_refused(tmp_path: Path) -> None:
    one = new_store(tmp_path / "one")
    other = Store.create(tmp_path / "other", GROUPS, [CODEBOOK])
    with other.lock(GROUPS):
        other.write_frozen("codebook", [memoryview(section(CODEBOOK, "frozen", 9))])
        for group in GROUPS:
            update(other, group, 0)
    shutil.copy(other.path / "groups/01/manifest.json", one.path / "groups/01/manifest.json")
    with pytest.raises(SessionCorrupt, match="00 and 01"):
        reopened(one.path)


@pytest.mark.parametrize("role", ["weight", "m", "v"])
def test_a_flipped_byte_is_found_and_named(store: Store, role: str) -> None:
    digest = store.digest()
    path = store.path / "stages" / f"{STEM.name}.a.safetensors"
    position = 4096 + sum(
        STEM.section_bytes(before) for before in ("weight", "m", "v")[: ["weight", "m", "v"].index(role)]
    )
    data = bytearray(path.read_bytes())
    data[position + 3] ^= 1
    path.write_bytes(data)
    verification = reopened(store.path).verify()
    assert {row.stage for row in verification.rows if row.problems} == {STEM.name}
    (problem,) = next(row.problems for row in verification.rows if row.stage == STEM.name)
    assert f"{path}, {role}:" in problem
    assert (verification.digest != digest) == (role == "weight")


@pytest.mark.parametrize("layout", [STEM, CODEBOOK], ids=["stem", "codebook"])
def test_damaged_bytes_are_not_read(store: Store, layout: StageLayout) -> None:
    slot, role = layout.slots[0], layout.roles[-1].name
    path = store.path / "stages" / f"{layout.name}.{slot}.safetensors"
    data = bytearray(path.read_bytes())
    data[-4096] ^= 1  # the first byte of the last role
    path.write_bytes(data)
    again = reopened(store.path)
    into = memoryview(bytearray(16))
    with pytest.raises(SessionCorrupt, match=rf"{path}, {role}: SHA-256 .* the manifest says") as caught:
        again.read(layout.name, role, into, 64)
    assert "edgetrain verify" in caught.value.hint
    if layout.trained:
        again.read(layout.name, "weight", into)
        with again.lock(["00"]), pytest.raises(SessionCorrupt, match=str(path)):
            again.transaction("00").read(layout.name, role, into)


def test_manifests_without_their_slots_are_noticed(tmp_path: Path) -> None:
    one = new_store(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = reopened(tmp_path / "copy")
    with copy.lock(["00"]):
        update(copy, "00", 1)
    shutil.copytree(copy.path / "groups", one.path / "groups", dirs_exist_ok=True)
    with pytest.raises(SessionCorrupt, match="not from the copy"):
        holds(reopened(one.path), "00", 1)


def test_a_slot_is_hashed_once_and_own_commits_never(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    again = reopened(store.path)
    hashed: list[str] = []
    hash_role = StageFiles.hash
    monkeypatch.setattr(StageFiles, "hash", lambda *args: (hashed.append(args[2]), hash_role(*args))[1])
    for _ in range(2):
        content(again, LAYER, "weight")
    assert hashed == ["weight"]
    with again.lock(["00"]):
        update(again, "00", 1)
        hashed.clear()
        assert holds(again, "00", 1)
        assert hashed == []
    with store.lock(["00"]):
        update(store, "00", 2)
    with again.lock(["00"]):
        hashed.clear()
        content(again, LAYER, "m")
        assert hashed == ["m"], "another process wrote it"


def test_what_another_process_commits_meanwhile_is_no_damage(store: Store) -> None:
    reader = reopened(store.path)
    with store.lock(["00"]):
        for number in (1, 2):
            update(store, "00", number)
    assert holds(reader, "00", 2)


def test_the_thread_that_commits_runs_once_a_lock_is_held(store: Store) -> None:
    """A limit on memory drawn later on leaves no room for its stack."""
    again = reopened(store.path)
    before = threading.active_count()
    with again.lock(["00"]):
        assert threading.active_count() == before + 1
        update(again, "00", 1)
        assert threading.active_count() == before + 1


def test_two_processes_write_aside_under_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, seen = tmp_path / "file", os.replace, []

    def replace(source: Path, target: Path) -> None:
        if os.getpid() == 1:
            seen.append(source)
            monkeypatch.setattr(os, "getpid", lambda: 2)
            disk.replace_file(path, b"second")
        real(source, target)

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "replace", replace)
    disk.replace_file(path, b"first")
    assert seen
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by an error nor, for longer than the next lock, by a kill."""
    folder = store.path / "groups" / "00"
    before = sorted(folder.iterdir())
    (folder / "manifest.json.1.new").write_bytes(b"half a mani")
    with store.lock(["00"]):
        assert sorted(folder.iterdir()) == before
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(DiskError):
            update(store, "00", 1)
        monkeypatch.undo()
    assert sorted(folder.iterdir()) == before


def test_each_new_folder_is_synced_in_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync_folder", synced.append)
    disk.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    disk.make_folder(tmp_path / "a")
    assert len(synced) == 3


def test_damage_of_a_frozen_stage_is_found(store: Store) -> None:
    path = store.path / "stages/codebook.frozen.safetensors"
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    assert [row.stage for row in store.verify().rows if row.problems] == ["codebook"]


def test_verify_while_another_process_commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits between the reading of the manifest and of the slot overwrite what the manifest spoke of."""
    reader = reopened(store.path)
    load = type(reader._groups["00"]).load
    commits = iter((1, 2))

    def load_then_commit_twice(group: object) -> None:
        load(group)
        for number in commits:
            with store.lock(["00"]):
                update(store, "00", number)

    monkeypatch.setattr(reader._groups["00"], "load", lambda: load_then_commit_twice(reader._groups["00"]))
    assert sound(reader)


def edit_manifest(path: Path, **changes: object) -> None:
    path.write_bytes(canonical_json({**json.loads(path.read_text()), **changes}))


def test_a_newer_manifest_is_refused_with_that_reason(store: Store) -> None:
    edit_manifest(store.path / "groups/00/manifest.json", version=99, colour="blue")
    with pytest.raises(SessionCorrupt, match=r"00/manifest\.json was written by a newer version.* 99.* 1"):
        reopened(store.path)


@pytest.mark.parametrize("change", [{"sequence": 7}, {"state": {"number": 5}}, {"stages": {}}, {"checksum": None}])
def test_a_changed_manifest_is_noticed(store: Store, change: dict[str, object]) -> None:
    edit_manifest(store.path / "groups/00/manifest.json", **change)
    with pytest.raises(SessionCorrupt, match=r"00/manifest\.json is damaged"):
        reopened(store.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "edgetrain.manifest", "version": 1}', "[" * 10**5])
def test_a_torn_manifest_is_noticed(store: Store, text: str) -> None:
    (store.path / "groups/00/manifest.json").write_text(text)
    with pytest.raises(SessionCorrupt, match=r"00/manifest\.json is damaged"):
        reopened(store.path)


def test_the_manifest_of_another_group_is_noticed(store: Store) -> None:
    shutil.copy(store.path / "groups/00/manifest.json", store.path / "groups/01/manifest.json")
    with pytest.raises(SessionCorrupt, match="another session"):
        reopened(store.path)


def test_the_digest_needs_no_slots(store: Store) -> None:
    rows = [["codebook", "frozen", store.manifest("00").frozen["codebook"]]]
    for group in GROUPS:
        for name, record in store.manifest(group).stages.items():
            rows.append([name, "weight", record.hashes["weight"]])
    hashes = {name: {role: value} for name, role, value in rows}
    assert store.digest() == combined_digest(hashes, ["weight", "frozen"])
    assert combined_digest(hashes, ["weight"]) != store.digest()


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path) -> None:
    huge = StageLayout("huge", (TensorSpec("a", (1 << 50,)),), trained=True)
    with pytest.raises(DiskError, match=r"disk full: .* needs .* GiB, and .* are free"):
        Store.create(tmp_path / "session", {"00": [huge]})
    assert not (tmp_path / "session").exists()


def test_prefetch_and_counters(store: Store) -> None:
    before = store.bytes_written
    store.prefetch([LAYER.name, "codebook"])
    with store.lock(["01"]):
        update(store, "01", 1)
    assert store.bytes_written - before == 3 * 12288


@pytest.mark.parametrize("groups", [{"00": [CODEBOOK]}, {"00": [LAYER], "01": [LAYER]}])
def test_layouts_that_contradict_each_other(tmp_path: Path, groups: dict[str, list[StageLayout]]) -> None:
    with pytest.raises(ValueError, match="stages"):
        Store.create(tmp_path, groups)


def test_extents() -> None:
    extents = Extents()
    for begin, end in ((10, 20), (40, 50), (20, 30), (45, 60)):
        extents.add(begin, end)
    assert extents.overlap(0, 100) == 40
    assert extents.overlap(25, 45) == 10
    extents.add(0, 100)
    assert extents.overlap(0, 100) == 100


def test_no_torch_no_pickle_no_numpy() -> None:
    code = (
        "import sys, edgetrain.store; assert not {'torch', 'numpy', 'pickle'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
