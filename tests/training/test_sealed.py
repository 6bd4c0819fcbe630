import subprocess

import pytest

from contracts.errors import InputError
from training.sealed import MARKER, damage, note_change, remove_sealed, require_whole, seal


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "adapter" / "b c.txt").write_text("trees")
    (folder / "curve.png").write_text("later commands draw it again")
    seal(folder)
    return folder


def test_a_person_can_check_it_with_sha256sum(folder):
    checked = subprocess.run(
        ["sha256sum", "--check", MARKER], cwd=folder, capture_output=True, text=True, check=True
    )
    assert checked.stdout.splitlines() == ["a.json: OK", "adapter/b c.txt: OK"]


def test_records_may_change_and_files_may_be_added(folder):
    (folder / "curve.png").write_text("drawn again")
    (folder / "added.json").write_text("{}")
    assert damage(folder) is None


def test_a_sealed_folder_inside_has_hashes_of_its_own(folder):
    part = folder / "fold_0"
    part.mkdir()
    (part / "c.json").write_text("{}")
    seal(part)
    seal(folder)
    assert "fold_0" not in (folder / MARKER).read_text()
    (part / "c.json").write_text("[]")
    assert damage(folder) is None
    assert "c.json: sha256 differs" in damage(part)


def test_a_change_on_purpose_is_noted(folder):
    file = folder / "adapter" / "b c.txt"
    file.write_text("others")
    with pytest.raises(InputError, match="b c.txt: sha256 differs from COMPLETE"):
        require_whole(folder)
    note_change(file)
    require_whole(folder)
    (folder / "a.json").write_text("[]")
    with pytest.raises(InputError, match="a.json"):
        require_whole(folder)


def test_a_folder_without_files_is_not_taken_for_one_of_an_older_version(tmp_path, capsys):
    seal(tmp_path)
    require_whole(tmp_path)
    assert capsys.readouterr().out == ""


def test_the_marker_goes_first(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.sealed.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_sealed(folder)
    assert not (folder / MARKER).exists() and (folder / "a.json").exists()
