"""A local Hub for the tests, and the small erasure they share.

huggingface_hub reads `HF_ENDPOINT` when it is imported, which in a test run is long past. So `hub` sets by monkeypatch
what that would have set: the constants, and the `endpoint` of the ready-made `HfApi` whose methods are the library's
functions (`create_repo`, `upload_folder`, ...). datasets keeps a copy of its own. Nothing else of the clients is
touched, and for fresh processes there is `hub.environment()`, where the variables do it all.
"""

import types

import pytest
from samples import REPO, make_folder
from server import Hub


DEMO_BASE = "space-peft/demo-llava"


@pytest.fixture(scope="session")
def hub_server():
    """The server itself; use `hub`."""
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path_factory):
    """An empty Hub, to which this process's libraries talk by default, with the token that may write.

    Caches (`HF_HOME`) are new for each test.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api
    from huggingface_hub.hf_file_system import HfFileSystem, hffs
    from huggingface_hub.utils import close_session

    hub_server.reset()
    home, url = tmp_path_factory.mktemp("hf_home"), hub_server.url
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in {
        "HF_ENDPOINT": url,
        "HF_TOKEN": hub_server.token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",  # PEFT asks the environment.
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
    }.items():
        # Older versions of huggingface_hub look for no agents.
        monkeypatch.setattr(constants, name, value, raising=name != "AGENT_HARNESSES_PATH")
    monkeypatch.setattr(api, "endpoint", url)
    # Made by the first call in this process, which may have been another test's, with the endpoint of then.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setattr(hffs, "endpoint", url)
    monkeypatch.setattr(hffs._api, "endpoint", url)
    for name, value in {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
        "HF_DATASETS_CACHE": home / "datasets",
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    assert huggingface_hub.get_token() == hub_server.token

    HfFileSystem.clear_instance_cache()  # They remember what repositories of an earlier test held.
    close_session()  # The client read its proxies when it was made.
    yield hub_server
    close_session()
    HfFileSystem.clear_instance_cache()
    assert not hub_server.errors, hub_server.errors


@pytest.fixture
def waits(monkeypatch):
    """Takes the waiting out of huggingface_hub's retries; the list says how long they would have waited."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    seconds: list[float] = []
    impatient = types.SimpleNamespace(**vars(_http.time) | {"sleep": seconds.append})
    monkeypatch.setattr(_http, "time", impatient)
    monkeypatch.setattr(file_download, "time", impatient)
    return seconds


@pytest.fixture
def every_request_is_understood(hub):
    """A client that asks for something this server does not know would take its 404 for an answer."""
    yield
    # Asked for wherever some coding assistant is running, and optional.
    optional = {"/api/agent-harnesses"}
    assert not [request.path for request in hub.requests if request.route == "unknown" and request.path not in optional]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


@pytest.fixture
def pushed(hub, folder):
    """The commit that put the files of `folder` into `REPO`; the log begins after it."""
    from huggingface_hub import create_repo, upload_folder

    create_repo(REPO)
    upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    return hub.head(REPO)


@pytest.fixture
def demo_base(hub, tmp_path):
    """The embedded model, pushed by stock transformers and huggingface_hub: the id adapters name as their base."""
    from huggingface_hub import create_repo, upload_folder

    from space_peft.demo import load_demo_model

    folder = tmp_path / "demo_base"
    for part in load_demo_model():
        part.save_pretrained(folder)
    create_repo(DEMO_BASE)
    upload_folder(repo_id=DEMO_BASE, folder_path=folder)
    hub.requests.clear()
    return DEMO_BASE


@pytest.fixture(scope="module")
def published(erasure_folder, tmp_path_factory):
    """The folder as it would lie on the Hub. Tests put back what they change."""
    from space_peft.hub_cards.staging import stage

    folder = tmp_path_factory.mktemp("published")
    stage(erasure_folder, folder, base_model="space-peft/demo-llava", include_images=True)
    return folder
