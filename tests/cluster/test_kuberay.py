"""The Kubernetes files, built as kustomize would, against the fields of KubeRay's CRDs."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
from kustomize import build

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
CLOUDS = ("aks", "eks", "gke")
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())


@pytest.fixture(params=CLOUDS)
def cloud(request):
    return request.param


def resources(cloud):
    return {one["kind"]: one for one in build(KUBERAY / "overlays" / cloud)}


def spec(cloud):
    return resources(cloud)["RayCluster"]["spec"]


def pods(cluster):
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_overlays_are_those_that_are_tested():
    assert sorted(place.name for place in (KUBERAY / "overlays").iterdir()) == list(CLOUDS)


def test_resources_have_the_fields_of_the_crds(cloud):
    for kind in ("RayCluster", "RayJob"):
        jsonschema.validate(resources(cloud)[kind], SCHEMA)


@pytest.mark.parametrize(("path", "wrong"), [
    ("spec.enableInTreeAutoscalling", True), ("spec.authOptions.mode", "tokens"),
    ("spec.workerGroupSpecs.0.maxReplicas", "2"), ("spec.workerGroupSpecs.1.priorty", 3),
    ("spec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "64 GB"),
])
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


def test_requests_equal_limits_and_nothing_runs_as_root(cloud):
    cluster = spec(cloud)
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] and pod["serviceAccountName"] == "raydpo"
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
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


def test_pods_get_rights_from_their_account_alone(cloud):
    built = resources(cloud)
    (annotation,) = built["ServiceAccount"]["metadata"]["annotations"]
    assert annotation == {"aks": "azure.workload.identity/client-id", "eks": "eks.amazonaws.com/role-arn",
                          "gke": "iam.gke.io/gcp-service-account"}[cloud]
    assert {one["metadata"]["namespace"] for one in built.values()} == {"raydpo"}
    for pod in pods(built["RayCluster"]["spec"]):
        (source,) = pod["containers"][0]["envFrom"]
        # The operator keeps its token in a secret of the cluster's name; ours must be another.
        assert source["secretRef"]["name"] != built["RayCluster"]["metadata"]["name"] and source["secretRef"]["optional"]


def test_a_job_resumes_and_ends(cloud):
    job = resources(cloud)["RayJob"]["spec"]
    assert job["backoffLimit"] > 0 and job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0
    said = dict(word.split("=", 1) for word in job["entrypoint"].split() if "=" in word)
    scheme = {"aks": "abfs", "eks": "s3", "gke": "gs"}[cloud]
    assert said["output"].startswith(f"{scheme}://") and said["cache.uri"].startswith(f"{scheme}://") and said["name"]


def test_a_patch_without_a_target_is_an_error(tmp_path):
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{KUBERAY / 'base'}]\npatches: [{{target: {{kind: RayCluster, name: other}}, patch: '[]'}}]\n")
    with pytest.raises(ValueError, match="no resource for the patch"):
        build(tmp_path)
