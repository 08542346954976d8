"""Download of Cityscapes' packages with cityscapesScripts (its command `csDownload`), which handles the site's login.

It asks for name and password on the terminal, offers to store them, resumes, and checks the md5 that the site states.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from dgbench.download.transfer import FULL, Patience, full_disk
from dgbench.errors import DataError

INSTALL = "pip install -e '.[cityscapes]'"
_REGISTER = "https://www.cityscapes-dataset.com/register/"


def check(by_hand: str) -> None:
    """Check that the downloader can run here, before anything else is started.

    Args:
        by_hand: what a user can do instead, for the messages.

    Raises: DataError if it is not installed, or there is no terminal to ask for a password.
    """
    downloader = _downloader(by_hand)
    if not credentials(downloader).is_file() and not sys.stdin.isatty():
        raise DataError(
            "Cityscapes needs a login, and there is no terminal to ask on",
            f"run the command once in a terminal, or `csDownload -l`, and let it store the login; {_REGISTER} gives accounts. "
            f"Or {by_hand}",
        )


def credentials(downloader: ModuleType) -> Path:
    """Return where the downloader stores a login if it is told to."""
    return Path(downloader.appdirs.user_data_dir("cityscapesscripts", "cityscapes"), "credentials.json")


def fetch(names: list[str], place: Callable[[str], Path], tell: Callable[[str], None], by_hand: str, patience: Patience) -> None:
    """Download packages to the paths that `place` returns, except for those that exist.

    Raises: DataError saying what the site or the downloader answered; FullDiskError.
    """
    missing = [name for name in names if not place(name).is_file()]
    if not missing:
        return
    downloader = _downloader(by_hand)
    # its messages go to stderr: stdout is for our results
    with contextlib.redirect_stdout(sys.stderr), _explained(by_hand):
        session = downloader.login()
        for name in missing:
            _package(downloader, session, name, place(name), tell, patience)


def _package(
    downloader: ModuleType, session: object, name: str, path: Path, tell: Callable[[str], None], patience: Patience
) -> None:
    import requests

    folder = path.parent / "csDownload"  # it gives an unfinished package its final name
    folder.mkdir(parents=True, exist_ok=True)
    half, failures, furthest = folder / name, 0, -1
    # it would request the bytes after the last one and treat the refusal as an error
    while not zipfile.is_zipfile(half):
        try:
            with full_disk(half, None, "run the same command again"):
                downloader.download_packages(session=session, package_names=[name], destination_path=str(folder), resume=True)
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            have = half.stat().st_size if half.is_file() else 0
            failures = 1 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures >= patience.tries:
                raise
            seconds = min(patience.longest, patience.first * 2 ** (failures - 1))
            tell(f"{name}: {_line(error)}; trying again in {seconds:.0f} s, {have / 1e6:,.1f} MB are kept")
            _sleep(seconds)
        except Exception as error:
            if "MD5" in str(error):
                half.unlink(missing_ok=True)
            raise
    os.replace(half, path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)


@contextlib.contextmanager
def _explained(by_hand: str):  # type: ignore[no-untyped-def]
    import requests

    try:
        yield
    except (DataError, KeyboardInterrupt):
        raise
    except requests.RequestException as error:
        raise DataError(
            f"www.cityscapes-dataset.com: {_line(error)}",
            f"check the network and HTTPS_PROXY, then run the same command again; or {by_hand}",
        ) from None
    except OSError as error:
        if error.errno in FULL or error.filename:
            raise
        raise DataError(f"cityscapesScripts: {_line(error)}", f"run the same command again; or {by_hand}") from None
    except EOFError:
        raise DataError("Cityscapes needs a login, and nothing was typed", f"{_REGISTER} gives accounts; or {by_hand}") from None
    except Exception as error:
        # the downloader raises plain exceptions
        text = _line(error)
        hint = f"run the same command again; or {by_hand}"
        if "credentials" in text.lower():
            hint = f"check name and password ({_REGISTER} gives accounts), then {hint}"
        elif "don't have access" in text:
            hint = f"your account may wait for approval, see https://www.cityscapes-dataset.com/downloads/; then {hint}"
        raise DataError(f"cityscapesScripts says: {text}", hint) from None


def _downloader(by_hand: str) -> ModuleType:
    try:
        from cityscapesscripts.download import downloader
    except ImportError:
        raise DataError(
            "Cityscapes is fetched with cityscapesScripts, which is not installed", f"{INSTALL}; or {by_hand}"
        ) from None
    module: ModuleType = downloader
    return module


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
