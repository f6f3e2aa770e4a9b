"""What the Kubernetes manifests let pods do, and the cluster do with them."""

from __future__ import annotations

import pytest

from support.kubernetes import WHOLE, Object, pod_templates, ray_groups, ray_service, rendered


@pytest.mark.parametrize("name", WHOLE)
def test_every_pod_may_do_little(name: str) -> None:
    """As the `restricted` standard of Kubernetes demands, and a read-only root beside."""
    for template in pod_templates(name):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        head = spec["containers"][0]["name"] == "ray-head"  # its autoscaler asks the API server
        assert spec.get("automountServiceAccountToken", True) is head
        for container in spec["containers"]:
            restricted(container["securityContext"])
            for side in ("requests", "limits"):
                assert container["resources"][side].keys() >= {"cpu", "memory", "ephemeral-storage"}
            if container["name"].startswith("ray-"):
                [volume] = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == "/tmp"]
                assert [each for each in spec["volumes"] if each["name"] == volume and "emptyDir" in each]
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
    if name != "models":
        restricted(ray_service(name)["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"])


def test_nodes_can_be_drained() -> None:
    """A budget lets a pod of the smallest group go. Kubernetes takes no other kind for pods of a RayCluster."""
    groups = {group["groupName"]: group for group in ray_groups("overlays/production")[1:]}
    budgets = [each["spec"] for each in rendered("overlays/production") if each["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        assert budget.keys() == {"minAvailable", "selector"}
        group = groups[budget["selector"]["matchLabels"]["ray.io/group"]]
        assert isinstance(budget["minAvailable"], int)
        assert 0 < budget["minAvailable"] < group["minReplicas"]


def restricted(context: Object) -> None:
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
