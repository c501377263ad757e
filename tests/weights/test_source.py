"""Where models come from: files, folders, the embedded default; the hub through a small local stand-in of its API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from textmill.errors import ModelError
from textmill.weights import embedded
from textmill.weights.source import ModelSource, resolve


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def test_nothing_means_the_embedded_model(default_model: Path) -> None:
    expected = ModelSource(embedded.NAME, default_model, "gguf", "")
    assert resolve(None) == expected
    assert resolve(embedded.NAME) == expected


def test_local_folders_and_files(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "config.json", "model.safetensors", "extra.gguf")
    assert resolve(str(folder)) == ModelSource(str(folder), folder, "safetensors", "")
    single = touch(tmp_path / "b", "x.gguf", "README.md")
    assert resolve(str(single)).path == single / "x.gguf"
    assert resolve(str(single / "x.gguf")) == ModelSource(str(single / "x.gguf"), single / "x.gguf", "gguf", "")


def test_the_home_folder_and_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "m", "x.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m").path == tmp_path / "m" / "x.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("m").path == tmp_path / "m" / "x.gguf"
    assert resolve("./m/x.gguf").path == tmp_path / "m" / "x.gguf"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("a.gguf", "b.gguf"), "several .gguf files; name one of them by its path: a.gguf, b.gguf"),
        (("config.json", "training_args.bin"), "no pytorch_model.bin; convert them"),
        (("pytorch_model.bin",), "no pytorch_model.bin; convert them"),
        (("model.safetensors",), "no config.json"),
        (("README.md",), "there is no model here"),
    ],
)
def test_folders_we_cannot_serve(tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(str(touch(tmp_path / "m", *names)))
    assert problem in caught.value.message


@pytest.mark.parametrize("name", ["/none/such", "./none", "../none", "~/none", "none/x.gguf", "owner/name/x.gguf"])
def test_what_looks_like_a_path_never_goes_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    with pytest.raises(ModelError, match="there is no such file or folder"):
        resolve(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder or a \.gguf file"):
        resolve(str(touch(tmp_path, "x.bin") / "x.bin"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/float": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"safe",
        "consolidated.safetensors": b"twice",
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"#",
    },
    "owner/one": {"README.md": b"#", "m.gguf": b"GGUF"},
    "owner/many": {"a.gguf": b"GGUF", "b.gguf": b"GGUF"},
    "owner/torch": {"config.json": b"{}", "pytorch_model.bin": b"zip", "training_args.bin": b"pickle"},
    "owner/pickles": {"config.json": b"{}", "rest.bin": b"pickle"},
    "owner/gated": {"config.json": b"{}", "model.safetensors": b"secret"},
}


class Hub(BaseHTTPRequestHandler):
    """The three answers of the hub that a download needs: the model's files, a file's head, a file."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.model("/".join(parts[2:4]), parts)
        elif parts[0] == "api":
            self.send(404, b"{}", {})
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]), with_body)

    def model(self, name: str, parts: list[str]) -> None:
        files = REPOSITORIES.get(name)
        if files is None or (len(parts) > 5 and parts[5] not in ("main", "v1", COMMIT)):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if files else "RepoNotFound"})
        if "tree" in parts:
            tree = [{"type": "file", "path": file, "size": len(data), "oid": file} for file, data in files.items()]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = [{"rfilename": file} for file in files]
        body = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, file: str, with_body: bool) -> None:
        if name == "owner/gated" and self.headers.get("Authorization") != "Bearer good-token":
            return self.send(401, b"", {"X-Error-Code": "GatedRepo"})
        body = REPOSITORIES[name][file]
        headers = {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(200, body if with_body else b"", headers, len(body))

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


Ask = Callable[..., str]


@pytest.fixture
def ask(hub: str, tmp_path: Path) -> Ask:
    """Resolves in a new process, since huggingface_hub reads its environment when it is imported."""

    def resolved(name: str, revision: str | None = None, **environment: str) -> str:
        code = (
            "import sys\n"
            "from textmill.errors import ModelError\n"
            "from textmill.weights.source import resolve\n"
            f"try: source = resolve({name!r}, revision={revision!r}, cache_dir={str(tmp_path / 'hub')!r})\n"
            "except ModelError as error: sys.exit('refused: ' + error.message)\n"
            "folder = source.path if source.path.is_dir() else source.path.parent\n"
            "print(source.kind, source.revision, source.path.name, sorted(p.name for p in folder.iterdir()))"
        )
        base = {key: item for key, item in os.environ.items() if not key.startswith("HF_")}
        base |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        base |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=base | environment,
            timeout=60,
            check=False,
        )
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    return resolved


def test_safetensors_are_preferred_and_nothing_else_is_fetched(ask: Ask) -> None:
    got = ask("owner/float")
    assert got == f"safetensors {COMMIT} {COMMIT} ['config.json', 'model.safetensors', 'tokenizer.json']"
    assert ask("owner/float", HF_HUB_OFFLINE="1") == got
    assert ask("owner/float", HF_ENDPOINT="http://127.0.0.1:9") == got


def test_the_only_gguf_of_a_repository(ask: Ask) -> None:
    assert ask("owner/one", revision="v1").startswith(f"gguf {COMMIT} m.gguf")


def test_pytorchs_own_files_where_there_are_no_others(ask: Ask) -> None:
    assert ask("owner/torch") == f"torch {COMMIT} {COMMIT} ['config.json', 'pytorch_model.bin']"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("owner/many", "name one of them by its path: a.gguf, b.gguf"),
        ("owner/pickles", ".bin weights, but no pytorch_model.bin"),
        ("owner/none", "owner/none: cannot be fetched from the hub: "),
        ("no model name", "neither a file or folder here nor the name of a hub model"),
    ],
)
def test_hub_models_we_cannot_serve(ask: Ask, name: str, problem: str) -> None:
    got = ask(name)
    assert got.startswith("refused: ")
    assert problem in got


def test_a_revision_that_is_not_there(ask: Ask) -> None:
    assert "cannot be fetched from the hub" in ask("owner/float", revision="v9")


def test_the_token_opens_gated_models(ask: Ask) -> None:
    assert "cannot be fetched from the hub" in ask("owner/gated")
    assert ask("owner/gated", HF_TOKEN="good-token").startswith("safetensors")


def test_offline_without_the_model(ask: Ask) -> None:
    assert "in the local cache, and the hub cannot be reached" in ask("owner/float", HF_HUB_OFFLINE="1")


def test_offline_with_half_of_the_model(ask: Ask, tmp_path: Path) -> None:
    assert ask("owner/float").startswith("safetensors")
    (held,) = (tmp_path / "hub").rglob("snapshots/*/model.safetensors")
    held.unlink()
    assert "not wholly" in ask("owner/float", HF_HUB_OFFLINE="1")
