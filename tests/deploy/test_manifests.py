"""Every manifest under ``deploy/kuberay`` is valid, and all of them fit each other, the recipe and the program."""

import copy
import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lookalike.cli import STAGE_HELP
from lookalike.errors import UsageError
from lookalike.recipe import Recipe
from lookalike.serve.app import MESSAGE_VARIABLE
from lookalike.serve.commands.serve import emit_config
from lookalike.serve.front.tls import render
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.stages import BUILT_IN, load_object

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kuberay"
CRDS = ROOT.parent / "shared/kuberay-crds"
Document = dict[str, Any]
Check = Callable[[Document], None]


def read(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


DOCUMENTS = [(path.name, document) for path in sorted(FOLDER.glob("*.yaml")) for document in read(path)]
JOBS = {document["metadata"]["name"]: document for _, document in DOCUMENTS if document["kind"] == "RayJob"}


def only(kind: str) -> Document:
    (document,) = [copy.deepcopy(document) for _, document in DOCUMENTS if document["kind"] == kind]
    return document


def policy(name: str) -> Document:
    (document,) = [
        copy.deepcopy(document)
        for _, document in DOCUMENTS
        if document["kind"] == "NetworkPolicy" and document["metadata"]["name"] == name
    ]
    return document


def trim_crds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trim_crds", Path(__file__).with_name("trim_crds.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "document"), DOCUMENTS, ids=[f"{n}:{d['kind']}" for n, d in DOCUMENTS])
def test_manifest_is_valid(name: str, document: Document, check: Check) -> None:
    check(document)


@pytest.mark.skipif(not CRDS.exists(), reason="KubeRay's own CRDs are not beside this checkout")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_vendored_schemas_are_kuberays(kind: str, schemas: dict[str, Document]) -> None:
    module = trim_crds()
    original = module.read_schema(CRDS, kind)
    assert schemas[kind] == module.trim(original)
    wanted = [document for _, document in DOCUMENTS if document["kind"] == kind]
    assert wanted
    for document in wanted:  # the trimmed schema refuses no less than the original, descriptions apart
        jsonschema.Draft202012Validator(original).validate(document)


def test_one_job_a_stage() -> None:
    verbs = [shlex.split(job["spec"]["entrypoint"])[1] for job in JOBS.values()]
    assert set(verbs) == set(BUILT_IN) == set(STAGE_HELP)
    for name, job in JOBS.items():
        assert (FOLDER / f"rayjob-{name.removeprefix('lookalike-')}.yaml").exists()
        assert len(name) <= 47  # KubeRay's limit
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": only("RayCluster")["metadata"]["name"]}
        assert not {"suspend", "backoffLimit", "rayClusterSpec"} & set(job["spec"])  # refused beside clusterSelector


def test_job_runs_steps_of_a_recipe_that_the_image_holds() -> None:
    covered: dict[str, set[str]] = {}
    for job in JOBS.values():
        program, verb, recipe_path, *rest = shlex.split(job["spec"]["entrypoint"])
        assert program == "lookalike"
        step = rest[rest.index("--step") + 1] if "--step" in rest else None
        recipe = Recipe.load(str(ROOT / recipe_path), [word for word in rest if "=" in word])
        assert recipe.root == f"/artifacts/{recipe.name}"
        for step_name in [step] if step else recipe.steps_of(verb):
            assert recipe.stage(step_name).name == verb
            covered.setdefault(recipe_path, set()).add(step_name)
    quickstart = "deploy/recipes/quickstart.yaml"
    assert covered.pop(quickstart) == set(Recipe.load(str(ROOT / quickstart)).steps)
    # the other steps of these two recipes run as the quickstart's do
    assert covered == {
        "deploy/recipes/vectors.yaml": {"vectors"},
        "deploy/recipes/mrl-imagenet-smoke.yaml": {"classify"},
    }


def test_cluster_and_service_run_the_same_image_and_ray() -> None:
    cluster, service = only("RayCluster")["spec"], only("RayService")["spec"]["rayClusterConfig"]
    pods = [
        group["template"]["spec"]
        for spec in (cluster, service)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    ]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len(containers) == 5  # the service's workers have a proxy beside Ray
    assert len({container["image"] for container in containers}) == 1
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert {cluster["rayVersion"], service["rayVersion"]} == {pinned.removeprefix("ray==")}
    claim = only("PersistentVolumeClaim")["metadata"]["name"]
    for pod in pods:
        container = pod["containers"][0]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
        assert container["volumeMounts"][0]["mountPath"] == "/artifacts"
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert pod.get("restartPolicy", "Never") == "Never"  # what autoscaler v2 asks for
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_driver_of_every_job_fits_a_worker() -> None:
    (group,) = only("RayCluster")["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    for job in JOBS.values():
        assert job["spec"].get("entrypointNumCpus", 0) <= int(container["resources"]["requests"]["cpu"])


def test_serve_config_is_what_the_command_emits(serve_settings: Callable[[str], ServeConfig]) -> None:
    text = only("RayService")["spec"]["serveConfigV2"]
    assert yaml.safe_load(emit_config(serve_settings(text))) == yaml.safe_load(text)


def test_serve_config_names_what_exists(serve_settings: Callable[[str], ServeConfig]) -> None:
    text = only("RayService")["spec"]["serveConfigV2"]
    document = yaml.safe_load(text)
    assert callable(load_object(document["applications"][0]["import_path"]))
    for dotted in document["grpc_options"]["grpc_servicer_functions"]:
        assert callable(load_object(":".join(dotted.rsplit(".", 1))))
    settings = serve_settings(text)
    assert not settings.loopback_only
    assert settings.index.startswith("/artifacts/quickstart/index/index/")


def mounted(pod: Document, container: Document) -> dict[str, Document]:
    """Mount path -> volume of a container."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}


def test_clients_reach_the_tls_proxy_alone() -> None:
    spec = only("RayService")["spec"]
    pod = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    (proxy,) = [container for container in pod["containers"] if container["name"] == "tls"]
    (port,) = [port["containerPort"] for port in proxy["ports"]]
    service = spec["serveService"]["spec"]
    assert service["clusterIP"] == "None"
    assert [(one["name"], one["port"]) for one in service["ports"]] == [("serve", port)]
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "serve" not in [one["name"] for one in head["ports"]]  # KubeRay would publish that one in its place
    last = policy("lookalike-retrieval")["spec"]["ingress"][-1]
    assert [one["port"] for one in last["ports"]] == [port]
    assert spec["excludeHeadPodFromServeSvc"]  # the head has no proxy


def test_the_proxy_is_the_one_that_the_program_runs() -> None:
    spec = only("RayService")["spec"]
    pod = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    proxy = pod["containers"][1]
    *program, config = proxy["command"]
    assert program == ["python", "-m", "lookalike.serve.front.tls"]
    mounts = mounted(pod, proxy)
    (folder,) = [path for path, volume in mounts.items() if "secret" in volume]
    folder_of_config, _, name = config.rpartition("/")
    configs = only("ConfigMap")
    assert mounts[folder_of_config]["configMap"]["name"] == configs["metadata"]["name"]
    grpc_port = yaml.safe_load(spec["serveConfigV2"])["grpc_options"]["port"]
    wanted = render(folder, bind="*:9443", backend=f"127.0.0.1:{grpc_port}", mutual=False)
    assert configs["data"] == {name: wanted}


def test_every_ray_pod_has_the_tenants(serve_settings: Callable[[str], ServeConfig]) -> None:
    spec = only("RayService")["spec"]
    path = serve_settings(spec["serveConfigV2"]).tenants
    assert path is not None
    cluster = spec["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = mounted(pod, pod["containers"][0])
        assert mounts[path.rpartition("/")[0]]["secret"]["secretName"] == "lookalike-tenants"


def test_selectors_meet_the_pods() -> None:
    head, worker = [
        group["template"]["metadata"]["labels"]
        for group in (
            only("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"],
            only("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0],
        )
    ]
    budget = only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert budget.items() <= worker.items()
    assert not budget.items() <= head.items()
    selected = policy("lookalike-retrieval")["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= worker.items()
    assert selected.items() <= head.items()


def test_every_ray_pod_has_both_serve_flags() -> None:
    spec = only("RayService")["spec"]["rayClusterConfig"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        env = {entry["name"]: entry["value"] for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert int(env[MESSAGE_VARIABLE]) == RequestLimits().max_request_bytes


def put(path: str, value: Any) -> Callable[[Document], None]:
    """A mutation: set the dotted ``path`` (numbers index lists) to ``value``."""

    def apply(document: Document) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        target: Any = document
        for part in parents:
            target = target[part]
        target[last] = value

    return apply


HEAD = "spec.headGroupSpec.template.spec"
BAD_RESOURCES = [
    ("RayCluster", put("spec.workerGroupSpecs.0.maxReplicas", "four")),
    ("RayCluster", put("spec.workerGroupSpecs.0.maxReplica", 4)),
    ("RayCluster", put("spec.autoscalerOptions.version", "v3")),
    ("RayCluster", put("spec.authOptions.mode", "open")),
    ("RayCluster", put("spec.headGroupSpec.rayStartParams.num-cpus", 0)),
    ("RayCluster", put("metadata.label", {})),
    ("RayCluster", put(f"{HEAD}.containers.0.resources.limit", {})),
    ("RayCluster", put(f"{HEAD}.containers.0.ports.0.containerPort", "6379")),
    ("RayCluster", put(f"{HEAD}.containers.0.ports.0.protcol", "TCP")),
    ("RayCluster", put(f"{HEAD}.containers", None)),
    ("RayJob", put("spec.entrypointNumCpus", "2")),
    ("RayJob", put("spec.entryPoint", "lookalike corpus")),
    ("RayJob", put("spec.clusterSelector", {"ray.io/cluster": 1})),
    ("RayService", put("spec.serveService.spec.ports.0.appProtocol", 2)),
    ("RayService", put("spec.serveService.spec.ports.0.appProtokol", "h2c")),
    ("RayService", put("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.topologySpreadConstraints.0.skew", 1)),
    ("PodDisruptionBudget", put("spec.maxUnavailible", 1)),
    ("NetworkPolicy", put("spec.ingress.2.ports.0.protocol", 6)),
    ("PersistentVolumeClaim", put("spec.resources.request", {})),
]


@pytest.mark.parametrize(("kind", "mutate"), BAD_RESOURCES)
def test_damaged_manifest_is_refused(kind: str, mutate: Callable[[Document], None], check: Check) -> None:
    if kind == "NetworkPolicy":
        document = policy("lookalike-retrieval")
    else:
        document = copy.deepcopy(JOBS["lookalike-plan"]) if kind == "RayJob" else only(kind)
    check(document)
    mutate(document)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


def test_integer_or_string_takes_both(check: Check) -> None:
    document = only("RayCluster")
    for cpu in ("2", 2):
        put(f"{HEAD}.containers.0.resources.requests.cpu", cpu)(document)
        check(document)
    put(f"{HEAD}.containers.0.resources.requests.cpu", [2])(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


BAD_SERVE = [
    put("applications.0.args.index", 7),
    put("applications.0.args.indx", "/artifacts"),
    put("applications.0.args.limits", {"max_kk": 5}),
    put("applications.0.args.num_replicas", 0),
    put("applications.0.import_paths", "lookalike.serve.app:build"),
    put("grpc_options.prt", 9000),
    put("htp_options", {}),
    put("applications.0.deployments", [{"name": "ingress", "replicas": 2}]),
    put("grpc_options.port", "many"),
    put("proxy_location", "Everywhere"),
    put("applications.0.deployments", [{"name": "ingress", "num_replicas": -1}]),
]


@pytest.mark.parametrize("mutate", BAD_SERVE)
def test_damaged_serve_config_is_refused(mutate: Callable[[Document], None], check: Check) -> None:
    service = only("RayService")
    document = yaml.safe_load(service["spec"]["serveConfigV2"])
    mutate(document)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(document)
    with pytest.raises(UsageError):
        check(service)


def pods() -> dict[str, Document]:
    """Every pod template by a name."""
    templates = {name: job["spec"]["submitterPodTemplate"] for name, job in JOBS.items()}
    for kind, spec in (
        ("jobs", only("RayCluster")["spec"]),
        ("service", only("RayService")["spec"]["rayClusterConfig"]),
    ):
        templates[f"{kind} head"] = spec["headGroupSpec"]["template"]
        templates |= {f"{kind} {group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    return templates


VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("name", pods())
def test_pods_pass_pod_security_restricted(name: str) -> None:
    """The rules of Kubernetes' Pod Security Standard ``restricted``, for every container."""
    pod = pods()[name]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) - {"name"} <= VOLUMES for volume in pod.get("volumes", []))
    shared = pod["securityContext"]
    assert shared["runAsNonRoot"] is True
    assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
    assert shared.get("runAsUser", 1000) != 0
    contexts = [container["securityContext"] for container in pod["containers"]]
    if name == "jobs head":  # KubeRay adds the autoscaler
        contexts.append(only("RayCluster")["spec"]["autoscalerOptions"]["securityContext"])
        assert "automountServiceAccountToken" not in pod
    else:
        assert pod["automountServiceAccountToken"] is False
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not {"privileged", "runAsUser", "procMount", "seLinuxOptions"} & set(context)


def admits(policy_name: str, labels: Document, namespace: str, port: int) -> bool:
    """Whether a pod with ``labels`` in ``namespace`` (empty: the manifests' own) reaches ``port``."""
    for rule in policy(policy_name)["spec"]["ingress"]:
        ports = any(one["port"] <= port <= one.get("endPort", one["port"]) for one in rule["ports"])
        for peer in rule["from"]:
            place = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", "")
            if ports and place == namespace and peer["podSelector"]["matchLabels"].items() <= labels.items():
                return True
    return False


PORTS = {"dashboard": 8265, "gcs": 6379, "client": 10001, "metrics": 8080, "http": 8000, "grpc": 9000, "tls": 9443}
OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}


@pytest.mark.parametrize(
    ("labels", "namespace", "service", "jobs"),
    [
        ({"lookalike-client": "true"}, "", {"tls"}, set()),
        ({"lookalike-client": "true"}, "elsewhere", set(), set()),
        ({"app": "anything"}, "", set(), set()),
        (OPERATOR, "kuberay-system", {"dashboard", "http"}, {"dashboard"}),
        (OPERATOR, "elsewhere", set(), set()),
        (PROMETHEUS, "monitoring", {"metrics"}, {"metrics"}),
        (PROMETHEUS, "", set(), set()),
        ({"app.kubernetes.io/name": "lookalike-submitter"}, "", set(), {"dashboard"}),
        ({"app.kubernetes.io/name": "lookalike-jobs"}, "", set(), set(PORTS)),
        ({"app.kubernetes.io/name": "lookalike-retrieval"}, "", set(PORTS), set()),
    ],
)
def test_who_reaches_which_port(labels: Document, namespace: str, service: set[str], jobs: set[str]) -> None:
    for name, wanted in (("lookalike-retrieval", service), ("lookalike-jobs", jobs)):
        assert {port for port, number in PORTS.items() if admits(name, labels, namespace, number)} == wanted
        for haproxy in (8404, 9101):
            assert admits(name, labels, namespace, haproxy) == (len(wanted) == len(PORTS))


def test_every_pod_has_a_policy() -> None:
    selectors = [
        policy(name)["spec"]["podSelector"]["matchLabels"] for name in ("lookalike-retrieval", "lookalike-jobs")
    ]
    for name, template in pods().items():
        labels = template["metadata"]["labels"]
        assert name in JOBS or any(selector.items() <= labels.items() for selector in selectors)


def test_the_heads_publish_what_others_need() -> None:
    for spec in (only("RayCluster")["spec"], only("RayService")["spec"]["rayClusterConfig"]):
        (container,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        assert [one["name"] for one in container["ports"]] == ["gcs-server", "dashboard", "metrics"]


def test_secrets_are_read_by_their_user_alone() -> None:
    for template in pods().values():
        for volume in template["spec"].get("volumes", []):
            assert "secret" not in volume or volume["secret"]["defaultMode"] == 0o440
