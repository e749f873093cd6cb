"""Labs on the types of Services."""

from __future__ import annotations

from labs.kubectl import LabError, expect, wait_for
from labs.lab import Lab, in_url
from labs.manifests import HTTPD, NGINX, server, service
from labs.nodes import answer_on_this_machine, node_addresses
from labs.programmed import all_is_done, wait_until

NODE_PORT = 30007
_INGRESS = {4: "203.0.113.10", 6: "2001:db8:113::10"}  # addresses for documentation: nobody has them
_NOBODY = {4: "192.0.2.1/32", 6: "2001:db8::1/128"}


def start_web(lab: Lab) -> None:
    """The two servers that most labs have behind the Service `web`."""
    lab.start(server("nginx", NGINX, "web"), server("httpd", HTTPD, "web"))


def create_balanced(lab: Lab) -> str:
    """Create the Service `web` with a load balancer's address, and return that."""
    # With a class of its own, so that no load balancer controller of the cluster takes it.
    lab.create(service("web", "web", type="LoadBalancer", loadBalancerClass="kproxy.dev/e2e"))
    address = _INGRESS[6 if ":" in lab.cluster_ip("web") else 4]
    lab.patch("web", {"status": {"loadBalancer": {"ingress": [{"ip": address}]}}}, "--subresource=status")
    return address


def node_port(lab: Lab) -> None:
    """nginx and httpd behind one NodePort Service"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web", [{"port": 80, "nodePort": NODE_PORT}], type="NodePort"))
    for address in node_addresses(like=lab.cluster_ip("web")):
        with lab.check(f"both answer at node {address}, port {NODE_PORT}"):
            lab.answers(f"http://{in_url(address)}:{NODE_PORT}/", "nginx", "httpd")
    published = lab.kind.published(NODE_PORT) if lab.kind else ""
    if not published:
        lab.skip(f"http://localhost:{NODE_PORT}", "no container of this machine that is a node has this port mapped")
        return
    with lab.check(f"both answer at http://{published}/ on this machine"):
        pages = {answer_on_this_machine(published) for _ in range(30)}
        expect(len(pages), 2, f"different pages at http://{published}/ in 30 requests")


def cluster_ip(lab: Lab) -> None:
    """ClusterIP, from a pod"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web"))
    with lab.check("both answer at the ClusterIP"):
        lab.answers(f"http://{in_url(lab.cluster_ip('web'))}/", "nginx", "httpd")
    with lab.check("both answer at the name, http://web/"):
        lab.answers("http://web/", "nginx", "httpd", within=60)
    with lab.check("a port that the Service does not have is not answered"):
        lab.refuses(f"http://{in_url(lab.cluster_ip('web'))}:81/")


def convert(lab: Lab) -> None:
    """A ClusterIP Service becomes a NodePort Service by a patch, and goes back"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web"))
    with lab.check("both answer at the ClusterIP"):
        lab.answers(f"http://{in_url(lab.cluster_ip('web'))}/", "nginx", "httpd")
    lab.patch("web", {"spec": {"type": "NodePort"}})
    port = lab.get("service", "web")["spec"]["ports"][0]["nodePort"]
    urls = [f"http://{in_url(address)}:{port}/" for address in node_addresses(like=lab.cluster_ip("web"))]
    with lab.check(f"after the patch to NodePort, both answer at port {port} of every node"):
        for url in urls:
            lab.answers(url, "nginx", "httpd")
    with lab.check("… and still at the ClusterIP"):
        lab.answers(f"http://{in_url(lab.cluster_ip('web'))}/", "nginx", "httpd")
    lab.patch("web", {"spec": {"type": "ClusterIP"}})
    with lab.check("after the patch back to ClusterIP, no node answers at that port"):
        for url in urls:
            lab.refuses(url)


def load_balancer(lab: Lab) -> None:
    """LoadBalancer with an address in its status"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    address = create_balanced(lab)
    family = 6 if ":" in address else 4
    url = f"http://{in_url(address)}/"
    with lab.check(f"with status.loadBalancer set, both answer at {address}"):
        lab.answers(url, "nginx", "httpd")
    lab.patch("web", {"spec": {"loadBalancerSourceRanges": [_NOBODY[family]]}})
    with lab.check("loadBalancerSourceRanges without the client: nobody answers"):
        lab.refuses(url)
    pod = lab.pod_address("client")
    lab.patch("web", {"spec": {"loadBalancerSourceRanges": [f"{pod}/{128 if ':' in pod else 32}"]}})
    with lab.check("loadBalancerSourceRanges with the client: both answer"):
        lab.answers(url, "nginx", "httpd")


def external_name(lab: Lab) -> None:
    """ExternalName: an alias in the DNS, nothing in the kernel"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web"))
    target = f"web.{lab.namespace}.svc.{lab.cluster_domain()}"
    lab.create(service("alias", type="ExternalName", externalName=target))
    with lab.check(f"both answer at http://alias/, which is {target}"):
        lab.answers("http://alias/", "nginx", "httpd", within=60)
    with lab.check("the nodes' kernels hold what they should"):
        wait_until(all_is_done)


def headless(lab: Lab) -> None:
    """Headless: the DNS has the pods' own addresses"""
    with lab.check("nginx and httpd run"):
        start_web(lab)
    lab.create(service("web", "web", clusterIP="None"))
    expected = {lab.pod_address(name) for name in ("nginx", "httpd")}
    name = f"web.{lab.namespace}.svc.{lab.cluster_domain()}"

    def resolved() -> bool:
        found = lab.resolve(name)
        if not expected <= found:
            raise LabError(f"the DNS knows {', '.join(sorted(found)) or 'nothing'} for {name}")
        return True

    with lab.check(f"{name} has the addresses of both pods"):
        wait_for(resolved, "both addresses are in the DNS", 60)
    with lab.check("a server answers at the name"):
        seen = lab.ask(f"http://{name}/")
        if not set(seen) <= {"nginx", "httpd"}:
            raise LabError(f"http://{name}/ was answered by {dict(seen)}")
    with lab.check("the nodes' kernels hold what they should"):
        wait_until(all_is_done)
