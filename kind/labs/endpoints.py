"""Labs on what happens when pods and Services come and go."""

from __future__ import annotations

from functools import partial

from labs.kubectl import LabError, Object, expect, get, wait_for
from labs.lab import Lab, in_url
from labs.manifests import NGINX, UNREADY, deployment, service
from labs.programmed import all_is_done, wait_until
from labs.services import create_balanced, start_web

_REPLICAS = 3


def pod_deletion(lab: Lab) -> None:
    """Pods are deleted while traffic flows"""
    with lab.check(f"a Deployment of {_REPLICAS} runs"):
        lab.start(deployment("web", NGINX, _REPLICAS))
        before = _all_pods(lab)
        lab.wait_until_ready(before)
        lab.learn_pages(before[:1])  # they all show the same
    lab.create(service("web", "web"))
    url = f"http://{in_url(lab.cluster_ip('web'))}/"
    with lab.check("it answers at the ClusterIP"):
        lab.answers(url, before[0])
    with lab.traffic(url) as seen:
        for pod in before:
            address = lab.pod_address(pod)
            with lab.check(f"{pod} is deleted: its address leaves the EndpointSlices, a new one comes"):
                lab.kubectl("delete", "pod", pod, "--wait=false")
                wait_for(partial(_replaced, lab, address), f"{_REPLICAS} others than {address} are ready", 120)
        with lab.check("the deleted pods have ended"):
            wait_for(lambda: not set(before) & set(_pods(lab)), "their objects are gone", 60)
    with lab.check(f"every one of {seen.total()} requests was answered meanwhile"):
        expect(set(seen), {before[0]}, f"who answered ({dict(seen)})")
        if seen.total() < _REPLICAS:
            raise LabError(f"there were {seen.total()} requests only")


def affinity(lab: Lab) -> None:
    """sessionAffinity: ClientIP"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web"))
    url = f"http://{in_url(lab.cluster_ip('web'))}/"
    with lab.check("without affinity both answer"):
        lab.answers(url, "nginx", "httpd")
    lab.patch("web", {"spec": {"sessionAffinity": "ClientIP"}})

    def one_answers() -> str:
        seen = lab.ask(url)
        if len(seen) != 1:
            raise LabError(f"{dict(seen)}")
        return next(iter(seen))

    with lab.check("with affinity one and the same answers 20 times"):
        chosen = wait_for(one_answers, "one server has all requests", lab.patience)
    with lab.check(f"… and it stays with {chosen} for 50 more"):
        expect(dict(lab.ask(url, 50)), {chosen: 50}, "who answered")
    other = {"nginx": "httpd", "httpd": "nginx"}[chosen]
    with lab.check(f"when {chosen} is no longer ready, the client goes to {other}"):
        lab.in_pod(chosen, "touch", UNREADY)
        lab.answers(url, other)
        lab.in_pod(chosen, "rm", UNREADY)
    lab.patch("web", {"spec": {"sessionAffinity": "None", "sessionAffinityConfig": None}})
    with lab.check("without affinity both answer again"):
        lab.answers(url, "nginx", "httpd")


def readiness(lab: Lab) -> None:
    """A readiness probe fails and recovers"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web"))
    url = f"http://{in_url(lab.cluster_ip('web'))}/"
    with lab.check("both answer"):
        lab.answers(url, "nginx", "httpd")
    with lab.check("nginx's probe fails: only httpd answers"):
        lab.in_pod("nginx", "touch", UNREADY)
        address = lab.pod_address("nginx")
        wait_for(lambda: address not in _ready_addresses(lab), "the EndpointSlice says so", 30)
        lab.answers(url, "httpd")
    with lab.check("httpd's fails too: nobody answers"):
        lab.in_pod("httpd", "touch", UNREADY)
        lab.refuses(url)
    with lab.check("both recover: both answer"):
        for pod in ("nginx", "httpd"):
            lab.in_pod(pod, "rm", UNREADY)
        lab.answers(url, "nginx", "httpd")


def cleanup(lab: Lab) -> None:
    """A Service that is deleted leaves no rule"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    external = create_balanced(lab)
    address = lab.cluster_ip("web")
    port = str(lab.get("service", "web")["spec"]["ports"][0]["nodePort"])
    with lab.check("it answers at its ClusterIP and at its load balancer address"):
        for frontend in (address, external):
            lab.answers(f"http://{in_url(frontend)}/", "nginx", "httpd")
    with lab.check("every node's kernel holds what it should, and nothing else"):
        wait_until(all_is_done)
    traces = (address, external, port)
    unseen = lab.kind.unseen(traces) if lab.kind else "the nodes are no containers of this machine"
    if lab.kind and not unseen:
        with lab.check("every node's rules name its addresses and its node port"):
            for node in lab.kind.nodes:
                expect(lab.kind.named(node, traces), traces, f"what the rules of {node} name")
    lab.kubectl("delete", "service", "web")
    with lab.check("after it is deleted, every node's kernel holds what it should, and nothing else"):
        wait_until(all_is_done)
    with lab.check("the ClusterIP no longer answers"):
        lab.refuses(f"http://{in_url(address)}/")
    if lab.kind and not unseen:
        with lab.check("no node's rules name any of that"):
            for node in lab.kind.nodes:
                expect(lab.kind.named(node, traces), (), f"what the rules of {node} still name")
    else:
        lab.skip("the words of the rules themselves", f"{unseen}; the dry run has compared all")


def _pods(lab: Lab) -> list[str]:
    return [pod["metadata"]["name"] for pod in get("-n", lab.namespace, "pods", "-l", "app=web")["items"]]


def _all_pods(lab: Lab) -> list[str]:
    def enough() -> list[str]:
        pods = _pods(lab)
        return pods if len(pods) == _REPLICAS else []

    return wait_for(enough, f"the Deployment makes {_REPLICAS} pods", 60)


def _replaced(lab: Lab, address: str) -> bool:
    ready = _ready_addresses(lab)
    return len(ready) == _REPLICAS and address not in ready


def _ready_addresses(lab: Lab) -> set[str]:
    slices: list[Object] = get("-n", lab.namespace, "endpointslices", "-l", "kubernetes.io/service-name=web")["items"]
    return {
        address
        for slice_ in slices
        for endpoint in slice_["endpoints"] or ()
        if endpoint["conditions"].get("ready", True)
        for address in endpoint["addresses"]
    }
