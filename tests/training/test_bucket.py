"""A run in a bucket, by a storage server in this process that speaks Google's protocol."""

import jaxtyping
import pytest
from test_run import Spy, read_metrics

from spa_jax.errors import UserError
from spa_jax.files import path_of
from spa_jax.training import run

pytestmark = pytest.mark.slow


def with_generation(download):
    """The emulator's answer with the header it leaves out, without which nothing that was read can be written again."""

    def answer(request, response, storage, **rest):
        download(request, response, storage, **rest)
        if response.status in (200, 206):
            stored = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["X-Goog-Generation"] = stored["generation"]

    return answer


@pytest.fixture
def bucket(monkeypatch, free_port):
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    monkeypatch.setattr(objects, "download", with_generation(objects.download))
    port = free_port()
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # a bucket's path can do what a Path can, and is none
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # one for files, one for arrays
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    serving = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="spa-bucket")
    serving.start()
    yield "gs://spa-bucket"
    serving.stop()


def test_a_run_in_a_bucket_is_the_one_on_a_disk(bucket, make_config, tmp_path, monkeypatch):
    """Interrupted between two checkpoints and resumed."""
    config = make_config({"train.epochs": 3, "train.eval_every": 4, "train.log_every": 1})
    here, there = tmp_path / "run", path_of(f"{bucket}/runs/one")
    run.train(config, here)
    with monkeypatch.context() as patched:
        Spy(patched, interrupt_at=6)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, there)
    assert not (there / "plugin").exists()
    run.train(config, there)
    assert read_metrics(there) == read_metrics(here)
    for name in ("plugin.safetensors", "plugin_config.json"):
        assert (there / "plugin" / name).read_bytes() == (here / "plugin" / name).read_bytes()
    with pytest.raises(UserError, match="another config"):
        run.train(make_config({"train.epochs": 4}), there)


def test_a_tap_cache_in_a_bucket_is_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="directory that all processes share"):
        run.train(make_config({"tap_cache.directory": "gs://spa-bucket/taps"}), tmp_path)
