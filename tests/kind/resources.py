"""What kubectl finds at the API stand-in beyond what a proxy watches, and how it learns of it."""

from __future__ import annotations

from tests.lab.apiserver_store import RESOURCES, Object, Resource

NAMESPACES = Resource("v1", "namespaces", "Namespace", namespaced=False)
PODS = Resource("v1", "pods", "Pod")
CONFIG_MAPS = Resource("v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNTS = Resource("v1", "serviceaccounts", "ServiceAccount")
CORE_EVENTS = Resource("v1", "events", "Event")
DEPLOYMENTS = Resource("apps/v1", "deployments", "Deployment")
DAEMON_SETS = Resource("apps/v1", "daemonsets", "DaemonSet")
CLUSTER_ROLES = Resource("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", namespaced=False)
BINDINGS = Resource("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False)

OURS = (
    NAMESPACES,
    PODS,
    CONFIG_MAPS,
    SERVICE_ACCOUNTS,
    CORE_EVENTS,
    DEPLOYMENTS,
    DAEMON_SETS,
    CLUSTER_ROLES,
    BINDINGS,
)
SERVED = (*RESOURCES, *OURS)
SERVICES = next(resource for resource in RESOURCES if resource.kind == "Service")
SLICES = next(resource for resource in RESOURCES if resource.kind == "EndpointSlice")

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


def discovery(path: str) -> Object | None:
    """The answer to a question for groups, versions or kinds."""
    match path.strip("/").split("/"):
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()}
        case ["api", "v1"]:
            return _kinds("v1")
        case ["apis", group, version]:
            return _kinds(f"{group}/{version}")
    return None


def _groups() -> list[Object]:
    groups = []
    for group_version in sorted({resource.group_version for resource in SERVED} - {"v1"}):
        group, _, version = group_version.partition("/")
        served = {"groupVersion": group_version, "version": version}
        groups.append({"name": group, "versions": [served], "preferredVersion": served})
    return groups


def _kinds(group_version: str) -> Object:
    resources: list[Object] = []
    for resource in SERVED:
        if resource.group_version == group_version:
            known = {"kind": resource.kind, "namespaced": resource.namespaced, "verbs": _VERBS}
            singular = {"singularName": resource.kind.lower()}
            resources.append({"name": resource.plural, **singular, **known})
            if resource in (SERVICES, PODS):
                resources.append({"name": f"{resource.plural}/status", "singularName": "", **known})
    return {"kind": "APIResourceList", "groupVersion": group_version, "resources": resources}


def openapi_paths(base: str) -> Object:
    """Where the schemas are."""
    versions = {resource.root.strip("/") for resource in SERVED}
    return {"paths": {version: {"serverRelativeURL": f"{base}/{version}"} for version in sorted(versions)}}


def openapi(root: str) -> Object:
    """A schema that says of each kind only that the server checks its fields itself, as kubectl wants to know."""
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {}
    for resource in SERVED:
        if resource.root.strip("/") == root:
            group, _, version = resource.group_version.rpartition("/")
            patch = {
                "parameters": [parameter],
                "responses": {"200": {"description": "OK"}},
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": resource.kind},
            }
            where = "/namespaces/{namespace}" if resource.namespaced else ""
            paths[f"{resource.root}{where}/{resource.plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.36.0"}, "paths": paths}
