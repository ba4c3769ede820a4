"""The Kubernetes files, built like kustomize does, checked against the fields of KubeRay's CRDs."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
from kustomize import build
from scaling import machines_for

from raydpo.cluster.resources import Resources

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
README = (ROOT / "cluster" / "README.md").read_text()
CLOUDS = ("aks", "eks", "gke")
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
MACHINES = {  # vCPUs, GiB of memory, from the clouds' tables
    "Standard_D16s_v5": (16, 64),
    "Standard_ND96isr_H100_v5": (96, 1900),
    "a3-highgpu-8g": (208, 1872),
    "m7i.4xlarge": (16, 64),
    "n2-standard-16": (16, 64),
    "p5.48xlarge": (192, 2048),
}
UNITS = {"Gi": 1, "Mi": 2**-10}


@pytest.fixture(params=CLOUDS)
def cloud(request):
    return request.param


def resources(cloud):
    return {one["kind"]: one for one in build(KUBERAY / "overlays" / cloud)}


def spec(cloud):
    return resources(cloud)["RayCluster"]["spec"]


def pods(cluster):
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def variables(pod):
    return {one["name"]: one["value"] for one in pod["containers"][0]["env"]}


def quantity(text):
    """A Kubernetes quantity as a number of CPUs or GiB."""
    number, unit = re.fullmatch(r"(\d+)(\D*)", text).groups()
    return int(number) * UNITS.get(unit, 1)


def test_overlays_are_those_that_are_tested():
    assert sorted(place.name for place in (KUBERAY / "overlays").iterdir()) == list(CLOUDS)


def test_resources_have_the_fields_of_the_crds(cloud):
    for kind in ("RayCluster", "RayJob"):
        jsonschema.validate(resources(cloud)[kind], SCHEMA)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("spec.enableInTreeAutoscalling", True),
        ("spec.authOptions.mode", "tokens"),
        ("spec.workerGroupSpecs.0.maxReplicas", "2"),
        ("spec.workerGroupSpecs.1.priorty", 3),
        ("spec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "64 GB"),
    ],
)
def test_the_schema_sees_a_slip(path, wrong):
    cluster = copy.deepcopy(resources("eks")["RayCluster"])
    node, (*steps, last) = cluster, path.split(".")
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    node[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, SCHEMA)


def test_job_and_cluster_are_the_same_cluster(cloud):
    built = resources(cloud)
    assert built["RayJob"]["spec"]["rayClusterSpec"] == built["RayCluster"]["spec"]


def test_the_version_of_ray_is_the_images(cloud):
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert spec(cloud)["rayVersion"] == pinned


def test_head_computes_nothing_and_spot_comes_first(cloud):
    cluster = spec(cloud)
    head, (spot, demand) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and "nvidia.com/gpu" not in json.dumps(head)
    assert cluster["autoscalerOptions"]["version"] == "v2" and cluster["authOptions"] == {"mode": "token"}
    assert (spot["groupName"], demand["groupName"]) == ("spot", "on-demand") and spot["priority"] > demand["priority"]
    assert spot["minReplicas"] == demand["minReplicas"] == 0


def test_every_pod_knows_its_machines(cloud):
    selectors = [json.dumps(pod["nodeSelector"], sort_keys=True) for pod in pods(spec(cloud))]
    assert len(set(selectors)) == 3
    assert "spot" in selectors[1].lower() and "spot" not in selectors[0].lower() + selectors[2].lower()


def test_pods_fit_the_machines_and_disks_that_the_overlay_names(cloud):
    """The system needs part of a machine, so pods request at most 85 %; GKE reserves 10 % of a disk and up to 100 GiB."""
    said = (KUBERAY / "overlays" / cloud / "kustomization.yaml").read_text()
    named = re.findall(r"^#     (head|spot|on-demand) +(\S+) +(\d+) GB disk$", said, re.MULTILINE)
    assert [group for group, *_ in named] == ["head", "spot", "on-demand"]
    cluster = spec(cloud)
    for (group, machine, disk), pod in zip(named, pods(cluster), strict=True):
        together = [container["resources"]["requests"] for container in pod["containers"]]
        if group == "head":  # the operator adds the autoscaler here
            together.append(cluster["autoscalerOptions"]["resources"]["requests"])
        cpus, memory, storage = (
            sum(quantity(one.get(name, "0")) for one in together) for name in ("cpu", "memory", "ephemeral-storage")
        )
        gib = int(disk) * 1e9 / 2**30
        assert cpus <= 0.85 * MACHINES[machine][0] and memory <= 0.85 * MACHINES[machine][1]
        assert storage <= (0.9 * gib - 100 if cloud == "gke" else 0.85 * gib)
        assert pod["nodeSelector"].get("node.kubernetes.io/instance-type", machine) == machine
        limits = {
            volume["name"]: quantity(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if "emptyDir" in volume
        }
        assert limits.pop("shm") < memory and sum(limits.values()) < storage


def test_requests_equal_limits_and_nothing_runs_as_root(cloud):
    cluster = spec(cloud)
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
            assert mounted.keys() == volumes.keys() and mounted["shm"] == "/dev/shm"
            assert volumes["shm"]["medium"] == "Memory"
    for pod in pods(cluster)[1:]:
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert any(one["key"] == "nvidia.com/gpu" for one in pod["tolerations"])


def test_the_network_policy_meets_our_pods_and_lets_in_whom_it_must(cloud):
    built = resources(cloud)
    selected = built["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    cluster = built["RayCluster"]["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert selected.items() <= group["template"]["metadata"]["labels"].items()
    open_ports = {port["port"] for rule in built["NetworkPolicy"]["spec"]["ingress"] for port in rule.get("ports", [])}
    named = {port["name"]: port["containerPort"] for port in pods(cluster)[0]["containers"][0]["ports"]}
    assert open_ports == {named["dashboard"], named["metrics"]}
    assert all("from" in rule for rule in built["NetworkPolicy"]["spec"]["ingress"])
    # Any pod can have the operator's label, so its namespace is checked too: the one in README.md.
    (installed,) = re.findall(r"helm install .* --namespace (\S+)", README)
    (operator,) = [
        source
        for rule in built["NetworkPolicy"]["spec"]["ingress"]
        for source in rule["from"]
        if "kuberay-operator" in json.dumps(source) and "namespaceSelector" in source
    ]
    assert operator["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": installed}}


def test_pods_get_rights_from_their_account_alone(cloud):
    every = build(KUBERAY / "overlays" / cloud)
    accounts = {
        one["metadata"]["name"]: list(one["metadata"]["annotations"]) for one in every if one["kind"] == "ServiceAccount"
    }
    annotation = {
        "aks": "azure.workload.identity/client-id",
        "eks": "eks.amazonaws.com/role-arn",
        "gke": "iam.gke.io/gcp-service-account",
    }[cloud]
    assert accounts == {"raydpo-head": [annotation], "raydpo": [annotation]}
    assert {one["metadata"]["namespace"] for one in every} == {"raydpo"}
    built = resources(cloud)
    for pod in pods(built["RayCluster"]["spec"]):
        (source,) = pod["containers"][0]["envFrom"]
        # The operator stores its token in a secret with the cluster's name, so this secret needs another name.
        assert source["secretRef"]["name"] != built["RayCluster"]["metadata"]["name"] and source["secretRef"]["optional"]


def test_only_the_autoscaler_may_change_pods(cloud):
    """Only the head's account has that right, and only the autoscaler's container has its token."""
    cluster = spec(cloud)
    head, *workers = pods(cluster)
    assert head["serviceAccountName"] not in {pod["serviceAccountName"] for pod in workers}
    assert not any(pod["automountServiceAccountToken"] for pod in (head, *workers))
    (token,) = [volume["name"] for volume in head["volumes"] if "serviceAccountToken" in json.dumps(volume)]
    (mount,) = cluster["autoscalerOptions"]["volumeMounts"]
    assert mount == {"name": token, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
    assert token not in json.dumps([pod["containers"] for pod in pods(cluster)])


def test_ray_has_almost_all_of_the_time_that_kubernetes_gives_a_pod(cloud):
    head, *workers = pods(spec(cloud))
    for pod in (head, *workers):
        drain = int(variables(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 5 <= pod["terminationGracePeriodSeconds"] - drain <= 15
        assert drain >= 100


def test_what_is_mounted_can_be_written_around(cloud):
    """kubelet creates a missing parent of a mount as root, and user 1000 cannot write there."""
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    made = re.search(r"install --directory --owner=ray --group=ray (.+?) \\\n", dockerfile)
    assert "useradd --create-home --uid 1000 ray" in dockerfile
    there = {"/dev", "/home/ray", *made[1].split()}
    for pod in pods(spec(cloud)):
        mounts = [mount["mountPath"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert {str(Path(mount).parent) for mount in mounts} <= there | {*mounts}
    (home,) = re.findall(r"HF_HOME=(\S+)", dockerfile)
    assert any(Path(mount) in Path(home).parents for mount in mounts), "models of the hub lie on the volume"


@pytest.mark.parametrize(
    ("accelerator", "labels", "group"),
    [
        (None, {}, "spot"),
        ("H100", {}, "spot"),
        ("H100", {"ray.io/market-type": "on-demand"}, "on-demand"),
        (None, {"ray.io/market-type": "spot"}, "spot"),
        ("L4", {}, None),
    ],
)
def test_rays_autoscaler_brings_what_a_stage_asks_for(cloud, accelerator, labels, group):
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    class Api:
        def get(self, path):
            assert path == "rayclusters/raydpo"
            return resources(cloud)["RayCluster"]

    producer = AutoscalingConfigProducer("raydpo", "raydpo")
    producer.kubernetes_api_client = Api()
    asked = Resources(8, 1.0, None, accelerator=accelerator, labels=labels)
    assert machines_for(producer(), asked) == ({group: 1} if group else {})


def test_the_operator_is_new_enough_for_the_fields():
    (made_of,) = re.findall(r"KubeRay v([\d.]+)", SCHEMA["$comment"])
    assert re.findall(r"--version (\S+)", README) == [made_of]
    assert re.findall(r"KubeRay ([\d.]+) or newer", README) == [made_of.removesuffix(".0")]


def test_a_job_resumes_and_ends(cloud):
    job = resources(cloud)["RayJob"]["spec"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
    said = dict(word.split("=", 1) for word in job["entrypoint"].split() if "=" in word)
    scheme = {"aks": "abfs", "eks": "s3", "gke": "gs"}[cloud]
    assert said["output"].startswith(f"{scheme}://") and said["cache.uri"].startswith(f"{scheme}://") and said["name"]


def test_a_patch_without_a_target_is_an_error(tmp_path):
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{KUBERAY / 'base'}]\npatches: [{{target: {{kind: RayCluster, name: other}}, patch: '[]'}}]\n"
    )
    with pytest.raises(ValueError, match="no resource for the patch"):
        build(tmp_path)
