"""Downloads KnowEdit from its publisher into a local folder, with digests."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kne_easyedit._util.files import atomic_write

REPOSITORY = "zjunlp/KnowEdit"
FILES = (
    "benchmark/wiki_counterfact/train_cf.json",
    "benchmark/wiki_counterfact/test_cf.json",
    "benchmark/wiki_recent/recent_train.json",
    "benchmark/wiki_recent/recent_test.json",
    "benchmark/ZsRE/ZsRE-test-all.json",
    "benchmark/WikiBio/wikibio-test-all.json",
)
SUMS = "SHA256SUMS"


def fetch(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Downloads the files that are missing in ``folder``, or empty.

    Their digests are kept in ``SHA256SUMS`` (as ``sha256sum`` writes it); a file that exists must still match.

    Yields:
        Name, SHA-256, and ``downloaded`` or ``there``.

    Raises:
        ConnectionError: The publisher cannot be reached.
        ValueError: A file has changed since it was downloaded.
    """
    known = _read_sums(folder / SUMS)
    for name in FILES:
        file, state = folder / name, "there"
        if not file.is_file() or not file.stat().st_size:  # an interrupted copy by hand
            _download(name, file)
            state = "downloaded"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if state == "there" and known.get(name, digest) != digest:
            raise ValueError(
                f"{file}: has changed since it was downloaded (its digest is {digest[:16]}, {SUMS} says "
                f"{known[name][:16]}); remove it to fetch it again"
            )
        known[name] = digest
        atomic_write(folder / SUMS, "".join(f"{known[n]}  {n}\n" for n in FILES if n in known))
        yield name, digest, state


def _download(name: str, file: Path) -> None:
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as temporary:
        try:
            downloaded = hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=temporary)
        except Exception as error:  # huggingface_hub and its HTTP library raise a dozen types for this
            raise ConnectionError(
                f"{name} cannot be downloaded from {REPOSITORY} ({type(error).__name__}). Without network: get the "
                f"files by hand from https://huggingface.co/datasets/{REPOSITORY} and name their folder by "
                f"KNOWEDIT=FOLDER (the folder that holds 'benchmark'), or name single files by --data"
            ) from error
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.part")
        shutil.copyfile(downloaded, partial)
        partial.replace(file)


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {line[1]: line[0] for line in lines if len(line) == 2}
